"""What must hold of steered merges whatever the numbers are, and on average by chance."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import CONFIG, bits, read_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import doubles, dtype_id, spacing
from steering_reference import Array, Asked, Model, make

import uipe_merge
from uipe_merge import ORIGINAL_ITSELF, Steering, Update

Tensors = dict[str, torch.Tensor]

MODELS = ("original", "unlearned", "related", "protected")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GRANULARITIES: tuple[Any, ...] = ("tensor", "layer", "model")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

few = settings(max_examples=8, deadline=None)


class Drawn(NamedTuple):
    """What a property is tried with."""

    seed: int
    dtype: torch.dtype
    width: int
    ratio: float
    alpha: float
    granularity: Any


drawn = st.builds(
    Drawn,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    width=st.integers(1, 9),
    ratio=st.sampled_from([0.01, 0.3, 1.0]),
    alpha=st.floats(-3, 3).filter(lambda alpha: abs(alpha) > 0.01 and abs(alpha + 1) > 0.01),
    granularity=st.sampled_from(GRANULARITIES),
)
measurable = drawn.map(lambda one: one._replace(dtype=torch.float32, ratio=1.0))
"""Where rounding of the output hides nothing of a step."""


class Place:
    """A directory that every example writes its models to anew."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tensors: dict[str, Tensors] = {}

    def write(self, one: Drawn) -> None:
        """Write models whose updates are Gaussian, of a given size, and nothing to one another."""
        rng = np.random.default_rng(one.seed)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (7, one.width)}
        for layer in range(3):
            shapes |= {
                f"model.layers.{layer}.up_proj.weight": (11, one.width),
                f"model.layers.{layer}.experts.down_proj": (2, one.width, 5),
                f"model.layers.{layer}.norm.weight": (one.width,),
            }
        shapes |= {"model.norm.weight": (one.width,), HEAD: (7, one.width)}
        theta = {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
        for number, name in enumerate(MODELS):
            size = 0.1 * one.ratio * (number > 0)
            self.tensors[name] = {
                key: torch.from_numpy(at + rng.normal(0, 1, at.shape) * size).to(one.dtype)
                for key, at in theta.items()
            }
            shutil.rmtree(self.root / name, ignore_errors=True)
            write_checkpoint(self.root / name, self.tensors[name], shards=1 + number % 3)

    def doubles(self, name: str) -> Model:
        """A model in float64."""
        return {key: doubles(at).reshape(at.shape) for key, at in self.tensors[name].items()}

    def update(self, new: str, old: str = "") -> Update:
        return Update(str(self.root / new), old and str(self.root / old))

    def merge(self, out: str, **options: Any) -> tuple[Tensors, dict[str, Any]]:
        """Merge, and return the output and its manifest."""
        uipe_merge.merge(
            self.root / "original",
            self.root / "unlearned",
            self.root / out,
            overwrite=True,
            progress=False,
            **options,
        )
        manifest = json.loads((self.root / out / "uipe_merge.json").read_text())
        return read_tensors(self.root / out), manifest

    def moved(self, merged: Tensors) -> Model:
        """θ_out − θᵤ."""
        new = self.doubles("unlearned")
        return {key: doubles(at).reshape(at.shape) - new[key] for key, at in merged.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def assert_same(one: Tensors, two: Tensors) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert np.array_equal(bits(one[name]), bits(two[name])), name


def groups_of(names: Any, granularity: str) -> dict[str, list[str]]:
    """The groups, by their names in the manifest."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer = name[: len("model.layers.0")] if ".layers." in name else name
        key = {"tensor": name, "layer": layer, "model": "model"}[granularity]
        found.setdefault(key, []).append(name)
    return found


def flat(model: Model, names: list[str]) -> Array:
    return np.concatenate([model[name].reshape(-1) for name in names])


@few
@given(drawn)
def test_along_the_update_itself_is_the_plain_step(place: Place, one: Drawn) -> None:
    place.write(one)
    shutil.rmtree(place.root / "copy", ignore_errors=True)
    shutil.copytree(place.root / "unlearned", place.root / "copy")
    plain, _ = place.merge("plain", alpha=1)
    for name in ("unlearned", "copy"):
        steering = Steering(along=(place.update(name),), granularity=one.granularity)
        found, manifest = place.merge("out", steering=steering)
        assert_same(found, plain)
        for group in manifest["groups"].values():
            moved = group["norm"] > 0
            assert group["kappa"] == float(moved)
            assert group["cosines"] == [pytest.approx(1, abs=1e-12) if moved else None]
        assert {group["alpha"] for group in manifest["groups"].values()} <= {0.0, 1.0}


@few
@given(measurable, st.sampled_from(["related", "protected@unlearned", "original"]))
def test_an_orthogonal_step_is_orthogonal(place: Place, one: Drawn, protected: str) -> None:
    place.write(one)
    new, _, old = protected.partition("@")
    away = ORIGINAL_ITSELF if protected == "original" else place.update(new, old)
    steering = Steering(away_from=away, always=protected != "original", granularity=one.granularity)
    merged, manifest = place.merge("out", alpha=one.alpha, dtype="float32", steering=steering)
    step, values = place.moved(merged), place.doubles("unlearned")
    r = place.doubles(new)
    if protected != "original":
        base = place.doubles(old or "original")
        r = {name: r[name] - base[name] for name in r}
    groups = groups_of(step, one.granularity)
    assert manifest["groups"].keys() == groups.keys()
    for names in groups.values():
        s, across = flat(step, names), flat(r, names)
        length = float(np.linalg.norm(across))
        # Each element of the output is rounded once, by at most half an ulp.
        lost = 2.0**-24 * float(np.linalg.norm(flat(values, names) + s)) * length
        assert abs(s @ across) <= 1e-6 * float(np.linalg.norm(s)) * length + lost
    alone = all(at.size == 1 for at in step.values()) and one.granularity == "tensor"
    assert alone or any(at.any() for at in step.values())


@few
@given(measurable)
def test_away_from_a_conflict_leaves_none(place: Place, one: Drawn) -> None:
    """Each group is orthogonal where it undid the protected update, and plain where it did not."""
    place.write(one)
    steering = Steering(away_from=place.update("protected"), granularity=one.granularity)
    plain, _ = place.merge("plain", alpha=one.alpha)
    merged, manifest = place.merge("out", alpha=one.alpha, steering=steering)
    step, old, new = (
        place.moved(merged),
        place.doubles("original"),
        place.doubles("unlearned"),
    )
    r = {name: at - old[name] for name, at in place.doubles("protected").items()}
    for group, names in groups_of(step, one.granularity).items():
        across = flat(r, names)
        asked = one.alpha * (flat(new, names) - flat(old, names))
        record = manifest["groups"][group]
        assert record["conflict"] == bool(asked @ across < 0)
        if record["conflict"]:
            s = flat(step, names)
            size = float(np.linalg.norm(across))
            lost = 2.0**-24 * float(np.linalg.norm(flat(new, names) + s)) * size
            assert abs(s @ across) <= 1e-6 * float(np.linalg.norm(s)) * size + lost
        else:
            assert record["removed"] == 0
            assert_same({at: merged[at] for at in names}, {at: plain[at] for at in names})


@few
@given(drawn)
def test_a_protected_update_that_is_not_undone_changes_nothing(place: Place, one: Drawn) -> None:
    """The update protects itself from a step along it, and from one against it not at all."""
    place.write(one)
    forwards = abs(one.alpha)
    protecting = Steering(away_from=place.update("unlearned"), granularity=one.granularity)
    plain, _ = place.merge("plain", alpha=forwards)
    found, manifest = place.merge("out", alpha=forwards, steering=protecting)
    assert_same(found, plain)
    assert not any(group["conflict"] for group in manifest["groups"].values())
    assert {group["removed"] for group in manifest["groups"].values()} == {0.0}
    found, manifest = place.merge("out", alpha=-forwards, steering=protecting)
    for group in manifest["groups"].values():
        assert group["conflict"] == (group["norm"] > 0)
        assert group["removed"] == pytest.approx(forwards if group["conflict"] else 0, rel=1e-12)
    new = place.tensors["unlearned"]
    for name, tensor in found.items():
        unit = spacing(doubles(new[name]), tensor.dtype)
        assert (np.abs(doubles(tensor) - doubles(new[name])) <= unit).all(), name


@few
@given(drawn, st.booleans())
def test_all_of_the_rank_is_the_plain_step(place: Place, one: Drawn, outside: bool) -> None:
    place.write(one)
    plain, manifest = place.merge("plain", alpha=one.alpha)
    for steering in (
        Steering(rank=max(5, one.width), rank_all=outside),
        Steering(rank=11, rank_all=outside),
        Steering(rank=10**6, rank_all=outside),
        Steering(energy=1, rank_all=outside),
        Steering(energy=1.0, rank_all=outside, granularity="tensor", away_from=ORIGINAL_ITSELF),
    ):
        found, steered = place.merge("out", alpha=one.alpha, steering=steering)
        if steering.away_from is not None:
            alone = Steering(granularity="tensor", away_from=ORIGINAL_ITSELF)
            plain, _ = place.merge("plain", alpha=one.alpha, steering=alone)
        else:
            alphas = [each["tensors"][HEAD]["effective_alpha"] for each in (manifest, steered)]
            assert alphas[0] == alphas[1]
        assert_same(found, plain)


@few
@given(drawn, st.floats(-2, 2), st.integers(0, 2**31))
def test_nothing_of_an_update_is_nothing(place: Place, one: Drawn, beta: float, seed: int) -> None:
    place.write(one)
    plain, _ = place.merge("plain", alpha=one.alpha)
    nothing = Steering(add=((place.update("related"), 0.0), (place.update("protected"), -0.0)))
    found, _ = place.merge("out", alpha=one.alpha, steering=nothing)
    assert_same(found, plain)
    # What is added comes after the rest, whatever that is.
    for at, add in (("without", ()), ("with", ((place.update("related"), 0.0),))):
        rest = Steering(away_from=place.update("protected"), control="random", add=add)
        place.merge(at, alpha=beta, seed=seed, steering=rest)
    assert_same(read_tensors(place.root / "with"), read_tensors(place.root / "without"))


@pytest.mark.parametrize("kind", ["along", "away from", "control"])
@pytest.mark.parametrize("rules", [None, {"*": 0.0}], ids=["alpha 0", "a rule of 0"])
def test_where_alpha_is_0_everywhere_there_is_nothing_to_measure(
    tmp_path: Path, kind: str, rules: dict[str, float] | None
) -> None:
    """What is left is a copy of the unlearned model, and what is added to it."""
    place = Place(tmp_path)
    place.write(Drawn(2, torch.bfloat16, 5, 0.3, 0.0, "layer"))
    related = place.update("related")
    kinds: dict[str, dict[str, Any]] = {
        "along": {"along": (related,)},
        "away from": {"away_from": place.update("protected"), "always": True},
        "control": {"control": "random"},
    }
    alpha = 0.0 if rules is None else 1.0
    for number, add in enumerate(((), ((related, 0.5),))):
        alone = Steering(add=add)
        plain, _ = place.merge(f"plain-{number}", alpha=0.0, steering=alone)
        steering = Steering(**kinds[kind], add=add)
        found, manifest = place.merge(
            f"out-{number}", alpha=alpha, alpha_rules=rules, steering=steering
        )
        assert_same(found, plain)
        assert not manifest.get("groups")
    assert_same(read_tensors(tmp_path / "out-0"), place.tensors["unlearned"])


@few
@given(drawn, st.floats(-2, 2))
def test_the_update_added_again_adds_to_alpha(place: Place, one: Drawn, beta: float) -> None:
    place.write(one)
    together, _ = place.merge("plain", alpha=one.alpha + beta)
    steering = Steering(add=((place.update("unlearned"), beta),))
    found, manifest = place.merge("out", alpha=one.alpha, steering=steering)
    old, new = place.tensors["original"], place.tensors["unlearned"]
    for name, tensor in found.items():
        v = doubles(new[name]) - doubles(old[name])
        largest = np.abs(doubles(new[name])) + (abs(one.alpha) + abs(beta)) * np.abs(v)
        off = np.abs(doubles(tensor) - doubles(together[name]))
        assert (off <= spacing(largest, tensor.dtype)).all(), name
        if v.any() and beta:
            asked = manifest["tensors"][name]["asked_alpha"]
            assert asked == pytest.approx(one.alpha + beta, rel=1e-4, abs=1e-4)


@few
@given(measurable.map(lambda one: one._replace(width=9)), st.integers(0, 2**62))
def test_a_control_is_a_random_step_of_the_same_length(place: Place, one: Drawn, seed: int) -> None:
    place.write(one)
    old, new = place.doubles("original"), place.doubles("unlearned")
    rules = {"model.layers.1.*": one.alpha / 2}
    steering = Steering(control="random", granularity=one.granularity)
    found, manifest = place.merge(
        "out", alpha=one.alpha, alpha_rules=rules, seed=seed, steering=steering
    )
    s = {
        name: one.alpha / (2 if ".1." in name else 1) * (at - old[name]) for name, at in new.items()
    }
    step = place.moved(found)
    assert manifest["groups"].keys() == groups_of(step, one.granularity).keys()
    for group, names in groups_of(step, one.granularity).items():
        length = float(np.linalg.norm(flat(step, names)))
        lost = 2.0**-24 * float(np.linalg.norm(flat(new, names) + flat(step, names)))
        wanted = float(np.linalg.norm(flat(s, names)))
        assert length == pytest.approx(wanted, rel=1e-6, abs=2 * lost)
        assert manifest["groups"][group]["control"] > 0
    same, _ = place.merge("same", alpha=one.alpha, alpha_rules=rules, seed=seed, steering=steering)
    assert_same(found, same)
    other, _ = place.merge(
        "other", alpha=one.alpha, alpha_rules=rules, seed=seed + 1, steering=steering
    )
    everything = list(step)
    count = flat(step, everything).size
    # Independent directions in n dimensions: a cosine of 0 ± 1/√n, groups weighing unequally.
    limit = 9 / np.sqrt(count)
    units = {
        name: np.concatenate(
            [flat(model, names) / np.linalg.norm(flat(model, names)) for names in groups.values()]
        )
        for name, model in (("out", step), ("other", place.moved(other)), ("s", s))
        for groups in [groups_of(step, "tensor")]
    }
    for one_of, two_of in (("out", "s"), ("out", "other")):
        tensors = len(everything)
        assert abs(float(units[one_of] @ units[two_of])) / tensors < limit


def test_a_control_draws_every_tensor_anew_and_is_close_to_gaussian(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    shapes = {f"model.layers.{layer}.up_proj.weight": (300, 200) for layer in range(2)}
    theta = {name: rng.normal(0, 1, shape) for name, shape in shapes.items()}
    place = Place(tmp_path)
    for name, at in (("original", 0.0), ("unlearned", 0.5)):
        place.tensors[name] = {
            key: torch.from_numpy(each + at * rng.normal(0, 1, each.shape)).float()
            for key, each in theta.items()
        }
        write_checkpoint(tmp_path / name, place.tensors[name])
    found, _ = place.merge("out", alpha=1, steering=Steering(control="random"))
    one, two = (at.reshape(-1) / at.std() for at in place.moved(found).values())
    for draw in (one, two):
        assert abs(draw.mean()) < 0.02
        assert abs((draw**3).mean()) < 0.05
        # Four uniform numbers have 3 − 6/20 where a Gaussian has 3.
        assert (draw**4).mean() == pytest.approx(2.7, abs=0.1)
        for lag in (1, 2, 3, 4, 8, 200):
            assert abs(np.corrcoef(draw[:-lag], draw[lag:])[0, 1]) < 0.02
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tied_parameters_stay_one(tmp_path: Path, rounding: Any) -> None:
    """The head that is stored beside the embedding it is tied to moves with it."""
    place = Place(tmp_path)
    place.write(Drawn(1, torch.bfloat16, 8, 0.1, 1.0, "layer"))
    for name in MODELS:
        tied = place.tensors[name] | {HEAD: place.tensors[name][EMBEDDING].clone()}
        config = {**CONFIG, "tie_word_embeddings": True}
        write_checkpoint(tmp_path / name, tied, shards=1 + MODELS.index(name) % 3, config=config)
    related, protected = place.update("related"), place.update("protected")
    for steering in (
        Steering(control="random", granularity="tensor"),
        Steering(control="random", rank=2, rank_all=True),
        Steering(along=(related,), min_cos=-1, away_from=protected, always=True),
        Steering(rank=2, rank_all=True, add=((related, 0.3),)),
    ):
        found, _ = place.merge("out", alpha=0.7, rounding=rounding, steering=steering)
        assert np.array_equal(bits(found[HEAD]), bits(found[EMBEDDING]))


def wide_models(root: Path, dtype: torch.dtype) -> dict[str, Model]:
    """A million weights, W ~ N(0, 0.02²), and updates of a hundredth of that."""
    rng = np.random.default_rng(9)
    names = {
        EMBEDDING: (200, 1000),
        "model.layers.0.up_proj.weight": (400, 1000),
        "model.layers.1.up_proj.weight": (400, 1000),
    }
    theta = {name: rng.normal(0, 0.02, shape) for name, shape in names.items()}
    v = {name: rng.normal(0, 2e-4, shape) for name, shape in names.items()}
    models: dict[str, Model] = {}
    for name, share, size in (
        ("original", 0.0, 0.0),
        ("unlearned", 1.0, 0.0),
        ("related", 0.6, 2e-4),
        ("protected", -0.5, 2e-4),
    ):
        tensors = {
            key: torch.from_numpy(at + share * v[key] + rng.normal(0, 1, at.shape) * size).to(dtype)
            for key, at in theta.items()
        }
        write_checkpoint(root / name, tensors, shards=2)
        models[name] = {key: doubles(at).reshape(at.shape) for key, at in tensors.items()}
    return models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_stochastic_rounding_keeps_every_part_of_a_step_on_average(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    models = wide_models(tmp_path, dtype)
    place = Place(tmp_path)
    steering = Steering(
        along=(place.update("related"),),
        away_from=place.update("protected"),
        add=((place.update("related", "protected"), -0.08),),
    )
    asked = Asked(
        along=("related",),
        away_from="protected",
        add=(("related@@protected", -0.08),),
        alpha=0.3,
    )
    s = make(models, asked).steps
    kept = {}
    for rounding in ("nearest", "stochastic"):
        merged, manifest = place.merge(
            rounding, alpha=asked.alpha, rounding=rounding, seed=4, steering=steering
        )
        step = {
            name: doubles(at).reshape(at.shape) - models["unlearned"][name]
            for name, at in merged.items()
        }
        names = list(step)
        along, whole = flat(step, names), flat(s, names)
        kept[rounding] = float(along @ whole / (whole @ whole))
        assert manifest["summary"]["share_kept"] == pytest.approx(kept[rounding], rel=1e-4)
        if rounding == "stochastic":
            for name in names:
                assert float(np.sum(step[name] * s[name]) / np.sum(s[name] ** 2)) == pytest.approx(
                    1, abs=0.02
                ), name
            # Not only along the step: every part of it comes out with its own coefficient.
            parts = np.stack(
                [
                    flat({at: models[new][at] - models["original"][at] for at in names}, names)
                    for new in ("unlearned", "related", "protected")
                ]
            )
            found, wanted = (
                np.linalg.lstsq(parts.T, each, rcond=None)[0] for each in (along, whole)
            )
            assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
            assert abs(float(np.mean(along - whole))) < 5 * float(np.std(along - whole)) / 1e3
    assert kept["stochastic"] == pytest.approx(1, abs=0.02)
    if dtype == torch.bfloat16:
        assert kept["nearest"] < 0.9
    again, _ = place.merge("again", alpha=0.3, rounding="stochastic", seed=4, steering=steering)
    assert_same(again, read_tensors(tmp_path / "stochastic"))
    other, _ = place.merge("other", alpha=0.3, rounding="stochastic", seed=5, steering=steering)
    assert any(not torch.equal(other[name], at) for name, at in again.items())


def test_stochastic_rounding_keeps_a_low_rank_step(tmp_path: Path) -> None:
    models = wide_models(tmp_path, torch.bfloat16)
    place = Place(tmp_path)
    for steering in (
        Steering(rank=20, rank_all=True),
        Steering(control="random", granularity="model"),
    ):
        merged, _ = place.merge("low", alpha=1.0, rounding="stochastic", steering=steering)
        exact, _ = place.merge("exact", alpha=1.0, dtype="float32", steering=steering)
        step, s = (
            {
                name: doubles(at).reshape(at.shape) - models["unlearned"][name]
                for name, at in each.items()
            }
            for each in (merged, exact)
        )
        names = list(step)
        one, two = flat(step, names), flat(s, names)
        assert float(one @ two / (two @ two)) == pytest.approx(1, abs=0.02)
