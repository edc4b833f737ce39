"""``verify``: everything that may have happened to a published model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import bind_by_permissions, require_binding_permissions
from helpers import assert_refused, run_cli, run_here, write_checkpoint

from uipe_merge import api

MODEL = {f"model.layers.{n}.mlp.down_proj.weight": torch.full((4, 4), float(n)) for n in range(3)}
FIRST, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model of three shards and some sidecars; not to be changed."""
    root = tmp_path_factory.mktemp("published")
    write_checkpoint(root / "original", MODEL, shards=3)
    files = {"tokenizer.json": "{}", "sub/x.txt": "x", "empty.txt": ""}
    write_checkpoint(root / "unlearned", MODEL, shards=3, files=files)
    result = run_cli("original", "unlearned", "--alpha", 0, "-o", "out", cwd=root)
    assert result.code == 0, result
    return root / "out"


@pytest.fixture
def out(published: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(published, tmp_path / "out"))


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest."""
    path = out / "uipe_merge.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def problems(out: Path) -> list[str]:
    """What the API finds; the command line must refuse with 4 and name all of it."""
    found = api.verify(out, progress=False).problems
    result = run_here("verify", out, cwd=out.parent)
    assert_refused(result, 4, str(out), "differs from its manifest", *found)
    assert result.out == ""
    shown = run_here("verify", out, "--json", cwd=out.parent)
    assert shown.code == 4
    document = json.loads(shown.out)
    assert document["ok"] is False
    assert document["problems"] == found
    return found


def test_untouched_model(published: Path) -> None:
    names = {
        path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()
    }
    found = api.verify(published, progress=False)
    assert found.problems == found.notes == []
    assert found.files == len(names) - 1  # all but the manifest itself
    assert found.bytes == sum(os.path.getsize(published / n) for n in names - {"uipe_merge.json"})
    result = run_cli("verify", published)
    assert result.code == 0
    assert result.out.endswith("all as written\n")
    assert result.err == ""
    shown = json.loads(run_here("verify", published, "--json", cwd=published).out)
    assert shown == {**shown, "ok": True, "files": found.files, "problems": [], "notes": []}


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json", "README.md", "sub/x.txt"])
def test_flipped_byte(out: Path, name: str) -> None:
    content = bytearray((out / name).read_bytes())
    content[-1] ^= 1
    (out / name).write_bytes(content)
    assert problems(out) == [f"'{name}' has the right size and other bytes"]


@pytest.mark.parametrize("change", [-1, 1])
def test_one_byte_short_or_long(out: Path, change: int) -> None:
    content = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(content[:-1] if change < 0 else content + b"\0")
    size = len(content)
    assert problems(out) == [f"'{FIRST}' has {size + change} bytes, not {size}"]


def test_emptied_and_filled_empty_file(out: Path) -> None:
    (out / "tokenizer.json").write_bytes(b"")
    (out / "empty.txt").write_bytes(b"full")
    assert problems(out) == [
        "'empty.txt' has 4 bytes, not 0",
        "'tokenizer.json' has 0 bytes, not 2",
    ]


@pytest.mark.parametrize("name", [FIRST, "sub/x.txt", "empty.txt"])
def test_missing(out: Path, name: str) -> None:
    (out / name).unlink()
    assert problems(out) == [f"'{name}' is missing"]


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_file_replaced_by_something_else(out: Path, kind: str) -> None:
    path = out / "tokenizer.json"
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        (out.parent / "same.json").write_text("{}")
        path.symlink_to("../same.json")
    else:
        os.mkfifo(path)
    assert problems(out) == ["'tokenizer.json' is missing"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "sub/pytorch_model.bin", "adapter_config.json", "TOFU_EVAL.json"]
)
def test_extra_file_that_changes_what_is_loaded_or_believed(out: Path, name: str) -> None:
    (out / name).write_bytes(b"extra")
    assert problems(out) == [f"'{name}' was not written by the merge"]


def test_extra_harmless_file_is_only_noted(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    (out / "sub" / ".more").write_text("mine")
    found = api.verify(out, progress=False)
    assert found.problems == []
    assert found.notes == [
        "'notes.txt' is not in the manifest",
        "'sub/.more' is not in the manifest",
    ]
    result = run_here("verify", out, cwd=out)
    assert result.code == 0
    assert result.err.splitlines() == found.notes
    assert run_here("verify", out, "-q", cwd=out)[:] == (0, "", "")


def test_all_that_differs_is_named_at_once(out: Path) -> None:
    (out / FIRST).unlink()
    (out / "config.json").write_bytes(b"{}")
    (out / "old.safetensors").write_bytes(b"")
    assert len(problems(out)) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"files": []}',
        b"\xff{}",
        b'{"files": {}, "files": {}}',
        pytest.param(b"[" * 100_000, id="nested"),
        b'{"files": {}, "schema": 2}',
        b'{"files": {}, "schema": "1"}',
    ],
)
def test_damaged_manifest(out: Path, content: bytes) -> None:
    (out / "uipe_merge.json").write_bytes(content)
    assert_refused(run_here("verify", out, cwd=out), 4, "uipe_merge.json")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"size": 2},
        {"size": "2", "sha256": "0" * 64},
        {"size": 2, "sha256": "0" * 63},
        {"size": 2, "sha256": "G" * 64},
        {"size": True, "sha256": "0" * 64},
        {"size": 2.0, "sha256": "0" * 64},
        {"size": 2, "sha256": 0},
    ],
)
def test_damaged_entry(out: Path, entry: object) -> None:
    edit(out, lambda manifest: manifest["files"].update({"tokenizer.json": entry}))
    assert_refused(run_here("verify", out, cwd=out), 4, "damaged entry for 'tokenizer.json'")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "..", ""])
def test_traversal_in_the_manifest(out: Path, name: str) -> None:
    (out.parent / "secret").write_text("{}")
    edit(
        out, lambda manifest: manifest["files"].update({name: manifest["files"]["tokenizer.json"]})
    )
    assert_refused(run_here("verify", out, cwd=out), 4, f"damaged entry for '{name}'")


def test_name_with_control_characters_is_escaped(out: Path) -> None:
    name = "a\n\x1b[2J\x00"
    edit(
        out, lambda manifest: manifest["files"].update({name: manifest["files"]["tokenizer.json"]})
    )
    assert_refused(run_here("verify", out, cwd=out), 4, r"'a\n\x1b[2J\x00' is missing")


def test_not_a_directory_and_no_manifest(out: Path) -> None:
    cases = {
        out.parent / "nowhere": "no such directory",
        out / "config.json": "no such directory",
        out / "sub": "has no uipe_merge.json",
    }
    for path, fragment in cases.items():
        result = run_here("verify", path, cwd=out)
        assert_refused(result, 2, str(path), fragment, "a directory written by uipe-merge")
    (out / "uipe_merge.json").unlink()
    assert_refused(run_here("verify", out, cwd=out), 2, "has no uipe_merge.json")


@pytest.mark.parametrize("locked", ["uipe_merge.json", FIRST, "."])
def test_what_may_not_be_read(out: Path, locked: str) -> None:
    require_binding_permissions(out.parent)
    (out / locked).chmod(0)
    result = run_cli("verify", out, before=bind_by_permissions)
    (out / locked).chmod(0o755)
    assert_refused(result, 8, "permission denied")
