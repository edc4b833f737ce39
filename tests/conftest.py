"""What the suites count, as tables: shown with `--hazards`, written with `--hazard-table=FILE`.

A test says with ``record_property("cases", N)`` through how many states, faults or kills it went;
the others are one case each.
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
        "--hazards", action="store_true", help="of the tests, those of the map of hazards"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that hears of all tests
        page, shown = config.getoption("--hazard-table"), config.getoption("--hazards")
        config.pluginmanager.register(Counting(page, shown), "hazards")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("found"):
            item.user_properties.append(("found", str(mark.args[0])))
    if config.getoption("--hazards"):
        mapped = {name for hazard in HAZARDS for name in hazard.tests}
        chosen = [
            bare(item.nodeid) in mapped
            or any(item.get_closest_marker(name) for name in ("sweep", "found"))
            for item in items
        ]
        left = [item for item, wanted in zip(items, chosen, strict=True) if not wanted]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item, wanted in zip(items, chosen, strict=True) if wanted]


def bare(nodeid: str) -> str:
    """The test of a case, as the map names it."""
    return nodeid.partition("[")[0].removeprefix("tests/")


@dataclass
class Tally:
    """What was counted of a group.

    Attributes:
        outcomes: Of tests: passed, failed, skipped.
        cases: Inputs, states, faults and kills that they went through.
        found: Defects that a test was written for, and how many of its cases failed.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    cases: int = 0
    found: Counter[str] = field(default_factory=Counter)

    def row(self, *names: str) -> str:
        fixed = sum(not failures for failures in self.found.values())
        counts = [self.outcomes[each] for each in ("passed", "failed", "skipped")]
        return _row(*names, *counts, self.cases, len(self.found), fixed)


class Counting:
    """Hears of every test that ran, adds up, and shows the tables at the end."""

    def __init__(self, page: Path | None, shown: bool) -> None:
        self._page = page
        self._shown = shown
        self._tallies = {group: Tally() for group in GROUPS}
        self._all = Tally()
        self._mutations: list[list[str]] = []
        self._groups: dict[str, set[str]] = {}
        for hazard in HAZARDS:
            for name in hazard.tests:
                self._groups.setdefault(name, set()).add(hazard.group)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        properties = [(name, value) for name, value in report.user_properties]
        self._mutations += [
            list(map(str, value))
            for name, value in properties
            if name == "mutation" and isinstance(value, list)
        ]
        counted = sum(int(str(value)) for name, value in properties if name == "cases") or 1
        groups = self._groups.get(bare(report.nodeid), set())
        for tally in [self._all, *(self._tallies[group] for group in groups)]:
            tally.outcomes[report.outcome] += 1
            tally.cases += 0 if report.skipped else counted
            for name, value in properties:
                if name == "found" and not report.skipped:
                    tally.found[str(value)] += report.failed

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._shown and self._page is None:
            return
        lines = [*self._hazards(), "", *self._caught()]
        terminalreporter.section("hazards")
        for line in lines:
            terminalreporter.write_line(line)
        if self._page is not None:
            write_between(self._page, "\n".join(lines))

    def _hazards(self) -> list[str]:
        heads = ["group", "", "hazards", "passed", "failed", "skipped", "cases", "found", "fixed"]
        rows = Counter(hazard.group for hazard in HAZARDS)
        return [
            _row(*heads),
            _row(*["---"] * 2, *["---:"] * 7),
            *(
                tally.row(group, GROUPS[group], str(rows[group]))
                for group, tally in self._tallies.items()
            ),
            self._all.row("all", "each test once", str(len(HAZARDS))),
        ]

    def _caught(self) -> list[str]:
        if not self._mutations:
            return ["No faults were planted in this run."]
        heads = ["planted fault", "seen in the twin's states by", "seen otherwise by"]
        rows = [
            _row(name, *(f"`{each}`" if each else "–" for each in seen))
            for name, *seen in sorted(self._mutations)
        ]
        return [_row(*heads), _row(*["---"] * 3), *rows]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write_between(page: Path, text: str) -> None:
    """Put a text between the two marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise pytest.UsageError(f"{page}: has no place for the tables: {BEGIN} … {END}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
