"""What a file from outside may be, as bytes, and what must hold whatever they are.

A target takes bytes, reads them as one kind of file, and raises where that does anything but
succeed or refuse by an error of our tree. ``tests/fuzz/fuzz_one.py`` drives them by coverage,
``test_fuzzing.py`` by hypothesis.
"""

import json
import math
import pickletools
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fakes import MemoryFile, MemoryFolder
from safetensors import SafetensorError, deserialize

from uipe_merge.checkpoint import pickled, unpickler_child
from uipe_merge.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import encode_header, read_header
from uipe_merge.checkpoint.index import INDEX_NAME, read_index
from uipe_merge.checkpoint.model import open_checkpoint
from uipe_merge.drawing import Deep
from uipe_merge.errors import CorruptInputError, UipeMergeError, escape
from uipe_merge.output.manifest import parse_manifest
from uipe_merge.recipe import Recipe
from uipe_merge.recipe_file import read_recipe, write_recipe
from uipe_merge.recorded import Record
from uipe_merge.study import layouts
from uipe_merge.study.gridfile import read_grid

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

LONGEST_MESSAGE = 12_000

_BASE = {
    "model.layers.0.q_proj.weight": ("F32", (4, 4)),
    "model.layers.1.q_proj.weight": ("F32", (4, 4)),
}


def shard(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A shard of zeros."""
    rows = [
        (name, DTYPES[dtype], shape, math.prod(shape) * DTYPES[dtype].bits // 8)
        for name, (dtype, shape) in tensors.items()
    ]
    return encode_header(rows) + bytes(sum(row[3] for row in rows))


SINGLE = shard(_BASE)
FACTORS = shard(
    {
        f"base_model.model.model.layers.{number}.q_proj.lora_{half}.weight": ("F32", shape)
        for number in range(2)
        for half, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
)


class Guarded(MemoryFolder):
    """A folder that is asked for its own files and nothing else."""

    def open_file(self, name: str) -> MemoryFile:
        assert name == Path(name).name, name
        return super().open_file(name)


def refusal(read: Callable[[], object]) -> UipeMergeError | None:
    """What something is refused with, in one line that drives no terminal; else ``None``."""
    try:
        read()
    except UipeMergeError as error:
        line = str(error)
        assert line == escape(line)
        assert len(line) < LONGEST_MESSAGE
        assert type(error).exit_code > 1  # noqa: PT017 - no test: what is refused is looked at
        return error
    return None


def by_library(raw: bytes) -> Tensors | None:
    """What the safetensors library makes of a file."""
    try:
        found = deserialize(raw)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found}


def by_us(raw: bytes) -> Tensors | None:
    """What we make of it."""
    file = MemoryFile("some/file", raw)
    try:
        header = read_header(file, "file")
    except CorruptInputError as error:
        line = str(error)
        assert line.startswith("some/file: ")
        assert line == escape(line)
        return None
    found: Tensors = {}
    for spec in header.tensors:
        content = bytearray(spec.nbytes)
        file.read_into(memoryview(content), spec.offset)
        found[spec.name] = spec.dtype.name, spec.shape, bytes(content)
        assert spec.elements == math.prod(spec.shape)
        assert spec.file == "file"
    return found


def header(raw: bytes) -> None:
    """A shard: what we accept the library accepts, and reads alike."""
    found = by_us(raw)
    if found is not None:
        assert by_library(raw) == found


def header_json(raw: bytes) -> None:
    """The JSON of a header, with a length that fits and data of any kind behind a NUL."""
    text, _, data = raw.partition(b"\0")
    header(struct.pack("<Q", len(text)) + text + data)


def index(raw: bytes) -> None:
    """An index: every shard that it may name is beside it."""
    folder = Guarded({INDEX_NAME: raw})

    def read() -> None:
        for name in read_index(folder, INDEX_NAME).weight_map.values():
            assert name == Path(name).name
            assert name not in (".", "..")
            assert "\\" not in name

    refusal(read)
    refusal(lambda: open_checkpoint(Guarded({**folder.files, "model-1.safetensors": SINGLE})))


def config(raw: bytes) -> None:
    """A ``config.json`` beside a model."""
    folder = Guarded({"config.json": raw, "model.safetensors": SINGLE})
    refusal(lambda: open_checkpoint(folder, dequantize=True))


def adapter(raw: bytes) -> None:
    """An ``adapter_config.json`` beside factors, on a model."""
    base = open_checkpoint(Guarded({"model.safetensors": SINGLE}))
    folder = Guarded({CONFIG_NAME: raw, WEIGHTS_NAME: FACTORS})

    def read() -> None:
        opened = open_adapter(folder, base)
        for spec in opened.tensors.values():
            assert all(math.isfinite(factor.scale) for factor in spec.factors)

    refusal(read)


def adapter_weights(raw: bytes) -> None:
    """The weights of an adapter."""
    base = open_checkpoint(Guarded({"model.safetensors": SINGLE}))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    folder = Guarded({CONFIG_NAME: json.dumps(settings).encode(), WEIGHTS_NAME: raw})
    refusal(lambda: open_adapter(folder, base))


def recipe(raw: bytes, ending: str) -> None:
    """A recipe, which can be written and read back where it was read."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, f"recipe{ending}")
        path.write_bytes(raw)
        found: list[Recipe] = []
        refusal(lambda: found.append(read_recipe(path)))
        if found:
            back = path.with_suffix(".yaml")
            back.write_text(write_recipe(found[0]))
            assert read_recipe(back) == found[0]
            json.dumps(found[0].canonical(), allow_nan=False)
            found[0].words()


def recipe_yaml(raw: bytes) -> None:
    """A recipe in YAML."""
    recipe(raw, ".yaml")


def recipe_toml(raw: bytes) -> None:
    """A recipe in TOML."""
    recipe(raw, ".toml")


def recipe_json(raw: bytes) -> None:
    """A recipe in JSON."""
    recipe(raw, ".json")


def manifest(raw: bytes) -> None:
    """A manifest: no file of it is outside, and what ``verify --deep`` takes of it is checked."""

    def read() -> None:
        document, files = parse_manifest(raw, "OUT/uipe_merge.json")
        for name, record in files.items():
            assert ".." not in name.split("/")
            assert not name.startswith("/")
            assert record.size >= 0
        record_of = Record(document, "OUT/uipe_merge.json")
        refusal(lambda: record_of.arguments(Deep(), record_of.recipe({})))
        base = open_checkpoint(Guarded({"model.safetensors": SINGLE}))
        refusal(lambda: record_of.require_inputs([base, base]))

    refusal(read)


def grid(raw: bytes) -> None:
    """A ``grid.json``: every variant is below it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "grid.json").write_bytes(raw)

        def read() -> None:
            for variant in read_grid(Path(name))[1]:
                assert "/" not in variant.name
                assert variant.path is None or ".." not in variant.path.split("/")
                assert variant.alpha is None or math.isfinite(variant.alpha)

        refusal(read)


def scores(raw: bytes) -> None:
    """A file of scores, under any of the names that are looked for."""
    for name in (
        "TOFU_SUMMARY.json",
        "TOFU_EVAL.json",
        "results_2026-01-31T12-00-00.json",
        "eval_log_aggregated.json",
        "scores.json",
        "aggregate_stat.csv",
    ):

        def read(name: str = name) -> None:
            for record in layouts.parse(raw, Path("scores", name))[0]:
                assert all(type(value) is float for value in record.values.values())
                record.about("uipe-1", "uipe", 1.0)

        refusal(read)


def pickle_rows(raw: bytes) -> None:
    """The pickle of a ``.bin``, read as the child does, and its rows as the parent takes them.

    The child's limits are its process's, so what only they stop is stopped here by a length.
    """
    try:
        # A memo or a string of gigabytes is what the child's limit of memory is for.
        if any(type(said) is int and said > 1000 for _, said, _ in pickletools.genops(raw)):
            return
        rows = json.loads(json.dumps(unpickler_child.describe(raw)))
    except Exception:  # noqa: BLE001 - as the child, which says so and ends
        return
    file = MemoryFile("some/file.bin", bytes(4096))
    storages = {"0": pickled.Entry(64, 1024), "1": pickled.Entry(2048, 16)}

    def read() -> None:
        for row in rows:
            spec = pickled.spec_of(row, storages, file, "file.bin")
            assert spec.offset >= 0
            assert spec.offset + spec.nbytes <= 4096
            assert spec.elements == math.prod(spec.shape)
            encode_header([(spec.name, spec.dtype, spec.shape, spec.nbytes)])

    refusal(read)


def archive(raw: bytes) -> None:
    """A ``.bin``, as a zip archive; a pickle in it is one that holds nothing."""
    file = MemoryFile("some/file.bin", raw)

    def read() -> None:
        storages, found = pickled.entries_of(file)
        for entry in (*storages.values(), found):
            assert entry.offset >= 0
            assert entry.offset + entry.size <= len(raw)

    refusal(read)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        header,
        header_json,
        index,
        config,
        adapter,
        adapter_weights,
        recipe_yaml,
        recipe_toml,
        recipe_json,
        manifest,
        grid,
        scores,
        pickle_rows,
        archive,
    )
}


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def seeds() -> dict[str, list[bytes]]:
    """Files to begin with, for every target."""
    import io
    import zipfile

    import torch

    buffer = io.BytesIO()
    torch.save({"a.weight": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, buffer)
    with zipfile.ZipFile(buffer) as zipped:
        pickle = zipped.read(next(name for name in zipped.namelist() if name.endswith("data.pkl")))
    said = {
        "alpha": 2.0,
        "alpha_rules": [{"match": "*.mlp.*", "alpha": 3}],
        "alpha_layers": {"0": 0, "16": 2},
        "dtype": "auto",
        "max_shard_size": "5GB",
        "seed": 7,
        "rounding": "stochastic",
        "along": [{"new": "related"}],
        "min_cos": 0.1,
        "max_alpha": 4.0,
        "away_from": {"new": "a", "old": "b"},
        "always": True,
        "rank": 4,
        "control": "random",
        "granularity": "tensor",
        "add": [{"new": "a", "beta": 0.5}],
    }
    side = {
        "location": "a",
        "shards": [{"name": "model.safetensors", "size": 1, "header_sha256": "0"}],
    }
    document = {
        "schema": 1,
        "tool": {"name": "uipe-merge", "version": "0", "numerics": 1},
        "command": "uipe-merge a b --alpha 2 -o c",
        "recipe": {**said, "alpha_rules": [["*", 3.0]], "alpha_layers": [[0, 1.0]]},
        "inputs": {"original": side, "unlearned": side},
        "files": {"model.safetensors": {"size": 8, "sha256": "0" * 64}},
    }
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"layers.0.q_proj": 2, "model\\.layers\\.[01]\\.(q|k)_proj": 2},
        "alpha_pattern": {"^model.*q_proj$": 8},
        "use_rslora": True,
        "target_parameters": ["q_proj.weight"],
        "modules_to_save": None,
    }
    variant = {"name": "uipe-1", "path": "uipe-1", "alpha": 1.0, "family": "uipe"}
    return {
        "header": [SINGLE, FACTORS],
        "header_json": [SINGLE[8:], b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0x'],
        "index": [
            _dumped({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_BASE, "model-1.safetensors")})
        ],
        "config": [
            _dumped({"model_type": "llama", "architectures": ["X"], "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}})
        ],
        "adapter": [_dumped(settings)],
        "adapter_weights": [FACTORS],
        "recipe_yaml": [
            b"alpha: 2\nalpha_layers: {0: 0, 16: 2}\nmax_shard_size: 5GB\n",
            write_recipe(Recipe(2.0, seed=3)).encode(),
            _dumped(said),
        ],
        "recipe_toml": [b'alpha = 2\nalong = [{new = "a"}]\n[alpha_layers]\n0 = 1.5\n'],
        "recipe_json": [_dumped(said)],
        "manifest": [_dumped(document)],
        "grid": [_dumped({"schema": 1, "variants": [variant, {**variant, "name": "a"}]})],
        "scores": [
            _dumped({"forget_quality": 0.1, "model_utility": None, "x": {"agg_value": math.nan}}),
            _dumped({"results": {"mmlu": {"acc,none": 0.5, "acc_stderr,none": 1}}}),
            _dumped({"tool": "uipe-merge evaluate", "schema": 1, "parts": {"a": {"b": 1}}}),
            _dumped({name: {"avg_gt_loss": {"0": 1.0}, "avg_paraphrased_loss": {"0": 1.0}, "average_perturb_loss": {"0": [1.0]}, "rougeL_recall": {"0": 1.0}} for name in ("eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json")}),
            b"variant,alpha,Forget Quality\nuipe-1,1,0.5\n",
        ],
        "pickle_rows": [pickle],
        "archive": [buffer.getvalue()],
    }  # fmt: skip
