"""Without an extra, the command that needs it says which to install, and nothing else changes."""

import tomllib
from pathlib import Path

import pytest
from helpers import assert_refused, run_cli, write_pair

ROOT = Path(__file__).resolve().parent.parent
OURS = "uipe-merge["
# A module is absent where no finder finds it: neither an import nor a look for it may tell.
ABSENT = """\
import os, sys

GONE = set(os.environ["ABSENT"].split())


class WithoutSome:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in GONE else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [WithoutSome(finder) for finder in sys.meta_path]
"""
LIBRARIES = {
    "plot": ["matplotlib", "plotly"],
    "study": ["optuna", "rouge_score", "scipy"],
    "s3": ["s3fs"],
    "gcs": ["gcsfs"],
    "lm-eval": ["lm_eval"],
    "mergekit": ["mergekit"],
    "ray": ["ray"],
}
QUESTIONS = (
    '[{"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c"]}]'
)
GRID = ("grid", "original", "unlearned", "--alphas", "1", "-o", "grid", "-q")
SEARCH = (
    *("search", "original", "unlearned", "--eval", "true {model} {out}", "-o", "best"),
    *("--score", "s.json:q", "--score", "s.json:u", "--maximize", "q", "--subject-to", "u>=0"),
)
# What is missing, the command that needs it, and the extra that has it; of mergekit, which is asked
# for its version, test_mergekit.py.
NEEDS = [
    ("matplotlib", ("inspect", "original", "unlearned", "--plot", "map.png"), "plot"),
    ("plotly", ("inspect", "original", "unlearned", "--plot", "map.html"), "plot"),
    ("matplotlib", ("collect", "grid", "--plot", "trade-off.png"), "plot"),
    ("plotly", ("collect", "grid", "--report", "report.html"), "plot"),
    ("scipy", ("evaluate", "original", "--forget", "q.json", "--retain", "q.json"), "study"),
    ("rouge_score", ("evaluate", "original", "--forget", "q.json", "--retain", "q.json"), "study"),
    ("optuna", (*SEARCH, "--per-layer-groups", "2"), "study"),
    ("s3fs", ("s3://bucket/base", "unlearned", "--alpha", "1", "-o", "out"), "s3"),
    ("s3fs", ("original", "unlearned", "--alpha", "1", "-o", "s3://bucket/out"), "s3"),
    ("s3fs", ("verify", "s3://bucket/out"), "s3"),
    ("gcsfs", ("inspect", "gs://bucket/base", "unlearned"), "gcs"),
    ("gcsfs", ("original", "gs://bucket/new", "--alpha", "1", "-o", "out"), "gcs"),
    ("lm_eval", ("lm-eval", "--model", "uipe", "--tasks", "any"), "lm-eval"),
    ("ray", (*("original", "unlearned", "--alpha", "1", "-o", "out"), "--executor", "ray"), "ray"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extras")
    write_pair(root)
    (root / "q.json").write_text(QUESTIONS)
    (root / "absent").mkdir()
    (root / "absent" / "sitecustomize.py").write_text(ABSENT)
    made = run_cli(*GRID, cwd=root)
    assert made.code == 0, made.err
    return root


def without(root: Path, *libraries: str) -> dict[str, str]:
    """The environment in which these libraries are not installed."""
    path = [str(root / "absent"), str(ROOT)]
    return {"ABSENT": " ".join(libraries), "PYTHONPATH": ":".join(path)}


@pytest.mark.parametrize(("library", "arguments", "extra"), NEEDS)
def test_the_command_says_which_extra_it_needs(
    root: Path, library: str, arguments: tuple[str, ...], extra: str
) -> None:
    before = sorted(root.rglob("*"))
    result = run_cli(*arguments, cwd=root, env=without(root, library))
    assert_refused(result, 2, f"pip install 'uipe-merge[{extra}]'")
    assert result.err.count("\n") == 1
    assert sorted(root.rglob("*")) == before


def test_without_any_extra_the_program_is_whole(root: Path, tmp_path: Path) -> None:
    everything = [library for libraries in LIBRARIES.values() for library in libraries]
    env = without(root, *everything)
    inputs = root / "original", root / "unlearned"
    for arguments in [
        (*inputs, "--alpha", 1, "-o", tmp_path / "out"),
        ("verify", tmp_path / "out"),
        ("inspect", *inputs),
        ("grid", *inputs, "--alphas", "1,2", "-o", tmp_path / "grid"),
        ("collect", tmp_path / "grid"),
        ("--help",),
    ]:
        result = run_cli(*arguments, cwd=root, env=env)
        assert result.code == 0, result.err


def test_the_list_of_extras_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    [line] = extras["all"]
    named = line.removeprefix(OURS).removesuffix("]").split(",")
    assert sorted(named) == sorted(extras.keys() - {"all", "dev", "docs"})
    assert {extra for _, _, extra in NEEDS} <= set(named)
