"""Shared by the tests: tiny checkpoints, hostile files, and the program as a subprocess."""

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import numpy as np

CONFIG: dict[str, object] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


class Result(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str


def run_cli(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    before: Callable[[], None] | None = None,
) -> Result:
    """Run ``uipe-merge`` as a user does; a hang fails the test.

    ``before`` runs in the child first, to give up a privilege or set a limit there.
    """
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "uipe_merge",
            *(os.fspath(_text(argument)) for argument in arguments),
        ],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **(env or {})},
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
        preexec_fn=before,
    )
    out, err = (stream.decode("utf-8", "replace") for stream in (finished.stdout, finished.stderr))
    return Result(finished.returncode, out, err)


def run_here(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Result:
    """The command line in this process: all but ``main``, and no start to wait for."""
    from uipe_merge.cli.app import _run

    out, err = io.StringIO(), io.StringIO()
    environment = patch.dict(os.environ, {"NO_COLOR": "1", "COLUMNS": "200", **(env or {})})
    with environment, chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err):
        code = _run([os.fsdecode(_text(argument)) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def shards_written(
    paths: tuple[Path, Path], output: Path, block: int, width: int
) -> tuple[dict[str, bytes], object]:
    """Run the engine alone with blocks of ``block`` elements: the shards and their records."""
    from uipe_merge import job
    from uipe_merge.engine import write_shards
    from uipe_merge.executors import Serial, Threads
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.output.lock import hold
    from uipe_merge.output.staging import Staging
    from uipe_merge.progress import Silent
    from uipe_merge.recipe import Recipe

    prepared = job.prepare(*paths, output, Recipe(0.3))
    filesystem = LocalFileSystem()
    staging = Staging(filesystem, prepared.output)
    with hold(staging.partial):
        staging.begin({"block": block}, overwrite=False)
        executor = Serial() if width == 1 else Threads(width)
        [records] = write_shards(
            [prepared.plan], prepared.pair, [staging], filesystem, executor, Silent(), block=block
        )
        return contents(staging.model), records


def _text(value: object) -> str | bytes | os.PathLike[str]:
    return value if isinstance(value, str | bytes | os.PathLike) else str(value)


def random_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A small model's worth of tensors of many shapes: 0-d, empty, one element, matrices."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    return {
        "model.embed_tokens.weight": draw(64, 16),
        "model.layers.0.self_attn.q_proj.weight": draw(16, 16),
        "model.layers.0.mlp.down_proj.weight": draw(16, 40),
        "model.layers.1.self_attn.q_proj.weight": draw(16, 16),
        "model.layers.1.mlp.down_proj.weight": draw(16, 40),
        "model.norm.weight": draw(16),
        "scale": draw(),
        "empty": draw(0, 3),
        "one": draw(1),
        "lm_head.weight": draw(64, 16),
    }


def moved(
    tensors: Mapping[str, torch.Tensor], seed: int = 1, size: float = 0.01
) -> dict[str, torch.Tensor]:
    """The same tensors with a Gaussian update added, as an unlearned model has."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            (tensor.double() + torch.randn(tensor.shape, generator=generator) * size).to(
                tensor.dtype
            )
            if tensor.is_floating_point()
            else tensor.clone()
        )
        for name, tensor in tensors.items()
    }


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = CONFIG,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a checkpoint directory: safetensors (sharded round-robin), index, config, files."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = (
            "model.safetensors"
            if shards == 1
            else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {key: tensors[key].contiguous() for key in names[number::shards]}
        save_file(part, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_pair(
    root: Path, *, shards: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, Path]:
    """Write ``original`` and ``unlearned`` under ``root`` and return the two."""
    tensors = random_tensors(dtype=dtype)
    original = write_checkpoint(root / "original", tensors, shards=shards)
    unlearned = write_checkpoint(root / "unlearned", moved(tensors), shards=shards)
    return original, unlearned


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file by hand: ``header`` is JSON bytes, or a value to be dumped."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes, for comparing whole outputs."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def bits(tensor: torch.Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """The bytes of a tensor, to compare exactly (NaN, signed zero and all)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def assert_refused(result: Result, code: int, *fragments: str) -> None:
    """One line on stderr with every fragment, the exit code, no traceback, no data."""
    assert result.code == code, result
    assert "Traceback" not in result.err, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.err
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])
    assert not any(ord(character) < 32 for character in lines[0]), lines[0]
