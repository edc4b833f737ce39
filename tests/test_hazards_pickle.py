"""Hazards, group D: pickled checkpoints. Read as data, never run, refused where odd."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import (
    CONFIG,
    assert_refused,
    moved,
    random_tensors,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
)

import uipe_merge

FLAG = "--allow-pickle"


def write_bin(path: Path, tensors: object, name: str = "pytorch_model.bin") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path / name)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def hostile(path: Path, payload: bytes, **entries: bytes) -> Path:
    """A `.bin` whose data.pkl is `payload`; other entries by name, `__` for `/`."""
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", payload)
        for name, content in entries.items():
            archive.writestr("m/" + name.replace("__", "/"), content)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def described(rows: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]]) -> bytes:
    """The pickle of a state dict: name → (storage elements, offset, shape, stride), float32."""
    # Written by hand, opcode by opcode, as torch.save writes it.
    out = io.BytesIO()
    out.write(b"\x80\x02}(")
    for name, (elements, offset, shape, stride) in rows.items():
        out.write(pickle.dumps(name, 2)[2:-1])
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        out.write(b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000")
        out.write(b"X\x03\x00\x00\x00cpu" + pickle.dumps(elements, 2)[2:-1] + b"tQ")
        out.write(pickle.dumps(offset, 2)[2:-1])
        out.write(pickle.dumps(shape, 2)[2:-1] + pickle.dumps(stride, 2)[2:-1])
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")
    out.write(b"u.")
    return out.getvalue()


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "original", {"w": torch.zeros(4, 4)})


def test_hazard_bin_by_default_is_refused_naming_the_flag(tmp_path: Path, original: Path) -> None:
    unlearned = write_bin(tmp_path / "unlearned", {"w": torch.ones(4, 4)})
    result = run_cli(original, unlearned, "--alpha", 1, "-o", tmp_path / "out")
    assert_refused(result, 6, "pytorch_model.bin", FLAG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded with an index"])
def test_with_the_flag_bin_gives_what_safetensors_gives(tmp_path: Path, sharded: bool) -> None:
    tensors = random_tensors() | {"position_ids": torch.arange(7)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    update = moved(tensors)
    plain = [write_checkpoint(tmp_path / "o", tensors), write_checkpoint(tmp_path / "u", update)]
    assert run_here(*plain, "--alpha", 2, "-o", tmp_path / "plain").code == 0

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied: one storage
    first = write_bin(tmp_path / "original", tensors)
    second = tmp_path / "unlearned"
    if sharded:
        names = list(update)
        files = {
            name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)
        }
        for file in sorted(set(files.values())):
            write_bin(second, {n: update[n] for n in names if files[n] == file}, file)
        index = {"metadata": {}, "weight_map": files}
        (second / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        write_bin(second, update)
    result = run_cli(first, second, "--alpha", 2, "-o", tmp_path / "out", FLAG)
    assert result.code == 0, result.err
    expected, found = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    shards = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    expected_shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert shards == (expected_shards if sharded else {"model.safetensors"})
    assert FLAG in (tmp_path / "out" / "README.md").read_text()


def test_inspect_takes_the_flag_too(tmp_path: Path) -> None:
    first = write_bin(tmp_path / "original", {"w": torch.zeros(4, 4)})
    second = write_bin(tmp_path / "unlearned", {"w": torch.ones(4, 4)})
    result = run_here("inspect", first, second, "--json", FLAG)
    assert result.code == 0, result.err
    assert json.loads(result.out)["total"]["norm"] == 4.0


def test_hazard_os_system_reduce_does_not_run(tmp_path: Path, original: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {canary}",)

    for number, payload in enumerate(
        [
            pickle.dumps({"w": Evil()}, 2),
            f"cos\nsystem\n(S'touch {canary}'\ntR.".encode(),
            f"(S'touch {canary}'\nios\nsystem\n.".encode(),
            b"cbuiltins\nexec\n(S'open(\"" + str(canary).encode() + b'","w")\'\ntR.',
        ]
    ):
        unlearned = hostile(tmp_path / f"unlearned{number}", payload)
        result = run_cli(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
        assert_refused(result, 6, "pytorch_model.bin", "does not need")
    assert not canary.exists()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x80\x02}r\xff\xff\xff\x3f.", id="LONG_BINPUT 0x3fffffff"),
        pytest.param(b"\x80\x02" + b"(" * 100_000 + b".", id="nothing but marks"),
        pytest.param(b"\x80\x02]q\x00" + b"(h\x00" * 1000 + b".", id="a list of itself"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 8, id="a string of 2**64 bytes"),
        pytest.param(b"", id="empty"),
        pytest.param(pickle.dumps([1, 2], 2), id="no dict"),
        pytest.param(pickle.dumps({"model": {"w": 1}}, 2), id="nested"),
    ],
)
def test_hazard_odd_pickles_are_refused_in_bounded_memory(
    tmp_path: Path, original: Path, payload: bytes
) -> None:
    unlearned = hostile(tmp_path / "unlearned", payload)
    command = [original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG]
    result = run_cli(*command)
    assert_refused(result, 6, "pytorch_model.bin")


def test_hazard_compressed_entry_is_refused_before_it_is_inflated(
    tmp_path: Path, original: Path
) -> None:
    unlearned = tmp_path / "unlearned"
    unlearned.mkdir()
    with (
        zipfile.ZipFile(unlearned / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("m/data.pkl", "w") as bomb,
    ):
        for _ in range(64):
            bomb.write(bytes(2**24))  # 1 GiB of zeros in 1 MB
    result = run_cli(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
    assert_refused(result, 6, "compressed entry")


# A process of its own does the waiting: what is counted as the child's begins with its parent's.
WAITING = (
    "import os, subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-m', 'uipe_merge', *sys.argv[1:]])\n"
    "_, status, usage = os.wait4(child.pid, 0)\n"
    "print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)\n"
)


@pytest.mark.parametrize("hazard", ["a memo of a billion", "a zip bomb"])
def test_hazard_pickles_end_within_512_mib(tmp_path: Path, original: Path, hazard: str) -> None:
    unlearned = tmp_path / "unlearned"
    if hazard == "a zip bomb":
        unlearned.mkdir()
        with (
            zipfile.ZipFile(unlearned / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("m/data.pkl", "w") as bomb,
        ):
            for _ in range(64):
                bomb.write(bytes(2**24))
    else:
        hostile(unlearned, b"\x80\x02}r\xff\xff\xff\x3f.")
    command = (original, unlearned, "--alpha", "1", "-o", tmp_path / "out", FLAG)
    finished = subprocess.run(
        [sys.executable, "-c", WAITING, *command], capture_output=True, text=True, check=True
    )
    code, peak = map(int, finished.stdout.split())  # KiB, of the program and of its own children
    assert code in (4, 6), finished.stderr
    assert peak < 512 * 1024


def test_hazard_entry_that_climbs_out_and_entry_twice(tmp_path: Path, original: Path) -> None:
    pickled = described({"w": (16, 0, (4, 4), (4, 1))})
    for number, names in enumerate([["m/data.pkl", "../evil"], ["m/data.pkl", "m/../../evil"]]):
        unlearned = tmp_path / f"unlearned{number}"
        unlearned.mkdir()
        with zipfile.ZipFile(unlearned / "pytorch_model.bin", "w") as archive:
            for name in names:
                archive.writestr(name, pickled)
        result = run_here(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
        assert_refused(result, 6, "outside its own folder")
    unlearned = tmp_path / "twice"
    unlearned.mkdir()
    with zipfile.ZipFile(unlearned / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("m/data.pkl", pickled)
    result = run_here(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
    assert_refused(result, 6, "twice")


@pytest.mark.parametrize(
    ("row", "storage", "code", "message"),
    [
        pytest.param((16, 1, (4, 4), (4, 1)), 64, 4, "outside its storage", id="offset past"),
        pytest.param((16, 0, (5, 4), (4, 1)), 64, 4, "outside its storage", id="shape past"),
        pytest.param((32, 0, (4, 4), (4, 1)), 64, 4, "cut off", id="storage cut off"),
        pytest.param((16, 0, (4, 4), (1, 4)), 64, 5, "transposed", id="transposed"),
        pytest.param((16, 0, (4, 4), (0, 0)), 64, 5, "strided", id="stride 0"),
    ],
)
def test_hazard_stride_or_offset_past_storage(
    tmp_path: Path,
    original: Path,
    row: tuple[int, int, tuple[int, ...], tuple[int, ...]],
    storage: int,
    code: int,
    message: str,
) -> None:
    unlearned = hostile(tmp_path / "unlearned", described({"w": row}), data__0=bytes(storage))
    result = run_here(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
    assert_refused(result, code, "tensor 'w'", message)


def test_the_hand_written_pickle_is_one_that_merges(tmp_path: Path, original: Path) -> None:
    data = torch.arange(16.0).numpy().tobytes()
    pickled = described({"w": (16, 0, (4, 4), (4, 1))})
    unlearned = hostile(tmp_path / "unlearned", pickled, data__0=data)
    result = run_here(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
    assert result.code == 0, result.err
    assert torch.equal(read_tensors(tmp_path / "out")["w"], torch.arange(16.0).reshape(4, 4) * 2)


def test_hazard_legacy_non_zip_and_truncated(tmp_path: Path, original: Path) -> None:
    unlearned = tmp_path / "legacy"
    unlearned.mkdir()
    torch.save(
        {"w": torch.ones(4, 4)},
        unlearned / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    result = run_here(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", FLAG)
    assert_refused(result, 6, "old kind")
    cut = write_bin(tmp_path / "cut", {"w": torch.ones(4, 4)})
    raw = (cut / "pytorch_model.bin").read_bytes()
    (cut / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])
    result = run_here(original, cut, "--alpha", 1, "-o", tmp_path / "out", FLAG)
    assert result.code in (4, 6), result
    assert "pytorch_model.bin" in result.err


def test_hazard_no_unpickler_of_torch_is_called_and_old_ones_are_refused() -> None:
    """Before 2.10 ``weights_only`` could be got round; here it is not relied on at all."""
    root = Path(uipe_merge.__file__).parent
    modules = {path: path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    called = re.compile(r"\b(torch\.load|pickle\.loads?|pickle\.Unpickler)\b")
    callers = {path.name for path, text in modules.items() if called.search(text)}
    # One's ``find_class`` knows seven names; the other unpickles what it pickled on that line.
    assert callers == {"unpickler_child.py", "ray.py"}
    requirements = metadata.requires("uipe-merge") or []
    assert [each for each in requirements if re.match(r"torch\b", each)] == ["torch<3,>=2.10"]
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
