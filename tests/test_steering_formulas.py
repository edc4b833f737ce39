"""``--along``, ``--away-from``, ``--rank``, ``--energy``, ``--add``: against the reference."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import bits, read_tensors, run_here, write_checkpoint
from reference import doubles, dtype_id, rounded, spacing
from safetensors.torch import save_file
from steering_reference import Array, Asked, Figures, Made, Model, coherent, make

import uipe_merge

Tensors = dict[str, torch.Tensor]

LAYERS = 4
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
POSITIONS = "model.layers.0.self_attn.position_ids"
INSIDE = {
    "self_attn.q_proj.weight": (16, 16),
    "mlp.up_proj.weight": (20, 16),
    "mlp.down_proj.weight": (16, 20),
    "mlp.experts.down_proj": (3, 8, 12),
    "input_layernorm.weight": (16,),
}
SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDING: (24, 16),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in INSIDE.items()
    },
    NORM: (16,),
    HEAD: (24, 16),
    "scale": (),
    "empty": (0, 3),
}
STILL = ("model.layers.1.input_layernorm.weight", "model.layers.3.", NORM)
"""Tensors, and a layer, that unlearning did not move."""
LORA = ("self_attn.q_proj", "mlp.up_proj")
"""What the adapter moves, in layers 0 to 2."""


class Stored:
    """A family of models on disk and in memory."""

    def __init__(self, root: Path, dtype: torch.dtype) -> None:
        self.root = root
        self.models: dict[str, Model] = {}
        self.tensors: dict[str, Tensors] = {}
        self.locations: dict[str, str] = {}
        rng = np.random.default_rng(3)
        theta = {name: rng.normal(0, 0.02, shape) for name, shape in SHAPES.items()}
        v = {name: _spectrum(rng, shape) for name, shape in SHAPES.items()}
        for name in (name for name in v if name.startswith(STILL)):
            v[name] = np.zeros(SHAPES[name])
        noise = [{name: rng.normal(0, 4e-3, s) for name, s in SHAPES.items()} for _ in range(6)]
        self._add("original", theta, dtype, 1)
        self._add("unlearned", _plus(theta, 1, v), dtype, 2)
        self._add("related", _plus(_plus(theta, 0.7, v), 1, noise[0]), dtype, 3, backwards=True)
        self._add("unrelated", _plus(theta, 1, noise[1]), dtype, 1)
        self._add("large", _plus(_plus(theta, 9, v), 1, noise[2]), dtype, 2)
        self._add("opposed", _plus(_plus(theta, -0.5, v), 1, noise[3]), dtype, 2)
        # Undoes the update in layer 0 and outside of the layers, and goes on with it in layer 2.
        turns = {name: -0.6 if ".2." not in name else 0.6 for name in v}
        back = {name: turns[name] * v[name] + noise[4][name] for name in v}
        self._add("repaired", _plus(_plus(theta, 1, v), 1, back), dtype, 3, backwards=True)
        kept = {name: turns[name] * v[name] + noise[5][name] for name in v}
        for name in (name for name in kept if ".1." in name or name == HEAD):
            kept[name] = np.zeros(SHAPES[name])
        self._add("protected", _plus(theta, 1, kept), dtype, 1)
        self._add_adapter(rng)

    def _add(
        self, name: str, model: Model, dtype: torch.dtype, shards: int, *, backwards: bool = False
    ) -> None:
        tensors = {key: torch.from_numpy(np.asarray(at)).to(dtype) for key, at in model.items()}
        self.models[name] = {key: doubles(at).reshape(at.shape) for key, at in tensors.items()}
        tensors[POSITIONS] = torch.arange(8) + len(self.tensors)
        self.tensors[name] = tensors
        names = list(tensors)[::-1] if backwards else list(tensors)
        stored = {key: tensors[key] for key in names}
        self.locations[name] = str(write_checkpoint(self.root / name, stored, shards=shards))

    def _add_adapter(self, rng: np.random.Generator) -> None:
        """An adapter alone, on the original and on another model."""
        factors: Tensors = {}
        delta: Model = {}
        for module in (f"model.layers.{layer}.{name}" for layer in range(3) for name in LORA):
            rows, columns = SHAPES[f"{module}.weight"]
            left = torch.from_numpy(rng.normal(0, 0.05, (rows, 3))).float()
            right = torch.from_numpy(rng.normal(0, 0.05, (3, columns))).float()
            factors[f"base_model.model.{module}.lora_A.weight"] = right
            factors[f"base_model.model.{module}.lora_B.weight"] = left
            delta[f"{module}.weight"] = 6 / 3 * left.double().numpy() @ right.double().numpy()
        (self.root / "lora").mkdir()
        save_file(factors, self.root / "lora" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
        config["target_modules"] = ["q_proj", "up_proj"]
        (self.root / "lora" / "adapter_config.json").write_text(json.dumps(config))
        for base in ("original", "related", "repaired"):
            name = f"{base}+lora"
            self.locations[name] = f"{self.locations[base]}+{self.root / 'lora'}"
            model = self.models[base]
            self.models[name] = {key: at + delta.get(key, 0.0) for key, at in model.items()}
        self.locations["lora"] = str(self.root / "lora")
        self.models["lora"] = self.models["original+lora"]

    def update(self, text: str) -> uipe_merge.Update:
        """The update that a test names."""
        new, _, old = text.partition("@@")
        return uipe_merge.Update(self.locations[new], old and self.locations[old])

    def steering(self, asked: Asked) -> uipe_merge.Steering:
        away = asked.away_from
        itself = uipe_merge.ORIGINAL_ITSELF
        return uipe_merge.Steering(
            along=tuple(map(self.update, asked.along)),
            min_cos=asked.min_cos,
            max_alpha=asked.max_alpha,
            away_from=None if not away else itself if away == "original" else self.update(away),
            always=asked.always,
            rank=asked.rank,
            energy=asked.energy,
            rank_all=asked.rank_all,
            granularity=asked.granularity,
            add=tuple((self.update(update), beta) for update, beta in asked.add),
        )

    def words(self, asked: Asked) -> list[str]:
        """The options of the command line."""

        def text(update: str) -> str:
            return "@@".join(self.locations[name] for name in update.split("@@"))

        words = ["--alpha", str(asked.alpha), "--granularity", asked.granularity]
        words += [word for rule in asked.rules for word in ("--alpha-rule", f"{rule[0]}={rule[1]}")]
        words += [word for update in asked.along for word in ("--along", text(update))]
        words += ["--min-cos", str(asked.min_cos), "--max-alpha", str(asked.max_alpha)]
        away = asked.away_from
        words += ["--away-from", away if away == "original" else text(away)] if away else []
        words += ["--always"] * asked.always + ["--rank-all"] * asked.rank_all
        words += ["--rank", str(asked.rank)] if asked.rank else []
        words += ["--energy", str(asked.energy)] if asked.energy else []
        for update, beta in asked.add:
            words += ["--add", f"{text(update)}={beta}"]
        return words

    def merge(
        self,
        out: Path,
        asked: Asked,
        dtype: str = "auto",
        unlearned: str = "unlearned",
        steering: uipe_merge.Steering | None = None,
    ) -> dict[str, Any]:
        """Merge, and return the manifest."""
        uipe_merge.merge(
            self.locations["original"],
            self.locations[unlearned],
            out,
            alpha=asked.alpha,
            alpha_rules=dict(asked.rules),
            dtype=dtype,
            steering=steering or self.steering(asked),
            overwrite=True,
            progress=False,
        )
        return manifest_of(out)

    def check(
        self, out: Path, asked: Asked, dtype: str = "auto", unlearned: str = "unlearned"
    ) -> Made:
        """Merge and hold output and manifest against the reference."""
        manifest = self.merge(out, asked, dtype, unlearned)
        family = {**self.models, "unlearned": self.models[unlearned]}
        made = make(family, asked)
        merged = read_tensors(out)
        positions = self.tensors.get(unlearned, self.tensors["original"])[POSITIONS]
        assert torch.equal(merged.pop(POSITIONS), positions)
        # Factors are float32, everything else is exact until the one rounding.
        loose = asked.rank is not None or asked.energy is not None
        assert_tensors(merged, family["unlearned"], made.steps, loose=loose)
        assert_manifest(manifest, asked, made, family, merged)
        return made


def _spectrum(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """An update whose matrices have few strong directions, of the size of the weights."""
    if len(shape) == 3:
        return np.stack([_spectrum(rng, shape[1:]) for _ in range(shape[0])])
    found = np.asarray(rng.normal(0, 1, shape))
    if len(shape) == 2 and found.size:
        left, _, right = np.linalg.svd(found, full_matrices=False)
        found = left * rng.uniform(0.4, 0.8) ** np.arange(min(shape)) @ right * 5
    return found * 0.01


def _plus(one: Model, factor: float, two: Model) -> Model:
    return {name: one[name] + factor * two[name] for name in one}


def manifest_of(out: Path) -> dict[str, Any]:
    """The manifest of an output."""
    found: dict[str, Any] = json.loads((out / "uipe_merge.json").read_text())
    return found


def assert_tensors(merged: Tensors, unlearned: Model, steps: Model, *, loose: bool) -> None:
    """Hold an output against θᵤ + s, rounded once.

    All but 1e-3 of the elements are equal, and none is off by more than an ulp. Where w comes
    from factors in float32, an output in float32 is held to their precision instead.
    """
    assert merged.keys() == steps.keys()
    off = elements = 0
    for name, out in merged.items():
        new, step = unlearned[name].reshape(-1), steps[name].reshape(-1)
        exact, got = new + step, doubles(out)
        wanted = rounded(exact, out.dtype)
        unit = spacing(np.maximum(np.maximum(np.abs(new), np.abs(exact)), np.abs(step)), out.dtype)
        if loose and out.dtype == torch.float32:
            unit += 3e-6 * np.abs(step).max(initial=0.0)
            got = np.where(np.abs(got - exact) <= unit, wanted, got)
        assert (np.abs(got - wanted) <= unit).all(), (
            f"{name}: off by {np.max(np.abs(got - wanted) / unit):g} ulp"
        )
        off += int(np.count_nonzero(got != wanted))
        elements += got.size
    assert off <= max(1, 1e-3 * elements), f"{off} of {elements} differ"


def assert_manifest(
    manifest: dict[str, Any],
    asked: Asked,
    made: Made,
    family: dict[str, Model],
    merged: Tensors,
) -> None:
    """Hold every number about the steps against the reference."""
    old, new = family["original"], family["unlearned"]
    v = {name: new[name] - old[name] for name in old}
    moved = {name: doubles(out).reshape(out.shape) - new[name] for name, out in merged.items()}
    records = manifest["tensors"]
    alphas = {name: at for group in made.groups.values() for name, at in group.alphas.items()}
    for name, record in records.items():
        if name == POSITIONS:
            continue
        close(record["alpha"], alphas.get(name, 0.0), name)
        if "effective_alpha" in record:
            close(record["effective_alpha"], _share([name], moved, v), name, 1e-4)
        else:
            assert not made.steps[name].any(), f"{name} moves, and nothing says by how much"
        if "asked_alpha" in record:
            close(record["asked_alpha"], _share([name], made.steps, v), name, 1e-4)
        found = (record.get("rank"), record.get("energy"))
        rank, energy = made.ranks.get(name, (None, None))
        assert found[0] == rank, name
        close(found[1], energy, name)
    everything = [name for name, record in records.items() if record["operation"] == "extrapolate"]
    close(manifest["summary"]["effective_alpha"], _share(everything, moved, v), "summary", 1e-4)
    close(manifest["summary"]["share_kept"], _share(everything, moved, made.steps), "summary", 1e-4)
    groups = manifest.get("groups", {})
    if not asked.along and not asked.away_from:
        assert not groups
        return
    assert groups.keys() == made.groups.keys()
    for name, wanted in made.groups.items():
        assert_group(groups[name], wanted, asked, name)
        close(groups[name]["effective_alpha"], _share(wanted.names, moved, v), name, 1e-4)
        step = math.sqrt(sum(float(np.sum(made.steps[at] ** 2)) for at in wanted.names))
        if step > 1e-9 or not wanted.removed:  # else rounding leaves a little of nothing
            close(groups[name]["share_kept"], _share(wanted.names, moved, made.steps), name, 1e-4)


def assert_group(found: dict[str, Any], wanted: Figures, asked: Asked, name: str) -> None:
    """Hold the record of one group against the reference."""
    assert found["tensors"] == len(wanted.names)
    close(found["norm"], wanted.norm, name)
    smallest, largest = min(wanted.alphas.values()), max(wanted.alphas.values())
    if isinstance(found["alpha"], list):
        assert smallest < largest
        close(found["alpha"][0], smallest, name)
        close(found["alpha"][1], largest, name)
    else:
        close(found["alpha"], smallest, name)
        close(found["alpha"], largest, name)
    assert ("kappa" in found) == bool(asked.along)
    if asked.along:
        for at, (one, two) in enumerate(zip(found["cosines"], wanted.cosines, strict=True)):
            close(one, two, (name, at))
        for at, (one, two) in enumerate(zip(found["kappas"], wanted.kappas, strict=True)):
            close(one, two, (name, at))
        close(found["kappa"], wanted.kappa, name)
    assert ("conflict" in found) == bool(asked.away_from)
    if asked.away_from:
        close(found["protected_cosine"], wanted.protected, name)
        assert found["conflict"] is wanted.conflict, name
        close(found["removed"], wanted.removed, name)


def close(found: float | None, wanted: float | None, what: object, tolerance: float = 1e-5) -> None:
    """Two numbers of the order of 1, or nothing twice."""
    assert (found is None) == (wanted is None), (what, found, wanted)
    if found is not None and wanted is not None:
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), what


def _share(names: list[str], one: Model, two: Model) -> float | None:
    """⟨one, two⟩/‖two‖² over some tensors."""
    square = sum(float(np.sum(two[name] ** 2)) for name in names)
    return sum(float(np.sum(one[name] * two[name])) for name in names) / square if square else None


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Stored]:
    """The family in any type, written once."""
    made: dict[torch.dtype, Stored] = {}

    def family(dtype: torch.dtype) -> Stored:
        if dtype not in made:
            made[dtype] = Stored(tmp_path_factory.mktemp("family"), dtype)
        return made[dtype]

    return family


Families = Callable[[torch.dtype], Stored]

RULES = (
    ("model.layers.0.input_layernorm*", 0.0),
    ("model.layers.1.self_attn*", -0.8),
    ("model.layers.2.mlp*", 2.5),
    ("model.embed*", 0.0),
    ("lm_head*", -1.0),
)
ALL = Asked(
    along=("related", "large@@unlearned", "unrelated"),
    max_alpha=3.5,
    away_from="repaired@@unlearned",
    energy=0.9,
    add=(("repaired@@unlearned", 0.5), ("protected", -0.25)),
    alpha=0.8,
    rules=RULES,
)
MEASURED = {
    "along": Asked(along=("related",)),
    "along a pair": Asked(along=("large@@repaired",), alpha=0.4),
    "along several": Asked(along=("related", "unrelated", "protected"), alpha=0.7, min_cos=0.2),
    "along most": Asked(along=("large",)),
    "along, clipped": Asked(along=("related", "large"), max_alpha=1.5, alpha=-0.5),
    "along the opposite": Asked(along=("opposed",)),
    "along the opposite, counted": Asked(along=("related", "opposed"), min_cos=-1),
    "along the opposite alone": Asked(along=("opposed",), min_cos=-1),
    "along, ruled": Asked(along=("related",), alpha=1.5, rules=RULES),
    "away": Asked(away_from="repaired@@unlearned", alpha=1.5),
    "away, always": Asked(away_from="repaired@@unlearned", always=True, alpha=1.5),
    "away backwards": Asked(away_from="protected", alpha=-0.7),
    "away from nothing": Asked(away_from="protected", always=True),
    "away, ruled": Asked(away_from="protected", always=True, rules=RULES, alpha=0.5),
    "away from the original": Asked(away_from="original", alpha=1.2, rules=RULES[:3]),
    "rank and along": Asked(along=("related",), rank=2),
    "rank and away": Asked(away_from="repaired@@unlearned", rank=1, rank_all=True),
    "along and away": Asked(along=("large",), away_from="protected", max_alpha=2),
    "all": ALL,
    "all, differently": ALL._replace(
        along=ALL.along[::-1],
        away_from="original",
        energy=None,
        rank=3,
        rank_all=True,
        add=(("related@@protected", -0.3),),
    ),
}
UNMEASURED = {
    "rank": Asked(rank=2, alpha=1.5),
    "rank 1 of all": Asked(rank=1, rank_all=True, rules=RULES),
    "energy": Asked(energy=0.7, alpha=2.0),
    "energy of all": Asked(energy=0.95, rank_all=True, rules=RULES),
    "add": Asked(add=(("repaired@@unlearned", 0.5),), alpha=2.0),
    "add two": Asked(add=(("repaired@@unlearned", 0.5), ("protected", -0.25)), rules=RULES),
    "add to nothing": Asked(add=(("related", 0.6),), alpha=0.0),
    "rank and add": Asked(rank=2, add=(("unlearned", 0.5), ("original@@related", 0.2))),
}


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
@pytest.mark.parametrize("asked", MEASURED.values(), ids=MEASURED)
def test_steps_made_from_inner_products(
    tmp_path: Path, families: Families, asked: Asked, granularity: Any
) -> None:
    asked = asked._replace(granularity=granularity)
    families(torch.bfloat16).check(tmp_path / "out", asked, "float32")


@pytest.mark.parametrize("asked", UNMEASURED.values(), ids=UNMEASURED)
def test_steps_made_without(tmp_path: Path, families: Families, asked: Asked) -> None:
    families(torch.bfloat16).check(tmp_path / "out", asked, "float32")


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.bfloat16, "auto"),
        (torch.float16, "auto"),
        (torch.float32, "auto"),
        (torch.float16, "float32"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float16"),
    ],
    ids=dtype_id,
)
@pytest.mark.parametrize(
    "name",
    ["along several", "away", "away from the original", "along, ruled", "rank and along", "all"],
)
def test_every_type(
    tmp_path: Path, families: Families, name: str, stored: torch.dtype, dtype: str
) -> None:
    families(stored).check(tmp_path / "out", MEASURED[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("name", ["rank", "energy of all", "add two"])
def test_every_type_without_inner_products(
    tmp_path: Path, families: Families, name: str, dtype: torch.dtype
) -> None:
    families(dtype).check(tmp_path / "out", UNMEASURED[name])


def test_the_cases_are_what_they_are_called(families: Families) -> None:
    models = families(torch.bfloat16).models

    def groups(name: str, granularity: Any = "layer") -> list[Figures]:
        asked = MEASURED[name]._replace(granularity=granularity)
        return list(make(models, asked).groups.values())

    layers = 4 + 5  # one of each tensor outside of the layers
    assert len(groups("along")) == layers
    assert len(groups("along", "tensor")) == len(SHAPES)
    assert len(groups("along", "model")) == 1
    assert {group.kappa for group in groups("along most")} >= {0.0, 5.0}
    assert {group.kappa for group in groups("along the opposite")[1:4]} == {0.0}
    assert {group.kappa for group in groups("along the opposite alone")[1:4]} == {0.0}
    assert any(0 < kappa < 5 for kappa in (group.kappa or 0 for group in groups("all")))
    several = [group for group in groups("along several") if None not in group.cosines]
    assert any(0.0 in group.kappas and max(group.kappas) > 0 for group in several)
    assert {group.conflict for group in groups("away")} == {True, False}
    assert any(group.conflict is False and group.removed for group in groups("away, always"))
    nothing = groups("away from nothing")
    assert sum(group.protected is None and group.norm > 0 for group in nothing) >= 2
    assert any(group.norm == 0 for group in nothing)
    energies = [rank for rank, _ in make(models, UNMEASURED["energy of all"]).ranks.values()]
    assert max(energies) > min(filter(None, energies))


CONTROLLED = ["along, ruled", "away, always", "away, ruled", "rank and away", "all"]


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
@pytest.mark.parametrize("name", CONTROLLED)
def test_a_control_is_as_long_as_the_step_in_whose_place_it_is(
    tmp_path: Path, families: Families, name: str, granularity: Any
) -> None:
    """After low rank, along and away, and before what is added."""
    stored = families(torch.bfloat16)
    asked = MEASURED[name]._replace(granularity=granularity)
    steering = replace(stored.steering(asked), control="random")
    manifest = stored.merge(tmp_path / "out", asked, "float32", steering=steering)
    merged, new = read_tensors(tmp_path / "out"), stored.models["unlearned"]
    made = make(stored.models, asked._replace(add=()))
    added = make(stored.models, Asked(alpha=0.0, add=asked.add)).steps
    assert manifest["groups"].keys() == made.groups.keys()
    for group, wanted in made.groups.items():
        found = [
            doubles(merged[at]).reshape(new[at].shape) - new[at] - added[at] for at in wanted.names
        ]
        length = math.sqrt(sum(float(np.sum(step**2)) for step in found))
        whole = math.sqrt(sum(float(np.sum(new[at] ** 2)) for at in wanted.names))
        step = math.sqrt(sum(float(np.sum(made.steps[at] ** 2)) for at in wanted.names))
        assert length == pytest.approx(step, rel=1e-5, abs=2.0**-22 * whole), group
        assert_group(manifest["groups"][group], wanted, asked, group)
        # The direction is another one wherever there are many.
        inner = sum(
            float(np.sum(one * made.steps[at])) for one, at in zip(found, wanted.names, strict=True)
        )
        count = sum(new[at].size for at in wanted.names)
        assert count < 300 or abs(inner) < 0.5 * length * step + 1e-12, group


def test_the_command_line_asks_for_the_same(tmp_path: Path, families: Families) -> None:
    stored = families(torch.bfloat16)
    for number, asked in enumerate((ALL, MEASURED["all, differently"])):
        asked = asked._replace(always=number == 0, min_cos=0.1, granularity="tensor")  # noqa: PLW2901
        out, again = tmp_path / f"{number}", tmp_path / f"again-{number}"
        stored.merge(out, asked)
        pair = (stored.locations["original"], stored.locations["unlearned"])
        result = run_here(*pair, *stored.words(asked), "-o", again)
        assert result.code == 0, result
        one, two = read_tensors(out), read_tensors(again)
        assert all(np.array_equal(bits(one[name]), bits(two[name])) for name in one)
        assert manifest_of(out)["groups"] == manifest_of(again)["groups"]


def test_without_an_alpha_the_related_update_is_all_that_decides(
    tmp_path: Path, families: Families
) -> None:
    stored = families(torch.bfloat16)
    asked = Asked(along=("related",))
    wanted = stored.merge(tmp_path / "out", asked)
    uipe_merge.merge(
        stored.locations["original"],
        stored.locations["unlearned"],
        tmp_path / "again",
        steering=stored.steering(asked),
        progress=False,
    )
    assert manifest_of(tmp_path / "again")["groups"] == wanted["groups"]
    one, two = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert all(np.array_equal(bits(one[name]), bits(two[name])) for name in one)


ADAPTERS = {
    "along a bare one": Asked(along=("lora",), min_cos=-1),
    "along one on the original": Asked(along=("original+lora", "related"), min_cos=0.01),
    "along one on another model": Asked(along=("related+lora",), granularity="tensor"),
    "away from one": Asked(away_from="repaired+lora@@repaired", always=True, alpha=1.4),
    "away from one at a conflict": Asked(away_from="lora", granularity="tensor"),
    "add": Asked(add=(("lora", 0.5),), alpha=0.0),
    "add two": Asked(add=(("lora", 0.5), ("related+lora@@related", -0.3)), alpha=1.5),
    "all": ALL._replace(along=("related+lora",), add=(("lora@@repaired", 0.3),)),
}


@pytest.mark.parametrize("asked", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, "float32"), (torch.bfloat16, "auto"), (torch.float16, "auto")],
    ids=dtype_id,
)
def test_updates_that_are_adapters(
    tmp_path: Path, families: Families, asked: Asked, stored: torch.dtype, dtype: str
) -> None:
    families(stored).check(tmp_path / "out", asked, dtype)


UNLEARNING = {
    "along": Asked(along=("related",), min_cos=-1),
    "along itself": Asked(along=("lora", "original+lora"), max_alpha=3),
    "away": Asked(away_from="protected", always=True, granularity="model"),
    "away from a pair of it": Asked(away_from="repaired@@lora", granularity="tensor"),
    "away from the original": Asked(away_from="original", rules=RULES),
    "add": Asked(add=(("repaired@@lora", 0.5), ("related", 0.2)), rules=RULES),
}


@pytest.mark.parametrize("asked", UNLEARNING.values(), ids=UNLEARNING)
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, "float32"), (torch.bfloat16, "auto"), (torch.float16, "auto")],
    ids=dtype_id,
)
def test_an_adapter_as_the_unlearned_model(
    tmp_path: Path, families: Families, asked: Asked, stored: torch.dtype, dtype: str
) -> None:
    made = families(stored).check(tmp_path / "out", asked, dtype, unlearned="lora")
    if asked is UNLEARNING["along itself"]:
        assert {group.kappa for group in made.groups.values()} >= {0.0}
        groups = manifest_of(tmp_path / "out")["groups"]
        assert {group["kappa"] for group in groups.values()} == {0.0, 2.0}


@pytest.mark.parametrize("rank", [1, 2])
def test_the_rank_of_an_adapter_as_the_unlearned_model(
    tmp_path: Path, families: Families, rank: int
) -> None:
    stored = families(torch.bfloat16)
    asked = Asked(rank=rank, along=("related",), min_cos=-1)
    stored.merge(tmp_path / "out", asked, "float32", "lora")
    family = {**stored.models, "unlearned": stored.models["lora"]}
    merged = read_tensors(tmp_path / "out")
    merged.pop(POSITIONS)
    assert_tensors(merged, family["unlearned"], make(family, asked).steps, loose=True)


def test_updates_in_other_types_than_the_pair(tmp_path: Path, families: Families) -> None:
    stored, wide, half = families(torch.bfloat16), families(torch.float32), families(torch.float16)
    asked = Asked(along=("wide",), away_from="half@@unlearned", add=(("wide@@half", 0.4),))
    for name, source, model in (("wide", wide, "related"), ("half", half, "repaired")):
        stored.locations[name] = source.locations[model]
        stored.models[name] = source.models[model]
    for dtype in ("auto", "float32"):
        stored.check(tmp_path / dtype, asked, dtype)


def test_matrices_of_several_blocks_and_stacks_across_them(tmp_path: Path) -> None:
    """Sides of 640 are iterated for, and a stack of three lies in two blocks."""
    rng = np.random.default_rng(5)
    shapes = {
        "model.layers.0.q_proj.weight": (400, 700),
        "model.layers.0.experts.down_proj": (3, 640, 640),
    }

    def strong(shape: tuple[int, ...]) -> Array:
        left = rng.normal(0, 1, (*shape[:-1], 3)) * np.array([2.0, 1.0, 0.5])
        return np.asarray(left @ rng.normal(0, 1, (*shape[:-2], 3, shape[-1])) * 1e-3)

    theta = {name: rng.normal(0, 0.02, shape) for name, shape in shapes.items()}
    drawn = {name: strong(shape) + rng.normal(0, 2e-4, shape) for name, shape in shapes.items()}
    models: dict[str, Model] = {}
    for name, at in (("original", 0.0), ("unlearned", 1.0), ("related", 0.5)):
        tensors = {
            key: torch.from_numpy(
                theta[key] + at * drawn[key] + (at == 0.5) * rng.normal(0, 1e-3, shapes[key])
            ).float()
            for key in shapes
        }
        write_checkpoint(tmp_path / name, tensors)
        models[name] = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    related = uipe_merge.Update(str(tmp_path / "related"))
    for asked in (Asked(rank=2, along=("related",)), Asked(energy=0.9, along=("related",))):
        out = tmp_path / "out"
        uipe_merge.merge(
            tmp_path / "original",
            tmp_path / "unlearned",
            out,
            steering=uipe_merge.Steering(along=(related,), rank=asked.rank, energy=asked.energy),
            threads=2,
            overwrite=True,
            progress=False,
        )
        made, merged = make(models, asked), read_tensors(out)
        records = manifest_of(out)["tensors"]
        for name in shapes:
            assert records[name]["rank"] == made.ranks[name][0]
            close(records[name]["energy"], made.ranks[name][1], name, 1e-4)
            assert records[name]["iterations"] > 0
            step = merged[name].double().numpy() - models["unlearned"][name]
            # Energy is off by 1e-4 at most, the step by the root of what that is at an angle.
            missed = np.linalg.norm(step - made.steps[name]) / np.linalg.norm(made.steps[name])
            assert missed < 1e-2, missed
        group = manifest_of(out)["groups"]["model.layers.0"]
        wanted = made.groups["model.layers.0"]
        close(group["norm"], wanted.norm, "norm", 1e-4)
        close(group["kappa"], wanted.kappa, "kappa", 1e-3)


@pytest.mark.parametrize("share", [None, 0.7])
def test_a_flat_spectrum_is_approximated_as_well_as_stated(
    tmp_path: Path, share: float | None
) -> None:
    """What is kept is a projection of v of few ranks, and holds all but 1e-4 of the energy."""
    rng = np.random.default_rng(6)
    name = "model.layers.0.q_proj.weight"
    theta, update = rng.normal(0, 0.02, (300, 200)), rng.normal(0, 0.02, (300, 200))
    left, values, right = np.linalg.svd(update, full_matrices=False)
    update = (left * values * np.linspace(1, 0.3, 200)) @ right
    pair = [torch.from_numpy(each).float() for each in (theta, theta + update)]
    for side, tensor in zip(("original", "unlearned"), pair, strict=True):
        write_checkpoint(tmp_path / side, {name: tensor})
    one, two = (tensor.double().numpy() for tensor in pair)
    steering = uipe_merge.Steering(rank=None if share else 7, energy=share)
    uipe_merge.merge(
        tmp_path / "original",
        tmp_path / "unlearned",
        tmp_path / "out",
        alpha=1.0,
        steering=steering,
        progress=False,
    )
    record = manifest_of(tmp_path / "out")["tensors"][name]
    v, w = two - one, read_tensors(tmp_path / "out")[name].double().numpy() - two
    _, rank, held = coherent(v, None if share else 7, share)
    kept = np.linalg.svd(w, compute_uv=False)
    assert kept[record["rank"]] < 1e-5 * kept[0], "more directions than it says"
    assert np.sum(w * (v - w)) == pytest.approx(0, abs=1e-5 * float(np.sum(w * w)))
    energy = float(np.sum(w * w) / np.sum(v * v))
    assert record["energy"] == pytest.approx(energy, rel=1e-5)
    best = np.linalg.svd(v, compute_uv=False) ** 2
    assert energy >= best[: record["rank"]].sum() / best.sum() * (1 - 1e-4)
    assert record["rank"] - rank in ((0, 1) if share else (0,))
    assert energy >= (share or held * (1 - 1e-4))


def test_model_state_arithmetic(tmp_path: Path, families: Families) -> None:
    """θ − α·(θ₁ − θ₀) + β·(θ₂ − θ₀), from the checkpoint θ₀ before what is to be forgotten."""
    stored = families(torch.bfloat16)
    alpha, beta = 1.25, 0.75
    names = {"new": stored.locations["related"]}, {"new": stored.locations["protected"]}
    recipe = {
        "alpha": 0,
        "dtype": "float32",
        "add": [{**names[0], "beta": -alpha}, {**names[1], "beta": beta}],
    }
    (tmp_path / "msa.yaml").write_text(yaml.safe_dump(recipe))
    before, trained = stored.locations["original"], stored.locations["unlearned"]
    result = run_here(
        before, trained, "--recipe", tmp_path / "msa.yaml", "-o", tmp_path / "by-recipe"
    )
    assert result.code == 0, result
    pairs = [
        f"{stored.locations[name]}@@{before}={factor}"
        for name, factor in (("related", -alpha), ("protected", beta))
    ]
    options = ("--alpha", 0, "--dtype", "float32", "--add", pairs[0], "--add", pairs[1])
    assert run_here(before, trained, *options, "-o", tmp_path / "by-options").code == 0
    models = stored.models
    merged = read_tensors(tmp_path / "by-recipe")
    again = read_tensors(tmp_path / "by-options")
    for name, zero in models["original"].items():
        theta, one, two = (models[at][name] for at in ("unlearned", "related", "protected"))
        exact = theta - alpha * (one - zero) + beta * (two - zero)
        wanted = torch.from_numpy(rounded(exact, torch.float32)).float()
        assert torch.equal(merged[name], wanted), name
        assert torch.equal(again[name], wanted), name
    assert "groups" not in manifest_of(tmp_path / "by-recipe")


def test_the_same_bytes_on_any_number_of_threads(tmp_path: Path, families: Families) -> None:
    stored = families(torch.bfloat16)
    found = []
    for threads in (1, 3):
        out = tmp_path / str(threads)
        uipe_merge.merge(
            stored.locations["original"],
            stored.locations["unlearned"],
            out,
            alpha=ALL.alpha,
            alpha_rules=dict(RULES),
            steering=stored.steering(ALL),
            threads=threads,
            progress=False,
        )
        files = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
        found.append((files, manifest_of(out)["groups"]))
    assert found[0] == found[1]
