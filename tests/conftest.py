"""What the suites counted, as tables: `--hazard-table FILE`.

A test says what it went through with ``record_property("cases", N)``: states, faults, kills.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hazards_map import GROUPS, HAZARDS

BEGIN, END = "<!-- counted: begin -->", "<!-- counted: end -->"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hazards")
    group.addoption(
        "--hazard-table", type=Path, metavar="FILE", help="write what was counted into this page"
    )
    group.addoption(
        "--hazards", action="store_true", help="run the tests of the map of hazards and the sweeps"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that hears of all tests
        config.pluginmanager.register(Counting(config.getoption("--hazard-table")), "hazards")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("found"):
            item.user_properties.append(("found", str(mark.args[0])))
    if config.getoption("--hazards"):
        mapped = {name for hazard in HAZARDS for name in hazard.tests}
        chosen = {
            item: bare(item.nodeid) in mapped
            or item.get_closest_marker("sweep") is not None
            or item.get_closest_marker("found") is not None
            for item in items
        }
        config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
        items[:] = [item for item in items if chosen[item]]


def bare(nodeid: str) -> str:
    """The test of a case, as the map names it."""
    return nodeid.partition("[")[0].removeprefix("tests/")


@dataclass
class Tally:
    """What was counted of a group."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    cases: int = 0
    found: Counter[str] = field(default_factory=Counter)
    fixed: set[str] = field(default_factory=set)


class Counting:
    """Hears of every test that ran, and adds up."""

    def __init__(self, page: Path | None) -> None:
        self._page = page
        self._tallies = {group: Tally() for group in [*GROUPS, ""]}
        self._mutations: list[list[str]] = []
        self._groups: dict[str, set[str]] = {}
        for hazard in HAZARDS:
            for name in hazard.tests:
                self._groups.setdefault(name, set()).add(hazard.group)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        properties = report.user_properties
        self._mutations += [list(value) for name, value in properties if name == "mutation"]
        for group in self._groups.get(bare(report.nodeid), {""}):
            tally = self._tallies[group]
            tally.passed += report.passed
            tally.failed += report.failed
            tally.skipped += report.skipped
            counted = [int(str(value)) for name, value in properties if name == "cases"]
            tally.cases += 0 if report.skipped else sum(counted) or 1
            for name, value in properties:
                if name == "found":
                    tally.found[str(value)] += report.failed
        # A skipped test of a defect says nothing about it.

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._page is None:
            return
        lines = [*self._table(), *self._mutation_table()]
        terminalreporter.section("hazards")
        for line in lines:
            terminalreporter.write_line(line)
        text = self._page.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise pytest.UsageError(f"{self._page}: has no place for the tables: {BEGIN} … {END}")
        inner = "\n".join(lines)
        self._page.write_text(f"{before}{begin}\n\n{inner}\n\n{end}{after}", encoding="utf-8")
