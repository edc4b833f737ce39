"""``verify --deep``: a model computed again from its inputs, and everything that may differ."""

import contextlib
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CONFIG,
    Result,
    assert_refused,
    moved,
    random_tensors,
    run_here,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from uipe_merge import Deep, api
from uipe_merge.errors import IncompatibleModelsError, UsageError

PAIR = ("original", "unlearned")
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of two shards, what was merged of it, and further inputs; not to be changed."""
    root = tmp_path_factory.mktemp("inputs")
    tensors = {**random_tensors(), "steps": torch.arange(6)}
    write_checkpoint(root / "original", tensors, shards=2)
    write_checkpoint(root / "unlearned", moved(tensors), shards=2)
    write_checkpoint(root / "related", moved(tensors, seed=2), shards=2)
    (root / "adapter").mkdir()
    generator = torch.Generator().manual_seed(3)
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    halves = {
        f"{module}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"{module}.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    save_file(halves, root / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert run_here("original", "unlearned", "--alpha", 2, "-o", "out", cwd=root).code == 0
    return root


@pytest.fixture
def root(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the inputs to merge and spoil."""
    return Path(shutil.copytree(inputs, tmp_path / "root"))


def merge(root: Path, *options: object, pair: tuple[str, str] = PAIR) -> Path:
    """Make ``root/out``, unless it is what is there."""
    if not options and pair == PAIR:
        return root / "out"
    shutil.rmtree(root / "out")
    result = run_here(*pair, "--alpha", 2, "-o", "out", *options, cwd=root)
    assert result.code == 0, result
    return root / "out"


def verify(root: Path, *options: object, out: object = "out") -> Result:
    return run_here("verify", out, "--deep", *options, cwd=root)


def everything(root: Path, *options: object, out: object = "out") -> dict[str, Any]:
    """What is computed again of a model that is as it should be."""
    result = verify(root, "--sample", 1, "--json", *options, out=out)
    assert result.code == 0, result
    document = json.loads(result.out)
    assert document["ok"]
    again: dict[str, Any] = document["recomputed"]
    assert again["blocks"] == again["of_blocks"]
    return again


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest."""
    path = out / "uipe_merge.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rehash(out: Path, *names: str) -> None:
    """Let the manifest say what the files are now, as whoever changed them would."""

    def change(manifest: dict[str, Any]) -> None:
        for name in names:
            raw = (out / name).read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            manifest["files"][name] = {"size": len(raw), "sha256": digest}

    edit(out, change)
    assert api.verify(out, progress=False).problems == []


def place(file: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in a file, by the format's own rules."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def flip(file: Path, name: str, element: int, width: int = 2) -> None:
    raw = bytearray(file.read_bytes())
    raw[place(file, name)[0] + element * width] ^= 1
    file.write_bytes(raw)


def shard_of(out: Path, name: str) -> str:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    return str(index["weight_map"][name])


RECIPES = {
    "plain": (),
    "copies": ("--alpha-rule", "*=0"),
    "by layer": ("--alpha-layers", "0=0.5,1=-1", "--alpha-rule", "*.q_proj.*=0.1"),
    "by chance": ("--rounding", "stochastic", "--seed", 7),
    "another type, smaller shards": ("--dtype", "float32", "--max-shard-size", 4096),
    "steered": ("--along", "related", "--away-from", "original", "--granularity", "tensor"),
    "added, control": ("--add", "related@@unlearned=0.3", "--control", "random"),
    "low rank": ("--rank", 3, "--rank-all", "--away-from", "related@@original"),
}


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_what_was_merged_comes_out_again(root: Path, options: tuple[object, ...]) -> None:
    out = merge(root, *options)
    again = everything(root)
    assert again["tensors"] == 11
    sizes = (len(load_file(file)) and file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0 < again["bytes"] < sum(sizes)


def test_adapters_come_out_again(root: Path) -> None:
    merge(root, pair=("original", "adapter"))
    assert everything(root)["tensors"] == 11
    merge(root, "--as", "adapter", pair=("original", "adapter"))
    assert everything(root)["tensors"] == 2
    merge(root, pair=("original", "unlearned+adapter"))
    assert everything(root)["unlearned"] == "unlearned+adapter"


def test_variants_of_a_grid_come_out_again(root: Path) -> None:
    words = ("original", "unlearned", "--alphas", "0,0.5,2", "--with-references", "-o", "grid")
    assert run_here("grid", *words, cwd=root).code == 0
    variants = sorted(path.parent for path in root.glob("grid/*/uipe_merge.json"))
    assert len(variants) == 5
    for variant in variants:
        everything(root, out=variant)


def test_a_model_in_an_object_store(root: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = "memory://verify-deep/out"
    with contextlib.chdir(root):
        api.merge(*PAIR, url, alpha=2.0, progress=False)
        found = api.verify(url, deep=Deep(sample=1.0), progress=False)
    fsspec.filesystem("memory").rm("/verify-deep", recursive=True)
    assert found.problems == []
    assert found.recomputed is not None
    assert found.recomputed.blocks == 11


def test_it_says_what_was_computed(root: Path) -> None:
    merge(root)
    result = verify(root, "--blocks", 4, "--seed", 1)
    assert result.code == 0
    first, second = result.out.splitlines()
    assert first.endswith("all as written")
    assert second.startswith("4 of 11 blocks, of 4 tensors, ")
    assert second.endswith("bit for bit what original and unlearned make")
    assert "recomputed" not in json.loads(run_here("verify", "out", "--json", cwd=root).out)


def test_the_seed_draws_the_blocks(root: Path) -> None:
    drawn = [frozenset(Deep(blocks=3, seed=seed).drawn(100)) for seed in range(20)]
    assert len(set(drawn)) > 15
    assert drawn[4] == Deep(blocks=3, seed=4).drawn(100)
    assert len(Deep(blocks=300).drawn(100)) == len(Deep(sample=1.0).drawn(100)) == 100
    assert len(Deep(sample=0.101).drawn(100)) == 11
    assert len(Deep(sample=1e-9).drawn(100)) == 1


@pytest.mark.parametrize("element", [0, 100, 255])
def test_one_flipped_bit_is_found_though_every_hash_fits(root: Path, element: int) -> None:
    out = merge(root)
    name = shard_of(out, Q)
    flip(out / name, Q, element)
    rehash(out, name)
    there = int(load_file(out / name)[Q].view(torch.int16).view(-1)[element]) & 0xFFFF
    said = (
        f"'{name}' differs from what its inputs make, in tensor '{Q}' first at element {element}: "
        f"0x{there:04x}, computed 0x{there ^ 1:04x}"
    )
    assert_refused(verify(root, "--sample", 1), 4, said, "or an input is no longer what it was")
    found = api.verify(out, deep=Deep(1.0, original=str(root / "original"), unlearned=str(root / "unlearned")), progress=False)  # fmt: skip
    assert found.problems == [said]


@pytest.mark.parametrize("options", [RECIPES["copies"], RECIPES["low rank"]], ids=["copy", "rank"])
def test_a_flipped_bit_of_another_step(root: Path, options: tuple[object, ...]) -> None:
    out = merge(root, *options)
    name = shard_of(out, "steps")
    flip(out / name, "steps", 2, width=8)
    rehash(out, name)
    assert_refused(verify(root, "--sample", 1), 4, "in tensor 'steps' first at element 2: 0x0")


def test_every_tensor_that_differs_is_named_in_order(root: Path) -> None:
    out = merge(root)
    names = list(load_file(out / "model-00001-of-00002.safetensors"))
    changed = [name for name in names if name not in ("empty", "steps")]
    for name in changed:
        flip(out / "model-00001-of-00002.safetensors", name, 0)
    rehash(out, "model-00001-of-00002.safetensors")
    with contextlib.chdir(root):
        problems = api.verify(out, deep=Deep(1.0, threads=3), progress=False).problems
    places = {name: place(out / "model-00001-of-00002.safetensors", name) for name in changed}
    in_order = sorted(changed, key=places.__getitem__)
    assert [line.split("tensor '")[1].split("'")[0] for line in problems] == in_order


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("alpha", 2.0000000001, "records other numbers"),
        ("alpha", 2.5, "differs from what its inputs make"),
        ("dtype", "float32", "has other tensors than the recipe makes"),
        ("rounding", "stochastic", "differs from what its inputs make"),
        ("max_shard_bytes", 4096, "which the recipe makes, is missing"),
        ("alpha_rules", [["*.q_proj.*", 2.5]], f"'{Q}'"),
        ("away_from", "original", "has other groups than the recipe makes"),
        ("alpha", "2", "its recipe is damaged"),
        ("alpha", None, "its recipe is damaged"),
        ("alpha_rules", [["*"]], "its recipe is damaged"),
        ("alpha_rules", 1, "its recipe is damaged"),
        ("alpha_layers", [[{}, 1]], "its recipe is damaged"),
        ("unheard_of", 1, "its recipe is damaged: has the unknown key 'unheard_of'"),
        ("along", {"new": []}, "its recipe is damaged"),
    ],
)
def test_a_wrong_recipe_in_the_manifest(root: Path, key: str, value: object, said: str) -> None:
    out = merge(root)
    edit(out, lambda manifest: manifest["recipe"].update({key: value}))
    assert_refused(verify(root, "--sample", 1), 4, said)


def test_records_that_do_not_come_out(root: Path) -> None:
    out = merge(root, "--away-from", "original")
    edit(out, lambda manifest: manifest["tensors"][Q].update(effective_alpha=1.99))
    group = next(iter(json.loads((out / "uipe_merge.json").read_text())["groups"]))
    edit(out, lambda manifest: manifest["groups"][group].update(kappa=9.0, norm=0.0, alpha=9.0))
    result = verify(root, "--sample", 1)
    assert_refused(result, 4, f"other numbers of tensor '{Q}'", f"of group '{group}'")


def test_another_index_though_its_hash_fits(root: Path) -> None:
    out = merge(root)
    name = "model.safetensors.index.json"
    (out / name).write_text((out / name).read_text().replace("00001-of", "00002-of"))
    rehash(out, name)
    assert_refused(verify(root), 4, f"'{name}' is not that of these tensors")


def test_inputs_that_moved(root: Path) -> None:
    out = merge(root, "--along", "related", "--add", "unlearned@@related=0.1")
    away = root.parent / "away"
    away.mkdir()
    for name in ("original", "unlearned", "related"):
        shutil.copytree(root / name, away / name)  # with other times
        shutil.rmtree(root / name)
    given = ("--original", away / "original", "--unlearned", away / "unlearned")
    assert_refused(verify(root), 2, "original", "is not there; say where it is now with --original")
    assert_refused(verify(root, *given), 2, "related", "no such directory")
    again = everything(
        root, *given, "--moved", f"related={away / 'related'}", "--moved", f"unlearned={away / 'unlearned'}"
    )  # fmt: skip
    assert again["original"] == str(away / "original")
    assert everything(root.parent, *given, "--moved", f"related={away / 'related'}", "--moved", f"unlearned={away / 'unlearned'}", out=shutil.copytree(out, root.parent / "copied"))  # fmt: skip


def test_a_name_of_a_directory_that_is_gone_is_asked_of_no_hub(root: Path) -> None:
    (root / "deep").mkdir()
    (root / "original").rename(root / "deep/original")
    merge(root, pair=("deep/original", "unlearned"))
    shutil.rmtree(root / "deep")
    assert_refused(verify(root), 2, "deep/original", "is not there")


def test_inputs_that_changed(root: Path) -> None:
    merge(root)
    file = root / "unlearned" / "model-00001-of-00002.safetensors"
    name = next(name for name, each in load_file(file).items() if each.ndim == 2 and len(each))
    flip(file, name, 1)
    assert_refused(verify(root, "--sample", 1), 4, f"'{name}' first at element 1")
    tensors = {**load_file(file), "more": torch.zeros(1)}
    save_file(tensors, file, metadata={"format": "pt"})
    index = root / "unlearned" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["more"] = file.name
    index.write_text(json.dumps(document))
    result = verify(root, "--sample", 1)
    assert result.code == 5
    write_checkpoint(root / "unlearned", moved(random_tensors(dtype=torch.float32)), shards=2)
    write_checkpoint(root / "original", random_tensors(dtype=torch.float32), shards=2)
    result = verify(root)
    assert_refused(result, 5, "original: is not what the model was made from", "--original")
    (root / "original" / "model-00002-of-00002.safetensors").unlink()
    assert_refused(verify(root), 4, "no such file")


def test_another_checkpoint_of_the_same_kind_gives_other_bytes(root: Path) -> None:
    merge(root)
    assert_refused(verify(root, "--sample", 1, "--original", "related"), 4, "differs from what")


def test_other_numeric_code(root: Path) -> None:
    out = merge(root)
    edit(out, lambda manifest: manifest["tool"].update(numerics=99, version="9.9"))
    said = ("numeric code 99, this version has 1", "use uipe-merge 9.9 for --deep")
    assert_refused(verify(root), 4, *said)
    assert run_here("verify", "out", cwd=root).code == 0
    edit(out, lambda manifest: manifest.update(tool=[]))
    assert_refused(verify(root), 4, "its tool is damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"command": 1},
        {"command": "uipe-merge 'original"},
        {"command": "uipe-merge original"},
        {"inputs": None},
        {"inputs": {}},
        {"inputs": {"original": {"shards": 1}, "unlearned": {}}},
        {"inputs": {"original": {"shards": [1]}, "unlearned": {"shards": []}}},
        {"recipe": []},
        {"tensors": 1},
        {"groups": 1},
    ],
)
def test_a_manifest_that_does_not_say_enough(root: Path, change: dict[str, object]) -> None:
    out = merge(root)
    edit(out, lambda manifest: manifest.update(change))
    assert_refused(verify(root, "--sample", 1), 4, "is damaged")


def test_shards_that_are_damaged_too(root: Path) -> None:
    out = merge(root)
    (out / "model-00001-of-00002.safetensors").unlink()
    file = out / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    said = ("00001-of-00002.safetensors' is missing", "has other tensors than the recipe makes")
    assert_refused(verify(root, "--sample", 1), 4, *said)


def test_a_link_out_of_the_model_is_not_read(root: Path) -> None:
    out = merge(root)
    (out / "model-00001-of-00002.safetensors").rename(root / "elsewhere")
    (out / "model-00001-of-00002.safetensors").symlink_to(root / "elsewhere")
    assert_refused(verify(root), 6, "outside its directory")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--deep", "--sample", 0), "cannot draw the share 0"),
        (("--deep", "--sample", 1.5), "cannot draw the share 1.5"),
        (("--deep", "--sample", "nan"), "cannot draw the share nan"),
        (("--deep", "--blocks", 0), "cannot draw 0 blocks"),
        (("--deep", "--blocks", 1, "--sample", 0.5), "both --sample and --blocks"),
        (("--deep", "--moved", "related"), "is not NAME=NOW"),
        (("--seed", 1), "--seed says nothing without --deep"),
        (("--allow-pickle",), "--allow-pickle says nothing without --deep"),
    ],
)
def test_options_that_make_no_sense(root: Path, options: tuple[object, ...], said: str) -> None:
    assert_refused(run_here("verify", "out", *options, cwd=root), 2, said)


def test_pickles_need_leave_again(root: Path) -> None:
    tensors = load_file(root / "unlearned" / "model-00001-of-00002.safetensors")
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors, root / "pickled" / "pytorch_model.bin")
    write_checkpoint(root / "one", tensors)
    merge(root, "--allow-pickle", pair=("one", "pickled"))
    assert_refused(verify(root), 6, "--allow-pickle")
    assert everything(root, "--allow-pickle")["unlearned"] == "pickled"


def test_from_python(root: Path) -> None:
    out = merge(root)
    with contextlib.chdir(root):
        found = api.verify(out, deep=True, progress=False)
    assert found.recomputed is not None
    assert found.recomputed.blocks == 2  # a tenth, rounded up
    with pytest.raises(UsageError, match="is not there"):
        api.verify(out, deep=True, progress=False)
    write_checkpoint(root / "wide", {"a": torch.zeros(2)})
    deep = Deep(original=str(root / "wide"), unlearned=str(root / "wide"))
    with pytest.raises(IncompatibleModelsError, match="is not what the model was made from"):
        api.verify(out, deep=deep, progress=False)
