"""docs/security.md names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "security.md"


def test_every_promise_is_held_by_a_test_that_there_is() -> None:
    table = PAGE.read_text().split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    for row in rows:
        held = row.strip("| ").rsplit(" | ", maxsplit=1)[-1]
        files = re.findall(r"`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)", held)
        assert files, row
        for file, names in files:
            source = (TESTS / file).read_text()
            for name in re.findall(r"`(test_\w+)`", names):
                assert f"def {name}(" in source, f"{file} has no {name}"
