"""Recipes in files, group L of the hazards: read strictly, refused in one line."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from cli_tools import refuse_merge
from helpers import assert_refused, contents, run_cli, write_pair
from hypothesis import given
from hypothesis import strategies as st

import uipe_merge
from uipe_merge.errors import UipeMergeError
from uipe_merge.recipe import Recipe
from uipe_merge.recipe_file import read_recipe, write_recipe

YAML = """\
alpha: 2
alpha_rules:
  - {match: '*.mlp.*', alpha: 3}
  - {match: 'lm_head*', alpha: 0}
alpha_layers: {0: 0, 16: 2.5}
dtype: float32
max_shard_size: 5GB
on_mismatch: common-rows
"""
TOML = """\
alpha = 2
dtype = "float32"
max_shard_size = "5GB"
on_mismatch = "common-rows"
alpha_rules = [{match = "*.mlp.*", alpha = 3}, {match = "lm_head*", alpha = 0}]
[alpha_layers]
0 = 0
16 = 2.5
"""
WHOLE = Recipe(
    2.0,
    "float32",
    5_000_000_000,
    "common-rows",
    (("*.mlp.*", 3.0), ("lm_head*", 0.0)),
    ((0, 0.0), (16, 2.5)),
)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    document = yaml.safe_load(YAML)
    document["alpha_layers"] = {"0": 0, "16": 2.5}
    for name, text in (("r.yaml", YAML), ("r.toml", TOML), ("r.json", json.dumps(document))):
        assert read_recipe(write(tmp_path / name, text)) == WHOLE, name


alphas = st.floats(-100, 100)


@given(
    st.builds(
        Recipe,
        alpha=alphas,
        dtype=st.sampled_from(["auto", "bfloat16"]),
        max_shard_bytes=st.none() | st.integers(1, 10**12),
        on_mismatch=st.sampled_from(["error", "common-rows"]),
        rules=st.lists(st.tuples(st.text(min_size=1, max_size=9), alphas), max_size=3).map(tuple),
        gradient=st.lists(alphas, max_size=4).map(tuple),
        form=st.just("model"),
    )
)
def test_what_is_written_is_read_back_equal(recipe: Recipe) -> None:
    import tempfile

    text = write_recipe(recipe)
    with tempfile.TemporaryDirectory() as directory:
        assert read_recipe(write(Path(directory) / "r.yaml", text)) == recipe


def test_print_recipe_gives_a_file_that_merges_to_the_same(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    options = ("--alpha", 0.7, "--alpha-rule", "*norm*=2", "--dtype", "float32")
    command = (original, unlearned, "-o", tmp_path / "out")
    printed = run_cli(*command, *options, "--print-recipe")
    assert printed.code == 0
    assert not (tmp_path / "out").exists()
    recipe = write(tmp_path / "recipe.yaml", printed.out)
    assert run_cli(*command, *options).code == 0
    first = contents(tmp_path / "out")
    assert run_cli(*command, "--recipe", recipe, "--overwrite").code == 0
    assert contents(tmp_path / "out") == first


def test_the_same_from_python(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    recipe = write(tmp_path / "r.toml", 'alpha = 1\nalpha_rules = [{match="*norm*", alpha=2}]')
    one = uipe_merge.merge(original, unlearned, tmp_path / "a", recipe=recipe, progress=False)
    two = uipe_merge.merge(
        original, unlearned, tmp_path / "b", alpha=1, alpha_rules={"*norm*": 2}, progress=False
    )
    assert one.tensors == two.tensors
    assert one.summary.spread == (1.0, 2.0)


def refused(
    root: Path, code: int, text: str | bytes, *fragments: str, ending: str = "yaml"
) -> None:
    write_pair(root)
    recipe = write(root / f"r.{ending}", text)
    command = (root / "original", root / "unlearned", "-o", root / "out", "--recipe", recipe)
    result = run_cli(*command)
    assert result.code == code, result
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for fragment in (str(recipe), *fragments):
        assert fragment in result.err
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "not a mapping"),
        ("- alpha", "not a mapping"),
        ("dtype: auto", "has no alpha"),
        ("alpha: two", "'two', not a number"),
        ("alpha: true", "not a number"),
        ("alpha: null", "not a number"),
        ("alpha: .inf", "alpha is inf"),
        ("alpha: .nan", "alpha is nan"),
        ("alpha: 1\nalpha: 2", "'alpha' twice"),
        ("alpha: 010", "'010' is not written as a plain number"),
        ("alpha: 1:30", "not written as a plain number"),
        ("alpha: 1_000", "not written as a plain number"),
        ("alpha: 0x10", "not written as a plain number"),
        ("alpha: 1" + ":00" * 200 + ".0", "not written as a plain number"),
        ("alpha: 1" + ":0" * 200_000, "not written as a plain number"),
        ("alpha: 1\nalpha_layers: {010: 1}", "not written as a plain number"),
        ("alpha: 1\nseed: 1.5", "seed is 1.5, not a whole number"),
        ("alpha: 1\nseed: 99999999999999999999", "no number of 64 bits"),
        ("alpha: 1\nmax_shard_size: null", "max_shard_size is None, not a text"),
        ("alpha: 1\nalfa: 2", "did you mean alpha?"),
        ("alpha: 1\nzzzzzz: 2", "known are alpha"),
        ("alpha: 1\nalpha_rules: {a: 1}", "not a list"),
        ("alpha: 1\nalpha_rules: [a]", "rule 1 is not a mapping"),
        ("alpha: 1\nalpha_rules: [{match: a}]", "rule 1 has not just match and alpha"),
        ("alpha: 1\nalpha_rules: [{match: 1, alpha: 2}]", "match of rule 1 is 1, not a text"),
        ("alpha: 1\nalpha_rules: [{match: a, match: b, alpha: 2}]", "'match' twice"),
        ("alpha: 1\nalpha_layers: [1]", "not a mapping"),
        ("alpha: 1\nalpha_layers: {a: 1}", "not the number of a layer"),
        ("alpha: 1\nalpha_layers: {1.5: 1}", "not the number of a layer"),
        ("alpha: 1\ngradient: 3", "not a list"),
        ("a: &x 1\nalpha: *x", "anchor or an alias"),
        ("alpha: &x [*x]", "anchor or an alias"),
        ("alpha: !!python/object/apply:os.system ['touch canary']", "uses the tag"),
        ("alpha: !!float 2", "uses the tag"),
        ("alpha: [", "malformed"),
        ("? {a: 1}\n: 2", "no text and no number"),
        ("alpha: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("alpha: " + "9" * 5000, "malformed"),
        ("alpha: " + "9" * 400, "no number that a float holds"),
        (b"alpha: \xff", "malformed"),
        ("# " + "x" * 1_000_001 + "\nalpha: 1", "more than a recipe may have"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_yaml_that_is_no_recipe(tmp_path: Path, text: str | bytes, fragment: str) -> None:
    refused(tmp_path, 3, text, fragment)
    assert not (tmp_path / "canary").exists()
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("ending", "text", "fragment"),
    [
        ("json", '{"alpha": NaN}', "alpha is nan"),
        ("json", '{"alpha": 1, "alpha": 2}', "'alpha' twice"),
        ("json", "[" * 100_000, "nested too deeply"),
        ("json", '{"alpha": ' + "9" * 5000 + "}", "malformed"),
        ("json", "{", "malformed"),
        ("toml", "alpha = 1\nseed = 0x" + "f" * 4000, "no number of 64 bits"),
        ("toml", "alpha = 1\nalpha = 2", "malformed"),
        ("toml", "alpha = nan", "alpha is nan"),
        ("toml", "a = " + "[" * 5000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_json_or_toml_that_is_no_recipe(
    tmp_path: Path, ending: str, text: str, fragment: str
) -> None:
    refused(tmp_path, 3, text, fragment, ending=ending)


def test_a_recipe_by_another_name_is_a_usage_error(tmp_path: Path) -> None:
    refused(tmp_path, 2, "alpha: 1", "no recipe by its name", ending="txt")


def test_a_shard_size_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    command = (original, unlearned, "-o", tmp_path / "out", "--recipe")
    for number, size in enumerate(("0", "-5", "0x" + "f" * 4000)):
        recipe = write(tmp_path / f"r{number}.toml", f"alpha = 1\nmax_shard_size = {size}")
        assert_refused(run_cli(*command, recipe), 2, "holds nothing, or is no size of a file")


def test_an_alpha_that_leaves_nothing_is_a_numeric_error(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    recipe = write(tmp_path / "r.yaml", "alpha: 1.0e+30")
    result = run_cli(original, unlearned, "-o", tmp_path / "out", "--recipe", recipe)
    assert_refused(result, 7, "so large")


def test_recipe_and_alpha_exclude_one_another(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    recipe = write(tmp_path / "r.yaml", "alpha: 1")
    for extra in (("--recipe", recipe), ("--recipe", tmp_path / "none.yaml")):
        refuse_merge(tmp_path, 2, "a recipe says all of it", extra=extra)
    command = (original, unlearned, "-o", tmp_path / "out")
    assert "no alpha" in run_cli(*command).err
    missing = run_cli(*command, "--recipe", tmp_path / "none.yaml")
    assert (missing.code, "no such file" in missing.err) == (2, True)


@given(st.binary(max_size=200), st.sampled_from([".yaml", ".toml", ".json"]))
def test_no_bytes_are_worse_than_an_error(raw: bytes, ending: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory) / f"r{ending}", raw)
        with suppress(UipeMergeError):
            read_recipe(path)
