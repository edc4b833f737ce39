"""Recipes in files, group L of the hazards: read strictly, refused in one line."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from cli_tools import refuse_merge
from helpers import (
    assert_refused,
    contents,
    moved,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
    write_pair,
)
from hypothesis import given
from hypothesis import strategies as st

import uipe_merge
from uipe_merge.errors import UipeMergeError
from uipe_merge.recipe import Recipe
from uipe_merge.recipe_file import read_recipe, write_recipe
from uipe_merge.steering import CONTROLS, GRANULARITIES, ORIGINAL_ITSELF, Steering, Update

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
names = st.text(max_size=9).filter(lambda text: "\0" not in text and text != "original")
updates = st.builds(Update, names.filter(bool), names)


@st.composite
def steerings(draw: st.DrawFn) -> Steering:
    """Every steering that there can be."""
    fields: dict[str, object] = {
        "along": tuple(draw(st.lists(updates, max_size=3))),
        "away_from": draw(st.none() | updates | st.just(ORIGINAL_ITSELF)),
        "control": draw(st.sampled_from(CONTROLS)),
        "add": tuple(draw(st.lists(st.tuples(updates, alphas), max_size=3))),
    }
    if fields["along"]:
        fields["min_cos"] = draw(st.floats(-1, 1))
        fields["max_alpha"] = draw(st.floats(0, 1e9))
    if fields["away_from"]:
        fields["always"] = draw(st.booleans())
    if (part := draw(st.sampled_from(["", "rank", "energy"]))) != "":
        share = st.floats(0, 1, exclude_min=True)
        fields[part] = draw(st.integers(1, 10**6) if part == "rank" else share)
        fields["rank_all"] = draw(st.booleans())
    if fields["along"] or fields["away_from"] or fields["control"] != "none":
        fields["granularity"] = draw(st.sampled_from(GRANULARITIES))
    return Steering(**fields)  # type: ignore[arg-type]


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
        rounding=st.sampled_from(["nearest", "stochastic"]),
        seed=st.integers(-(2**63), 2**64 - 1),
        steering=steerings(),
    )
)
def test_what_is_written_is_read_back_equal(recipe: Recipe) -> None:
    import tempfile

    document = yaml.safe_load(text := write_recipe(recipe))
    with tempfile.TemporaryDirectory() as directory:
        for ending, content in (
            ("yaml", text),
            ("json", json.dumps(document)),
            ("toml", "".join(f"{key} = {as_toml(value)}\n" for key, value in document.items())),
        ):
            read = read_recipe(write(Path(directory) / f"r.{ending}", content))
            assert read == recipe, ending
            assert read.canonical() == recipe.canonical(), ending


def as_toml(value: object) -> str:
    """A value of a recipe as TOML writes it."""
    if isinstance(value, dict):
        pairs = (f"{as_toml(str(key))} = {as_toml(each)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


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


STEERED = """\
alpha: 0.7
along: [{new: related}, {new: related, old: unlearned}, "related", "related@@unlearned"]
min_cos: -1
max_alpha: 3
away_from: {new: related, old: unlearned}
always: true
energy: 0.5
rank_all: true
control: random
granularity: model
add: [{new: related, beta: 0.5}, {new: related, old: unlearned, beta: -1}]
seed: 9
"""


def test_a_recipe_says_all_that_the_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path)
    write_checkpoint(tmp_path / "related", moved(read_tensors(tmp_path / "unlearned"), seed=3))
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path / "r.yaml", STEERED)
    related, difference = Update("related"), Update("related", "unlearned")
    assert read_recipe(recipe).steering == Steering(
        along=(related, difference, related, difference),
        min_cos=-1,
        max_alpha=3,
        away_from=difference,
        always=True,
        energy=0.5,
        rank_all=True,
        control="random",
        granularity="model",
        add=((related, 0.5), (difference, -1)),
    )
    command = ("original", "unlearned", "-o", "out")
    options = [
        *("--alpha", 0.7, "--along", "related", "--along", "related@@unlearned"),
        *("--along", "related", "--along", "related@@unlearned", "--min-cos", -1),
        *("--max-alpha", 3, "--away-from", "related@@unlearned", "--always", "--energy", 0.5),
        *("--rank-all", "--control", "random", "--granularity", "model"),
        *("--add", "related=0.5", "--add", "related@@unlearned=-1", "--seed", 9),
    ]
    assert run_here(*command, "--recipe", recipe).code == 0
    by_recipe = contents(tmp_path / "out")
    printed = run_here(*command, *options, "--print-recipe")
    assert printed.code == 0
    again = write(tmp_path / "again.yaml", printed.out)
    assert read_recipe(again) == read_recipe(recipe)
    assert run_here(*command, *options, "--overwrite").code == 0
    assert contents(tmp_path / "out") == by_recipe
    assert run_here(*command, "--recipe", again, "--overwrite").code == 0
    assert contents(tmp_path / "out") == by_recipe


ODD_NAMES = [
    *("with space", "a,b", "x=1", "y@@z", "it's", '"q"', "[bold]", "-dash", "#hash", "a: b", "*x"),
    *(
        "ünï",
        "名前",
        "yes",
        "1.5",
        "null",
        "~",
        "back\\slash",
        "tab\there",
        "line\nbreak",
        " blank ",
    ),
    "long " * 30,
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_recipe_that_was_printed_names_the_same_checkpoints(tmp_path: Path, name: str) -> None:
    command = ("original", "unlearned", "-o", "out", "--alpha", 1, "--print-recipe")
    options = ("--along", name, "--away-from", f"x@@{name}", "--add", f"{name}=0.5")
    printed = run_here(*command, *options)
    assert (printed.code, printed.err) == (0, "")
    steering = read_recipe(write(tmp_path / "r.yaml", printed.out)).steering
    new, _, old = name.rpartition("@@")
    update = Update(new, old) if new else Update(name)
    assert steering.along == (update,)
    assert steering.away_from == Update(*f"x@@{name}".rsplit("@@", 1))
    assert steering.add == ((update, 0.5),)


def test_the_original_itself_and_a_directory_of_that_name(tmp_path: Path) -> None:
    def protected(text: str) -> object:
        return read_recipe(
            write(tmp_path / "r.yaml", f"alpha: 1\naway_from: {text}")
        ).steering.away_from

    assert protected("original") == ORIGINAL_ITSELF
    assert protected("./original") == Update("./original") != ORIGINAL_ITSELF
    assert protected("{new: a, old: original}") == Update("a", "original")


def test_alpha_may_be_left_out_along_related_updates(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path / "r.yaml", "along: [{new: a}]")).alpha == 1
    for text in ("add: [{new: a, beta: 1}]", "away_from: original", "along: []"):
        refused(tmp_path, 3, text, "has no alpha")


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
    result = run_here(*command)
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
        ("alpha: 1\nalong: related", "along is not a list"),
        ("alpha: 1\nalong: {new: a}", "along is not a list"),
        ("alpha: 1\nalong: [1]", "update 1 of along is not a mapping"),
        ("alpha: 1\nalong: [null]", "update 1 of along is not a mapping"),
        ("alpha: 1\nalong: [{new: a}, {}]", "update 2 of along has not just new and old"),
        ("alpha: 1\nalong: [{old: a}]", "has not just new and old"),
        ("alpha: 1\nalong: [{new: a, beta: 1}]", "has not just new and old"),
        ("alpha: 1\nalong: [{new: a, older: b}]", "has not just new and old"),
        ("alpha: 1\nalong: [{new: 1}]", "new of update 1 of along is 1, not a text"),
        ("alpha: 1\nalong: [{new: a, old: null}]", "old of update 1 of along is None"),
        ("alpha: 1\nalong: [{new: ''}]", "new of update 1 of along is empty"),
        ("alpha: 1\nalong: ['']", "is not NEW or NEW@@OLD"),
        ("alpha: 1\nalong: ['@@a']", "is not NEW or NEW@@OLD"),
        ("alpha: 1\nalong: [original]", "./original"),
        ("alpha: 1\naway_from: [a]", "away_from is not a mapping"),
        ("alpha: 1\naway_from: 1", "away_from is not a mapping"),
        ("alpha: 1\naway_from: ''", "is not NEW or NEW@@OLD"),
        ("alpha: 1\naway_from: {old: a}", "away_from has not just new and old"),
        ("alpha: 1\naway_from: original\nalways: 1", "always is 1, neither true nor false"),
        ("alpha: 1\nrank: 2\nrank_all: 'yes'", "rank_all is 'yes', neither true nor false"),
        ("alpha: 1\nrank: 2.0", "rank is 2.0, not a whole number"),
        ("alpha: 1\nrank: true", "rank is True, not a whole number"),
        ("alpha: 1\nrank: 0", "rank is 0"),
        ("alpha: 1\nenergy: much", "energy is 'much', not a number"),
        ("alpha: 1\nenergy: true", "energy is True, not a number"),
        ("alpha: 1\nenergy: 0", "energy is 0"),
        ("alpha: 1\nenergy: .nan", "energy is nan"),
        ("along: [{new: a}]\nmin_cos: small", "min_cos is 'small', not a number"),
        ("along: [{new: a}]\nmin_cos: .nan", "min-cos is nan"),
        ("along: [{new: a}]\nmax_alpha: .inf", "max-alpha is inf"),
        ("along: [{new: a}]\nmax_alpha: null", "max_alpha is None, not a number"),
        ("alpha: 1\ncontrol: 1", "control is 1, not a text"),
        ("alpha: 1\ngranularity: [model]", "not a text"),
        ("alpha: 1\nadd: {new: a, beta: 1}", "add is not a list"),
        ("alpha: 1\nadd: ['a=1']", "update 1 of add is not a mapping"),
        ("alpha: 1\nadd: [{new: a}]", "beta of update 1 is None, not a number"),
        ("alpha: 1\nadd: [{new: a, beta: 1}, {beta: 1}]", "update 2 of add has not just new"),
        ("alpha: 1\nadd: [{new: a, beta: x}]", "beta of update 1 is 'x', not a number"),
        ("alpha: 1\nadd: [{new: a, beta: .nan}]", "the coefficient of 'a' is nan"),
        ("alpha: 1\nadd: [{new: a, beta: 1, gamma: 2}]", "has not just new and old"),
        ("alpha: 1\nadd: [{new: a, beta: 1, beta: 2}]", "'beta' twice"),
        ("alpha: 1\nalnog: [{new: a}]", "did you mean along?"),
        ("alpha: 1\nmin-cos: 0.5", "did you mean min_cos?"),
        ("alpha: 1\nranks: 2", "did you mean rank?"),
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


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("alpha: 1\nrank: 2\nenergy: 0.5", "both a rank and an energy"),
        ("alpha: 1\nalways: true", "--away-from"),
        ("alpha: 1\nrank_all: true", "--rank or --energy"),
        ("alpha: 1\nmin_cos: 0.5", "--along"),
        ("alpha: 1\nmax_alpha: 0.5", "--along"),
        ("alpha: 1\ngranularity: model", "--along"),
        ("alpha: 1\ncontrol: up", "unknown control 'up'"),
        ("alpha: 1\ncontrol: random\ngranularity: block", "unknown granularity 'block'"),
        ("alpha: 1\nas: adapter\nrank: 2", "--as model"),
    ],
)
def test_a_recipe_whose_parts_exclude_one_another(tmp_path: Path, text: str, fragment: str) -> None:
    original, unlearned = write_pair(tmp_path)
    recipe = write(tmp_path / "r.yaml", text)
    result = run_here(original, unlearned, "-o", tmp_path / "out", "--recipe", recipe)
    assert_refused(result, 2, fragment)
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    command = (original, unlearned, "-o", tmp_path / "out", "--recipe")
    for number, text in enumerate(
        [
            r'along: ["a\0b"]',
            r'along: ["a\0b@@c"]',
            r'along: [{new: "a\0b"}]',
            r'{alpha: 1, add: [{new: a, old: "\0", beta: 1}]}',
        ]
    ):
        recipe = write(tmp_path / f"r{number}.yaml", text)
        result = run_here(*command, recipe)
        assert result.code in (2, 3), result
        assert result.err.count("\n") == 1, result.err


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
