"""The map of hazards is whole: every row has tests, every test is there, no row is missing."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hazards_map import GROUPS, HAZARDS, Hazard

TESTS = Path(__file__).parent
DESIGN = TESTS.parent.parent / "shared" / "design" / "hazards.md"
"""The list that the map was made from, where somebody has it beside the checkout."""


@cache
def named_in(file: str) -> tuple[frozenset[str], frozenset[str]]:
    """The tests of a file, with the class where there is one; and every text in it."""
    names, texts = set(), set()
    module = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}::{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef)
            }
    return frozenset(names), frozenset(texts)


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda row: f"{row.group}{row.number}")
def test_a_row_has_tests_and_they_are_there(hazard: Hazard) -> None:
    assert hazard.cases, hazard.text
    for case in hazard.cases:
        path, _, bracket = case.partition("[")
        file, _, name = path.partition("::")
        names, texts = named_in(file)
        assert name in names, case
        assert name.rpartition("::")[2].startswith("test_"), case
        # "write-ENOSPC" is made of two texts.
        parts = [bracket[:-1], *bracket[:-1].split("-")] if bracket else []
        assert not parts or parts[0] in texts or texts.issuperset(parts[1:]), case


def test_every_group_has_rows_and_no_row_is_there_twice() -> None:
    assert {hazard.group for hazard in HAZARDS} == set(GROUPS)
    assert len({hazard.text for hazard in HAZARDS}) == len(HAZARDS)


def test_the_rows_are_as_many_as_in_the_list_they_were_made_from() -> None:
    if not DESIGN.is_file():
        pytest.skip("the list of hazards is not beside this checkout")
    text = DESIGN.read_text(encoding="utf-8")
    listed = {
        group: len(rows.split(" · "))
        for group, rows in re.findall(r"^## ([A-L])\. .*\n(.*)$", text, re.MULTILINE)
    }
    assert Counter(hazard.group for hazard in HAZARDS) == listed
