"""Group B of the hazards: an index and shards that contradict one another, or lead astray.

Exit 4, and 6 where a path or a link would leave the directory. Each row is met through the
command line, as the original in a process of its own and as the unlearned checkpoint in this
one. Shards that are no files must not keep the program waiting.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import merged, refuse_merge, tree
from damage import (
    FIRST,
    INDEX,
    SAMPLE,
    SECOND,
    Damage,
    directory,
    drop,
    edit_shard,
    fifo,
    link,
    map_sample_to,
    mixed_sets,
    outside,
    put,
    replace_map,
    rewrite,
    stale_single,
    unnamed_weights,
)
from helpers import assert_refused, contents, random_tensors, run_here, write_pair
from hostile import filled, numbered, refuse_started, refuse_within_memory

from uipe_merge.checkpoint.strict_json import MOST_BYTES

NORM = "model.norm.weight"
LACKING = edit_shard(SECOND, lambda tensors: [tensors.pop(name) for name in ("empty", NORM)])
EXTRA = edit_shard(SECOND, lambda tensors: tensors.update(x1=torch.ones(1), x2=torch.ones(1)))
TWICE = edit_shard(SECOND, lambda tensors: tensors.update({SAMPLE: torch.ones(1)}))

# What the hazards' list calls the row: the damage, the exit code, what the message says.
ROWS: dict[str, tuple[Damage, int, list[str]]] = {
    "../../x as shard": (
        map_sample_to("../../x"),
        6,
        [INDEX, SAMPLE, "'../../x' is not a plain file"],
    ),
    "/etc/passwd as shard": (
        map_sample_to("/etc/passwd"),
        6,
        [INDEX, SAMPLE, "'/etc/passwd' is not"],
    ),
    "C:\\x as shard": (
        map_sample_to("C:\\x"),
        6,
        [INDEX, SAMPLE, "'C:\\x' is not a plain file name"],
    ),
    "a/b as shard": (map_sample_to("a/b"), 6, [INDEX, SAMPLE, "'a/b' is not a plain file name"]),
    ".. as shard": (map_sample_to(".."), 6, [INDEX, SAMPLE, "'..' is not a plain file name"]),
    "the index as shard": (map_sample_to(INDEX), 4, [INDEX, SAMPLE, "is not a .safetensors file"]),
    "shard name with ESC": (
        map_sample_to("\x1b[2J.safetensors"),
        4,
        [INDEX, r"\x1b[2J.safetensors", "has control characters in its name"],
    ),
    "shard name of 300 bytes": (
        map_sample_to("x" * 300 + ".safetensors"),
        4,
        ["its name is too long"],
    ),
    "shard symlinked outside the directory": (outside, 6, [SECOND, "elsewhere", "outside"]),
    "shard is a link to /dev/zero": (link(SECOND, "/dev/zero"), 6, [SECOND, "link to /dev/zero"]),
    "shard is a link to itself": (link(SECOND, SECOND), 4, [SECOND, "is a link to itself"]),
    "shard is a link to nothing": (link(SECOND, "gone"), 4, [SECOND, "no such file"]),
    "shard is a FIFO": (fifo(SECOND), 4, [SECOND, "is a FIFO, not a regular file"]),
    "shard is a directory": (directory(SECOND), 4, [SECOND, "is a directory, not a regular file"]),
    "index is a FIFO": (fifo(INDEX), 4, [INDEX, "is a FIFO, not a regular file"]),
    "index is a link to /dev/zero": (link(INDEX, "/dev/zero"), 6, [INDEX, "link to /dev/zero"]),
    "index is a directory": (directory(INDEX), 4, [f"holds shards but no {INDEX}"]),
    "config is a FIFO": (fifo("config.json"), 4, ["config.json", "is a FIFO"]),
    "tokenizer is a FIFO": (fifo("tokenizer.json"), 4, ["tokenizer.json", "is a FIFO"]),
    "shard missing": (drop(SECOND), 4, [SECOND, "no such file; download the checkpoint again"]),
    "all shards missing": (drop(FIRST, SECOND), 4, ["lacks 2 of the 2 shards", FIRST, SECOND]),
    "index names tensors its shard lacks": (
        LACKING,
        4,
        [f"'{name}' is not in {SECOND}, where the index says it is" for name in ("empty", NORM)],
    ),
    "shard holds tensors the index lacks": (
        EXTRA,
        4,
        [f"'x1' is in {SECOND} but the index lacks it", f"'x2' is in {SECOND} but the index lacks"],
    ),
    "index names another shard": (
        map_sample_to(SECOND),
        4,
        [f"'{SAMPLE}' is in {FIRST} but the index says {SECOND}"],
    ),
    "tensor in two shards": (TWICE, 4, [f"'{SAMPLE}' is in {FIRST} and in {SECOND}"]),
    "weight_map a list": (replace_map([FIRST, SECOND]), 4, [INDEX, "has no weight_map"]),
    "weight_map null": (replace_map(None), 4, [INDEX, "has no weight_map"]),
    "weight_map empty": (replace_map({}), 4, [INDEX, "has no weight_map"]),
    "weight_map of numbers": (map_sample_to(1), 4, [INDEX, SAMPLE, "is mapped to no file name"]),
    "weight_map of null": (map_sample_to(None), 4, [INDEX, SAMPLE, "is mapped to no file name"]),
    "duplicate keys": (
        put(INDEX, f'{{"weight_map":{{"w":"{FIRST}","w":"{SECOND}"}}}}'),
        4,
        [INDEX, "duplicate key 'w'"],
    ),
    "index empty": (put(INDEX, ""), 4, [INDEX, "is not valid"]),
    "index cut off": (put(INDEX, '{"weight_map": {"w": "model-000'), 4, [INDEX, "is not valid"]),
    "index that is a git-lfs pointer": (put(INDEX, "version https://git-lfs"), 4, [INDEX, "valid"]),
    "index nested deeply": (put(INDEX, '{"weight_map":' * 99_999), 4, [INDEX, "nested too deeply"]),
    "both model.safetensors and an index": (
        stale_single,
        4,
        [f"holds both model.safetensors and {INDEX}", "remove the one that is stale"],
    ),
    "shards without an index": (drop(INDEX), 4, [f"holds shards but no {INDEX}", "download the"]),
    "mixed -of-00002 and -of-00003": (mixed_sets, 4, ["shards of 2 different sets", "stale"]),
    "weights of other names without an index": (
        unnamed_weights,
        4,
        ["holds a.safetensors; b.safetensors and no index"],
    ),
    "config that is not JSON": (put("config.json", "{"), 4, ["config.json", "is not valid JSON"]),
    "config that is a list": (put("config.json", "[]"), 4, ["config.json", "not a JSON object"]),
    "config of 5 MB": (put("config.json", " " * 5_000_000), 4, ["config.json", "5000000 bytes"]),
}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("row", ROWS)
def test_as_the_original(tmp_path: Path, row: str) -> None:
    damage, code, fragments = ROWS[row]
    original, _ = write_pair(tmp_path, shards=2)
    damage(original)
    refuse_started(tmp_path, code, f"error: {original}", *fragments)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("row", ROWS)
def test_as_the_unlearned(tmp_path: Path, row: str) -> None:
    damage, code, fragments = ROWS[row]
    _, unlearned = write_pair(tmp_path, shards=2)
    damage(unlearned)
    refuse_merge(tmp_path, code, f"error: {unlearned}", *fragments)


def test_many_contradictions_are_named_at_once_and_the_rest_counted(tmp_path: Path) -> None:
    original, _ = write_pair(tmp_path, shards=2)
    extra = {f"extra.{number}": torch.ones(1) for number in range(30)}
    edit_shard(FIRST, lambda tensors: tensors.update(extra))(original)
    LACKING(original)  # two more
    result = refuse_merge(tmp_path, 4, "contradict one another", "'extra.0'", "; and 12 more")
    assert result.err.count("the index lacks it") == 20


@pytest.mark.parametrize(
    "index",
    [
        lambda: filled(numbered(f'"#":"{FIRST}"'), MOST_BYTES - 20),
        lambda: filled(numbered('"#":"#.safetensors"'), 9_000_000),
        lambda: filled(numbered('"#":"😀.safetensors"'), 17_000_000),
        lambda: b"[" + b"[]," * 8_000_000 + b"0]",
    ],
    ids=["600 k tensors", "300 k shards", "wide characters", "8 M lists"],
)
def test_memory_stays_bounded(tmp_path: Path, index: Callable[[], bytes]) -> None:
    original, _ = write_pair(tmp_path, shards=2)
    (original / INDEX).write_bytes(b'{"weight_map":' + index() + b"}")
    refuse_within_memory(tmp_path, 4, str(original))


def test_an_index_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    original, _ = write_pair(tmp_path, shards=2)
    os.truncate(original / INDEX, 10**10)  # sparse
    arguments = (original, tmp_path / "unlearned", "--alpha", 2, "-o", tmp_path / "out")
    result = run_here(*arguments, cwd=tmp_path)
    assert_refused(result, 4, f"{INDEX}: is 10000000000 bytes, more than the {MOST_BYTES}")
    assert not (tmp_path / "out").exists()


class TestAccepted:
    def test_total_size_off_by_one_warns(self, tmp_path: Path) -> None:
        original, _ = write_pair(tmp_path, shards=2)
        total = sum(tensor.nbytes for tensor in random_tensors().values())
        rewrite(original, lambda document: document["metadata"].update(total_size=total + 1))
        result = merged(tmp_path, "--dry-run")
        warnings = [line for line in result.err.splitlines() if line.startswith("warning:")]
        assert any(
            f"{original}: the index says total_size is {total + 1}" in line
            and f"the tensors have {total} bytes" in line
            for line in warnings
        )

    @pytest.mark.parametrize(
        "metadata", [None, {}, [], {"total_size": None}, {"total_size": 1e400}], ids=str
    )
    def test_no_metadata(self, tmp_path: Path, metadata: object) -> None:
        for model in write_pair(tmp_path, shards=2):
            rewrite(model, lambda document: {**document, "metadata": metadata})
        assert "total_size" not in merged(tmp_path, "--dry-run").err

    def test_no_metadata_key_at_all(self, tmp_path: Path) -> None:
        for model in write_pair(tmp_path, shards=2):
            rewrite(model, lambda document: {"weight_map": document["weight_map"]})
        merged(tmp_path, "--dry-run")

    def test_an_index_that_names_model_safetensors_itself(self, tmp_path: Path) -> None:
        for model in write_pair(tmp_path):
            weight_map = dict.fromkeys(random_tensors(), "model.safetensors")
            (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        merged(tmp_path, "--dry-run")

    def test_a_stray_shard_is_left_alone_with_a_warning(self, tmp_path: Path) -> None:
        original, _ = write_pair(tmp_path, shards=2)
        shutil.copy(original / FIRST, original / "model-00001-of-00003.safetensors")
        result = merged(tmp_path, "--dry-run")
        assert "model-00001-of-00003.safetensors not part of the model, ignored" in result.err

    def test_the_links_of_the_hub_cache_are_followed(self, tmp_path: Path) -> None:
        plain = tmp_path / "plain"
        write_pair(plain, shards=2)
        for side in ("original", "unlearned"):
            snapshot = in_hub_cache(plain / side, tmp_path / f"models--org--{side}")
            (tmp_path / side).symlink_to(snapshot)
        caches = [tmp_path / "models--org--original", tmp_path / "models--org--unlearned"]
        before = [tree(cache) for cache in caches]
        merged(tmp_path)
        merged(plain)
        linked, copied = contents(tmp_path / "out"), contents(plain / "out")
        described = {"README.md", "uipe_merge.json"}  # name their inputs
        assert linked.keys() == copied.keys()
        assert all(linked[name] == copied[name] for name in linked.keys() - described)
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
        assert [tree(cache) for cache in caches] == before


def in_hub_cache(model: Path, repository: Path) -> Path:
    """Lay a model out as the Hugging Face cache does: blobs by digest, and links to them."""
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot
