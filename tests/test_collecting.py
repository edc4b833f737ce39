"""A grid and its scores as one table: what is missing, half-written, stale or hostile."""

import hashlib
import io
import json
import math
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import typer
from helpers import Result

from uipe_merge.cli.collect import collect as command
from uipe_merge.errors import CorruptInputError, UipeMergeError, UsageError
from uipe_merge.study.collecting import Study, collect

VARIANTS = [("uipe", 2.0), ("uipe", 0.5), ("control", 1.0), ("reference", 0.0), ("uipe", 1.0), ("reference", -1.0)]  # fmt: skip
UTILITY = {-1.0: 0.65, 0.0: 0.6, 0.5: 0.59, 1.0: 0.58, 2.0: 0.4}
WRITTEN = 1_000_000.0


def name_of(family: str, alpha: float) -> str:
    return f"{'uipe' if family == 'reference' else family}-{alpha:g}"


def score(root: Path, name: str, scores: object, *, file: str = "", at: float = 0) -> Path:
    path = root / name / (file or "evals/TOFU_SUMMARY.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(scores if isinstance(scores, str) else json.dumps(scores))
    os.utime(path, (at or WRITTEN + 60,) * 2)
    return path


def model(directory: Path, alpha: float) -> str:
    """Write a manifest and return its digest."""
    directory.mkdir(parents=True)
    summary = {"alpha": alpha, "effective_alpha": None if alpha == 0 else alpha * 0.99}
    raw = json.dumps({"schema": 1, "summary": summary, "files": {}}).encode()
    (directory / "uipe_merge.json").write_bytes(raw)
    os.utime(directory / "uipe_merge.json", (WRITTEN, WRITTEN))
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A complete grid, its variants in no order, with a score of each."""
    root = tmp_path / "grid"
    entries = []
    for family, alpha in VARIANTS:
        name = name_of(family, alpha)
        digest = model(root / name, alpha)
        entries.append(entry(name, family, alpha, digest))
        quality = 1e-9 * 10 ** (3 * max(alpha, 0)) if family != "control" else 1e-9
        score(root / "scores", name, {"forget_quality": quality, "model_utility": UTILITY[alpha]})
    write_grid(root, entries)
    return root


def entry(name: object, family: object, alpha: object, digest: object) -> dict[str, object]:
    return {
        "name": name,
        "path": name,
        "alpha": alpha,
        "family": family,
        "manifest_sha256": digest,
    }


def write_grid(root: Path, entries: object) -> None:
    document = {
        "schema": 1,
        "original": "base",
        "unlearned": "npo",
        "command": "uipe-merge grid base npo",
        "variants": entries,
    }
    root.mkdir(exist_ok=True)
    (root / "grid.json").write_text(json.dumps(document))


def problem(study: Study, name: str) -> str:
    [found] = [row.problem for row in study.rows if row.name == name]
    assert found is not None
    return found


def run(*arguments: object) -> Result:
    """The command in this process, as ``app`` will run it."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    out, err = io.StringIO(), io.StringIO()
    environment = patch.dict(os.environ, {"NO_COLOR": "1", "COLUMNS": "200"})
    with environment, redirect_stdout(out), redirect_stderr(err):
        try:
            typer.main.get_command(app).main(
                [os.fsdecode(os.fspath(part) if isinstance(part, Path) else str(part)) for part in arguments],
                standalone_mode=False,
            )  # fmt: skip
        except UipeMergeError as error:
            return Result(error.exit_code, out.getvalue(), str(error))
    return Result(0, out.getvalue(), err.getvalue())


def test_rows_come_by_family_and_alpha(grid: Path) -> None:
    study = collect(grid)
    assert [row.name for row in study.rows] == [
        "uipe--1",
        "uipe-0",
        "uipe-0.5",
        "uipe-1",
        "uipe-2",
        "control-1",
    ]
    assert all(row.trusted for row in study.rows)
    assert (study.original, study.unlearned) == ("base", "npo")
    assert study.command == "uipe-merge grid base npo"
    assert study.metrics == ["forget_quality", "model_utility"]
    assert study.warnings == []
    by_name = {row.name: row for row in study.rows}
    assert by_name["uipe-1"].effective_alpha == 0.99
    assert by_name["uipe-0"].effective_alpha is None


def test_the_study_is_json(grid: Path) -> None:
    score(grid / "scores", "uipe-1", '{"forget_quality": NaN, "model_utility": Infinity}')
    document = json.loads(json.dumps(collect(grid).as_dict(), allow_nan=False))
    assert document["schema"] == 1
    [variant] = [each for each in document["variants"] if each["name"] == "uipe-1"]
    assert variant == {
        "name": "uipe-1",
        "family": "uipe",
        "alpha": 1.0,
        "effective_alpha": 0.99,
        "scores": {"forget_quality": None, "model_utility": None},
        "stale": None,
        "problem": None,
    }


def test_what_is_missing_or_half_written_is_named(grid: Path) -> None:
    shutil.rmtree(grid / "uipe-0.5")
    (grid / "uipe-1" / "uipe_merge.json").unlink()
    (grid / "uipe-2" / "uipe_merge.json").write_text('{"schema": 1, "files": {}}')
    shutil.rmtree(grid / "scores" / "control-1")
    score(grid / "scores", "uipe-0", '{"forget_quality": 1')
    study = collect(grid)
    assert "uipe-0.5: no such directory; run the grid again" in problem(study, "uipe-0.5")
    assert "has no uipe_merge.json: it was not finished" in problem(study, "uipe-1")
    assert "is not the manifest that grid.json names" in problem(study, "uipe-2")
    assert problem(study, "control-1").endswith("control-1: no scores")
    assert "TOFU_SUMMARY.json: is not valid JSON" in problem(study, "uipe-0")
    [kept] = [row for row in study.rows if row.name == "uipe-0.5"]
    assert kept.scores["model_utility"] == 0.59  # shown all the same


def test_a_damaged_manifest_is_a_problem_of_its_row_alone(grid: Path) -> None:
    write_grid(grid, [entry("uipe-1", "uipe", 1.0, None), entry("uipe-2", "uipe", 2.0, None)])
    (grid / "uipe-1" / "uipe_merge.json").write_text("{")
    study = collect(grid)
    assert "is not valid" in problem(study, "uipe-1")
    assert study.rows[1].problem is None  # no digest in grid.json: none to compare


def test_scores_inside_the_model_count_too(grid: Path) -> None:
    shutil.rmtree(grid / "scores")
    score(grid, "uipe-1", {"model_utility": 0.5}, file="evals/lm/x/TOFU_SUMMARY.json")
    study = collect(grid)
    assert {row.name: dict(row.scores) for row in study.rows if row.scores} == {
        "uipe-1": {"model_utility": 0.5}
    }


def test_scores_may_be_in_another_directory(grid: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "saves" / "eval"
    score(elsewhere, "uipe-1", {"model_utility": 0.123})
    score(elsewhere, "something else", {"model_utility": 0.9})
    study = collect(grid, elsewhere)
    assert [row.scores["model_utility"] for row in study.rows if row.scores] == [0.123]
    assert study.warnings == []  # what else lies there is no concern of the grid
    with pytest.raises(UsageError, match="no such directory; name the directory of scores"):
        collect(grid, tmp_path / "nowhere")


def test_scores_older_than_the_model_or_of_another_are_stale(grid: Path) -> None:
    score(grid / "scores", "uipe-1", {"model_utility": 0.5}, at=WRITTEN - 1)
    own = {"schema": 1, "tool": "uipe-merge evaluate", "forget_quality": 0.9}
    other = {**own, "model_manifest_sha256": "00" * 32}
    score(grid / "scores", "uipe-2", other, file="scores.json")
    rows = {row.name: row for row in collect(grid).rows}
    assert "TOFU_SUMMARY.json is older than the model" in str(rows["uipe-1"].stale)
    assert "scores.json is of another model" in str(rows["uipe-2"].stale)
    assert rows["uipe-1"].scores == {"model_utility": 0.5}
    assert rows["uipe-0.5"].stale is None


def test_the_retain_only_model_joins_where_it_was_evaluated(grid: Path) -> None:
    score(grid / "scores", "retain", {"model_utility": 0.61, "forget_quality": 1.0})
    study = collect(grid)
    [row] = [row for row in study.rows if row.name == "retain"]
    assert (row.family, row.alpha, row.problem, row.stale) == ("reference", None, None, None)
    result = run(grid, "--subject-to", "model_utility>=0.96*retain")
    assert "→ uipe-0.5 has the highest" in result.out


def test_tables_of_all_variants(grid: Path) -> None:
    shutil.rmtree(grid / "scores")
    text = "alpha,family,Forget Quality,Model Utility\n-1,,1e-20,0.65\n0,,1e-9,0.6\n1,,0.1,0.59\n1,control,1e-9,0.6\n7,,1,1\n"
    score(grid, "scores", text, file="table.csv")
    score(grid, "scores", "loss\n1\n2\n", file="samples.csv")
    study = collect(grid)
    found = {row.name: row.scores["forget_quality"] for row in study.rows if row.scores}
    assert found == {"uipe--1": 1e-20, "uipe-0": 1e-9, "uipe-1": 0.1, "control-1": 1e-9}
    assert len(study.warnings) == 2
    assert "samples.csv: rows of no variant of the grid: one without" in study.warnings[0]
    assert "table.csv: rows of no variant of the grid: α = 7" in study.warnings[1]


def test_scores_that_belong_to_nobody_are_told(grid: Path) -> None:
    score(grid / "scores", "uipe-01", {"model_utility": 0.5})
    score(grid, "scores", {"model_utility": 0.5}, file="TOFU_SUMMARY.json")
    [warning] = collect(grid).warnings
    assert "of no variant of the grid: TOFU_SUMMARY.json; uipe-01" in warning


def test_a_clash_is_reported(grid: Path) -> None:
    score(grid, "uipe-1", {"model_utility": 0.3}, at=WRITTEN + 99)
    study = collect(grid)
    [warning] = study.warnings
    assert "model_utility is 0.58 in " in warning
    assert "0.3 in " in warning
    [row] = [row for row in study.rows if row.name == "uipe-1"]
    assert row.scores["model_utility"] == 0.3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"schema": 1}',
        b'{"schema": 1, "variants": {}}',
        b'{"schema": 2, "variants": []}',
        b"[" * 100_000,
        b'{"schema": 1, "variants": [7]}',
    ],
)
def test_a_damaged_grid_is_refused(grid: Path, raw: bytes) -> None:
    (grid / "grid.json").write_bytes(raw)
    result = run(grid)
    assert result.code == 4
    assert f"{grid}/grid.json: " in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", ".."),
        ("name", "\0"),
        ("name", "\ud800"),
        ("name", 3),
        ("path", "../../etc"),
        ("path", "/etc"),
        ("path", "a//b"),
        ("path", ""),
        ("alpha", "1"),
        ("alpha", True),
        ("alpha", None),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("alpha", 10**400),
        ("family", "other"),
        ("family", None),
        ("family", []),
        ("manifest_sha256", "abc"),
        ("manifest_sha256", 3),
    ],
)
def test_a_damaged_entry_is_refused(grid: Path, field: str, value: object) -> None:
    good = entry("a", "uipe", 1.0, None)
    write_grid(grid, [good, {**entry("b", "uipe", 2.0, None), field: value}])
    with pytest.raises(CorruptInputError, match="has a damaged entry: variant 2") as caught:
        collect(grid)
    assert caught.value.file == str(grid / "grid.json")


def test_a_name_that_is_there_twice_is_refused(grid: Path) -> None:
    write_grid(grid, [entry("a", "uipe", 1.0, None), entry("a", "uipe", 2.0, None)])
    with pytest.raises(CorruptInputError, match="names 'a' twice"):
        collect(grid)


def test_a_name_too_long_for_the_disk_is_a_problem_of_its_row(grid: Path) -> None:
    write_grid(grid, [entry("n" * 300, "uipe", 1.0, None)])
    assert "too long" in collect(grid).rows[0].problem  # type: ignore[operator]


def test_no_grid(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert (result.code, result.err) == (
        2,
        f"{tmp_path}/nowhere: no such directory; name a directory written by `uipe-merge grid`",
    )
    result = run(tmp_path)
    assert result.code == 2
    assert "has no grid.json" in result.err


def test_the_table_and_the_choice(grid: Path) -> None:
    result = run(grid, "--subject-to", "model_utility>=0.95*unlearned")
    assert result.code == 0
    assert result.err == ""
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["variant", "family", "α", "effective", "α", "forget_quality", "model_utility"]  # fmt: skip
    assert lines[1] == ["uipe--1", "reference", "-1", "-0.99", "1e-09", "0.65"]
    assert lines[4] == ["uipe-1", "uipe", "1", "0.99", "1e-06", "0.58", "→", "*"]
    assert lines[6][:4] == ["control-1", "control", "1", "0.99"]
    assert "* on the Pareto front of forget_quality and model_utility" in result.out
    assert result.out.splitlines()[-1].startswith("→ uipe-1 has the highest forget_quality")


def test_without_a_constraint_the_table_is_shown_and_nothing_chosen(grid: Path) -> None:
    result = run(grid)
    assert result.code == 0
    assert "uipe-0.5" in result.out
    assert result.out.splitlines()[-1].startswith("nothing is chosen on forget_quality alone")


def test_nobody_keeps_enough_and_the_exit_code_is_0(grid: Path) -> None:
    result = run(grid, "--subject-to", "model_utility>=0.99*original")
    assert result.code == 0
    assert "nothing is chosen: no variant meets" in result.out
    assert "uipe-0.5 comes nearest" in result.out


def test_marks_of_what_cannot_be_chosen(grid: Path) -> None:
    score(grid / "scores", "uipe-1", {"model_utility": 0.5}, at=WRITTEN - 1)
    shutil.rmtree(grid / "uipe-2")
    result = run(grid, "--subject-to", "model_utility>=0.95*unlearned")
    rows = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert any(line.startswith("uipe-1 ") and line.endswith("stale") for line in result.out.splitlines())  # fmt: skip
    assert any(line.startswith("uipe-2 ") and line.endswith("problem") for line in result.out.splitlines())  # fmt: skip
    assert "older than the model" in rows["uipe-1:"]
    assert "no such directory" in rows["uipe-2:"]
    assert "→ uipe-0.5 has the highest" in result.out


def test_json(grid: Path) -> None:
    result = run(grid, "--json", "--subject-to", "model_utility>=0.95*unlearned")
    document = json.loads(result.out)
    assert document["chosen"] == "uipe-1"
    assert document["alpha"] == 1.0
    assert document["objective"] == {"metric": "forget_quality", "direction": "maximize"}
    [constraint] = document["constraints"]
    assert constraint == {"text": "model_utility>=0.95*unlearned", "bound": pytest.approx(0.57)}
    assert document["pareto"] == ["uipe-0.5", "uipe-1", "uipe-2"]
    assert {"name": "uipe-2", "why": "model_utility is 0.4, not >= 0.57"} in document["rejected"]
    nothing = json.loads(run(grid, "--json", "--subject-to", "model_utility>=1*retain").out)
    assert (nothing["chosen"], nothing["alpha"]) == (None, None)
    assert nothing["constraints"][0]["bound"] is None


def test_less_can_be_asked_for(grid: Path) -> None:
    for alpha, value in ((0.0, 0.5), (0.5, 0.4), (1.0, 0.3)):
        results = {"results": {"wmdp": {"acc,none": value}, "mmlu": {"acc,none": 0.6}}}
        score(grid / "scores", f"uipe-{alpha:g}", results, file="results_2026.json")
    arguments = (grid, "--minimize", "wmdp/acc", "--subject-to", "mmlu_acc>=0.9*unlearned")
    assert "→ uipe-1 has the lowest wmdp_acc, 0.3" in run(*arguments).out
    both = run(*arguments, "--maximize", "x")
    assert both.code == 2
    assert "exclude each other" in both.err


def test_a_constraint_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere", "--subject-to", "model_utility=0.9")
    assert result.code == 3
    assert "is not a constraint" in result.err


def test_of_hundreds_of_metrics_those_asked_for_are_shown(grid: Path) -> None:
    many = {f"task{place}": {"acc,none": 0.5} for place in range(100)}
    score(grid / "scores", "uipe-1", {"results": many}, file="results_2026.json")
    result = run(grid, "--subject-to", "task77_acc>=0.1")
    header = result.out.splitlines()[0].split()
    assert header[5:8] == ["forget_quality", "task77_acc", "model_utility"]
    assert "96 more metrics: --json has them" in result.out


def test_control_characters_are_escaped_and_quiet_is_quiet(grid: Path) -> None:
    hostile = "evil\x1b[31m\n[red]\u202e"
    digest = model(grid / "m", 3.0)
    entries = json.loads((grid / "grid.json").read_text())["variants"]
    write_grid(grid, [*entries, {**entry(hostile, "uipe", 3.0, digest), "path": "m"}])
    score(grid / "scores", hostile, {"forget_quality": 0.9, "model_utility": 0.6, "\x1b]0;x": 1})
    score(grid / "scores", "stray\x1b", {"forget_quality": 0.9})
    result = run(grid, "--subject-to", "model_utility>=0.95*unlearned")
    for text in (result.out, result.err):
        assert not any(ord(character) < 32 and character != "\n" for character in text)
        assert "\u202e" not in text
    assert "→ evil\\x1b[31m\\n[red]\\u202e has the highest" in result.out
    assert "stray\\x1b" in result.err
    quiet = run(grid, "-q", "--subject-to", "model_utility>=0.95*unlearned")
    assert (quiet.out, quiet.err) == (result.out, "")
    json.loads(run(grid, "--json").out)


def test_the_picture_is_drawn(grid: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.svg"
    result = run(grid, "--plot", target, "--subject-to", "model_utility>=0.95*unlearned")
    assert result.code == 0
    assert f"trade-off drawn to {target}" in result.err
    assert "chosen: uipe-1" in target.read_text()
    refused = run(tmp_path / "nowhere", "--plot", tmp_path / "t.pdf")
    assert (refused.code, refused.err) == (2, f"{tmp_path}/t.pdf: is neither .png nor .svg")
