"""α per tensor: rules, layers, gradients; through the command line and by the function."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import refuse_merge
from helpers import CONFIG, bits, read_tensors, run_cli, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_merged, mixed_pair

from uipe_merge.coefficients import interpolated, resolve
from uipe_merge.errors import RecipeError
from uipe_merge.recipe import Recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = 5
NAMES = [
    EMBEDDING,
    *(
        f"model.layers.{layer}.{kind}.weight"
        for layer in range(LAYERS)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    ),
    "model.norm.weight",
    HEAD,
]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    one, two = mixed_pair(torch.bfloat16, torch.bfloat16, (len(NAMES), 6, 8), seed=4)
    original, unlearned = (
        {name: side[number].clone() for number, name in enumerate(NAMES)} for side in (one, two)
    )
    write_checkpoint(tmp_path / "original", original, shards=2)
    write_checkpoint(tmp_path / "unlearned", unlearned, shards=2)
    return tmp_path, original, unlearned


def check(root: Path, original: Tensors, unlearned: Tensors, wanted: dict[str, float]) -> None:
    """Hold an output against the reference, each tensor with its own α."""
    manifest = json.loads((root / "out" / "uipe_merge.json").read_text())
    merged = read_tensors(root / "out")
    for name in NAMES:
        assert manifest["tensors"][name]["alpha"] == pytest.approx(wanted[name])
        alpha = manifest["tensors"][name]["alpha"]
        assert_merged(merged[name], original[name], unlearned[name], alpha)


def merge(root: Path, *options: object) -> None:
    command = (root / "original", root / "unlearned", "-o", root / "out", *options)
    result = run_cli(*command)
    assert result.code == 0, result
    manifest = json.loads((root / "out" / "uipe_merge.json").read_text())
    again = f"uipe-merge {root / 'original'} {root / 'unlearned'} --alpha"
    assert manifest["command"].startswith(again)


def test_the_first_rule_that_matches_decides(models: tuple[Path, Tensors, Tensors]) -> None:
    root, original, unlearned = models
    rules = ("--alpha-rule", "model.layers.[01].mlp*=3", "--alpha-rule", "*.mlp.*=-0.5")
    zero = ("--alpha-rule", "lm_head*=0", "--alpha-rule", "*norm*=-1")
    merge(root, "--alpha", 2, *rules, *zero)
    wanted = {
        name: 3.0
        if ".mlp" in name and name.split(".")[2] in "01"
        else -0.5
        if ".mlp" in name
        else 0.0
        if name == HEAD
        else -1.0
        if "norm" in name
        else 2.0
        for name in NAMES
    }
    check(root, original, unlearned, wanted)
    merged = read_tensors(root / "out")
    assert np.array_equal(bits(merged[HEAD]), bits(unlearned[HEAD]))
    assert np.array_equal(bits(merged["model.norm.weight"]), bits(original["model.norm.weight"]))
    manifest = json.loads((root / "out" / "uipe_merge.json").read_text())
    assert manifest["summary"]["alpha_spread"] == [-1.0, 3.0]
    steps = updates = along = errors = 0.0
    for name in NAMES:
        if wanted[name] in (0.0, -1.0):
            continue
        one, two, out = (side[name].double() for side in (original, unlearned, merged))
        update, moved = two - one, out - two
        steps += float((wanted[name] * update).square().sum())
        updates += float(update.square().sum())
        along += float((moved * update).sum())
        errors += float((moved - wanted[name] * update).square().sum())
    mean = sum(
        wanted[name] * float((unlearned[name].double() - original[name].double()).square().sum())
        for name in NAMES
        if wanted[name] not in (0.0, -1.0)
    )
    assert manifest["summary"]["alpha"] == pytest.approx(mean / updates, rel=1e-5)
    assert manifest["summary"]["effective_alpha"] == pytest.approx(along / updates, rel=1e-5)
    assert manifest["summary"]["rounding_error"] == pytest.approx((errors / steps) ** 0.5, rel=1e-3)


def test_layers_are_linear_between_and_everything_else_takes_alpha(
    models: tuple[Path, Tensors, Tensors],
) -> None:
    root, original, unlearned = models
    merge(root, "--alpha", 0.5, "--alpha-layers", "1=0,3=2")
    by_layer = [0.0, 0.0, 1.0, 2.0, 2.0]
    wanted = {
        name: by_layer[int(name.split(".")[2])] if ".layers." in name else 0.5 for name in NAMES
    }
    check(root, original, unlearned, wanted)


def test_a_gradient_is_spread_from_the_first_layer_to_the_last(
    models: tuple[Path, Tensors, Tensors],
) -> None:
    root, original, unlearned = models
    merge(root, "--alpha", 0.5, "--alpha-gradient", "0,2,1", "--alpha-rule", "*.3.mlp*=7")
    by_layer = [0.0, 1.0, 2.0, 1.5, 1.0]
    wanted = {
        name: by_layer[int(name.split(".")[2])] if ".layers." in name else 0.5 for name in NAMES
    }
    check(root, original, unlearned, wanted | {"model.layers.3.mlp.up_proj.weight": 7.0})


def test_one_tensor_alone_comes_out_as_in_the_model(models: tuple[Path, Tensors, Tensors]) -> None:
    root, original, unlearned = models
    merge(root, "--alpha", 0.3, "--alpha-rule", "*mlp*=1.7")
    name = NAMES[2]
    write_checkpoint(root / "one" / "original", {name: original[name]})
    write_checkpoint(root / "one" / "unlearned", {name: unlearned[name]})
    merge(root / "one", "--alpha", 1.7)
    alone = read_tensors(root / "one" / "out")[name]
    assert np.array_equal(bits(alone), bits(read_tensors(root / "out")[name]))


def test_a_dry_run_says_how_many_tensors_get_which_alpha(
    models: tuple[Path, Tensors, Tensors],
) -> None:
    root, _, _ = models
    command = (root / "original", root / "unlearned", "-o", root / "out", "--dry-run")
    rule = ("--alpha", 2, "--alpha-rule", "*.mlp.*=3")
    result = run_cli(*command, *rule)
    assert "2 for 8, 3 for 5" in result.out
    found = json.loads(run_cli(*command, *rule, "--json").out)["alphas"]
    assert {entry["alpha"]: entry["tensors"] for entry in found} == {2.0: 8, 3.0: 5}


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--alpha-rule", "model.layer.*.mlp*=3"), ("matches no tensor", "layers.*.mlp.up_proj")),
        (("--alpha-rule", "zzz=3"), ("matches no tensor", "none")),
        (("--alpha-rule", "*=1", "--alpha-rule", "lm_head*=0"), ("'lm_head*=0' comes too late",)),
        (("--alpha-rule", "lm_head"), ("'lm_head' is not PATTERN=ALPHA",)),
        (("--alpha-rule", "=2"), ("is not PATTERN=ALPHA",)),
        (("--alpha-rule", "lm_head*=x"), ("is not PATTERN=ALPHA",)),
        (("--alpha-rule", "lm_head*=1_0"), ("is not PATTERN=ALPHA",)),
        (("--alpha-layers", "1_0=2"), ("is not LAYER=ALPHA",)),
        (("--alpha-layers", "٣=1"), ("is not LAYER=ALPHA",)),
        (("--alpha-layers", " 1=1"), ("is not LAYER=ALPHA",)),
        (("--alpha-rule", "lm_head*=nan"), ("alpha is nan",)),
        (("--alpha-layers", "0=0,9=2"), ("layer 9", "the layers are 0 to 4")),
        (("--alpha-layers", "3=0,1=2"), ("not in order",)),
        (("--alpha-layers", "1=0,1=2"), ("not in order",)),
        (("--alpha-layers", "-1=0"), ("not in order",)),
        (("--alpha-layers", "0:0"), ("is not LAYER=ALPHA",)),
        (("--alpha-layers", "0=inf"), ("alpha is inf",)),
        (("--alpha-gradient", "0,,1"), ("is not ALPHA,ALPHA",)),
        (("--alpha-gradient", "0,1", "--alpha-layers", "0=1"), ("both layers and a gradient",)),
    ],
    ids=str,
)
def test_what_matches_nothing_or_makes_no_sense_is_refused(
    models: tuple[Path, Tensors, Tensors], options: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    refuse_merge(models[0], 3, *fragments, extra=options)


def test_an_alpha_that_leaves_nothing_is_refused_in_a_rule_too(
    models: tuple[Path, Tensors, Tensors],
) -> None:
    refuse_merge(models[0], 7, "so large", extra=("--alpha-rule", "lm_head*=1e30"))


def test_layers_that_names_do_not_tell_are_refused(tmp_path: Path) -> None:
    for side in ("original", "unlearned"):
        write_checkpoint(tmp_path / side, {"a": torch.ones(2), "b": torch.ones(2)})
    extra = ("--alpha-layers", "0=1")
    refuse_merge(tmp_path, 3, "no tensor's name tells its layer", extra=extra)


def test_several_stacks_of_layers_are_refused(tmp_path: Path) -> None:
    names = ["vision.layers.0.a", "text.layers.0.a", "text.layers.1.a"]
    for side in ("original", "unlearned"):
        write_checkpoint(tmp_path / side, {name: torch.ones(2) for name in names})
    extra = ("--alpha-gradient", "0,1")
    refuse_merge(tmp_path, 3, "several stacks", "text.layers.", "vision.layers.", extra=extra)
    assert (
        run_cli(
            tmp_path / "original",
            tmp_path / "unlearned",
            *("--alpha", 1, "--alpha-rule", "text.*=2", "-o", tmp_path / "out"),
        ).code
        == 0
    )


def test_two_alphas_for_one_tied_parameter_are_refused(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    for side in ("original", "unlearned"):
        tensors = {EMBEDDING: torch.ones(4, 2), HEAD: torch.ones(4, 2)}
        write_checkpoint(tmp_path / side, tensors, config=tied)
    extra = ("--alpha-rule", "lm_head*=0")
    refuse_merge(tmp_path, 3, HEAD, EMBEDDING, "are tied", extra=extra)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(-9, 9)), min_size=1, max_size=6))
def test_the_schedule_is_what_numpy_interpolates(knots: list[tuple[int, float]]) -> None:
    points = sorted(dict(knots).items())
    for at in range(45):
        wanted = np.interp(at, [x for x, _ in points], [y for _, y in points])
        assert interpolated(points, at) == pytest.approx(float(wanted), abs=1e-12)


def test_a_rule_that_copies_everything_is_what_the_card_says(
    models: tuple[Path, Tensors, Tensors],
) -> None:
    root, _, unlearned = models
    merge(root, "--alpha", 2, "--alpha-rule", "*=0")
    assert "extrapolated with α = 0\n" in (root / "out" / "README.md").read_text()
    for name, tensor in read_tensors(root / "out").items():
        assert np.array_equal(bits(tensor), bits(unlearned[name]))


def test_nothing_but_the_catch_all_is_one_alpha() -> None:
    assert set(resolve(Recipe(2.0), NAMES).values()) == {2.0}
    assert resolve(Recipe(2.0), []) == {}
    with pytest.raises(RecipeError):
        resolve(Recipe(2.0, rules=(("x", 1.0),)), [])
