"""Odd names of outputs and inputs, links among the sidecars, and modes: group G of the hazards."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from cli_tools import merge_command, merged, refuse, refuse_merge
from helpers import Result, assert_refused, contents, run_cli, write_checkpoint

from uipe_merge.output.place import partial_directory

MODEL = {"model.layers.0.mlp.down_proj.weight": torch.ones(2, 2).bfloat16()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with ``original`` and ``unlearned``."""
    files = {"tokenizer.json": "{}", "sub/chat.jinja": "{{ x }}"}
    write_checkpoint(tmp_path / "original", MODEL)
    write_checkpoint(tmp_path / "unlearned", MODEL, files=files)
    return tmp_path


def merge_to(root: Path, output: object) -> Result:
    result = run_cli(*merge_command(root, output), cwd=root)
    assert "Traceback" not in result.err
    return result


# ------------------------------------------------------------ names


@pytest.mark.parametrize("output", ["a" * 256, "ü" * 128, f"{'d' * 256}/out", "x/" * 2100 + "out"])
def test_name_that_no_file_system_takes(root: Path, output: str) -> None:
    refuse(root, 8, "too long", arguments=merge_command(root, output))


@pytest.mark.parametrize("output", ["a" * 250, "a" * 255, "ü" * 125])
def test_name_of_250_bytes(root: Path, output: str) -> None:
    assert merge_to(root, output).code == 0
    assert sorted(os.listdir(root)) == sorted(["original", "unlearned", output])
    assert run_cli("verify", output, cwd=root).code == 0


def test_partial_name_fits_and_belongs_to_one_output(tmp_path: Path) -> None:
    names = [letter * count for letter in ("a", "b", "ü") for count in (1, 120, 125)]
    names += ["a" * 250, "a" * 254 + "b", "a" * 255]
    partials = [partial_directory(tmp_path / name) for name in names]
    assert len(set(partials)) == len(names)
    for partial in partials:
        assert partial.parent == tmp_path
        partial.mkdir()  # the file system takes it
    assert partials[0].name == ".a.uipe-partial"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(b"out\xff", id="non-UTF-8"),
        pytest.param(b"out\n\x1b[31m", id="control characters"),
        pytest.param("ausgabe für α, 'é'".encode(), id="accents, spaces, quotes"),
        pytest.param(b"[red]out[bold]", id="markup"),
    ],
)
def test_odd_name_of_the_output(root: Path, name: bytes) -> None:
    result = merge_to(root, name)
    assert result.code == 0, result
    assert "\x1b" not in result.out
    assert (os.fsencode(root) + b"/" + name) in [
        entry.path for entry in os.scandir(os.fsencode(root))
    ]
    verified = run_cli("verify", name, cwd=root)
    assert verified.code == 0, verified
    assert_refused(merge_to(root, name), 8, "exists and is not empty")


def test_inputs_and_sidecars_with_names_that_are_not_utf8(root: Path) -> None:
    base = os.fsencode(root)
    with open(base + b"/unlearned/notes\xe9.txt", "wb") as file:
        file.write(b"kept")
    os.rename(base + b"/unlearned", base + b"/unlearned\xff")
    arguments = (root / "original", base + b"/unlearned\xff", "--alpha", 0, "-o", root / "out")
    for shown in (("--dry-run", "--json"), ("--dry-run",), ("--json",)):
        result = run_cli(*arguments, *shown)
        assert result.code == 0, result
    with open(base + b"/out/notes\xe9.txt", "rb") as file:
        assert file.read() == b"kept"
    verified = run_cli("verify", root / "out")
    assert verified.code == 0, verified


def test_leading_dash(root: Path) -> None:
    (root / "original").rename(root / "-original")
    (root / "unlearned").rename(root / "--alpha")
    arguments = ("--alpha", "0", "-o", "-out", "--", "-original", "--alpha")
    result = run_cli(*arguments, cwd=root)
    assert result.code == 0, result
    made = contents(root / "-out")
    recorded = shlex.split(json.loads(made["uipe_merge.json"])["command"])
    shutil.rmtree(root / "-out")
    again = run_cli(*recorded[1:], cwd=root)  # what was recorded is a command that does the same
    assert again.code == 0, again
    assert contents(root / "-out")["model.safetensors"] == made["model.safetensors"]
    assert run_cli("verify", "--", "-out", cwd=root).code == 0


@pytest.mark.parametrize("output", ["out/", "out//", "./out/."])
def test_trailing_slash(root: Path, output: str) -> None:
    result = merge_to(root, output)
    assert result.code == 0, result
    assert sorted(os.listdir(root)) == ["original", "out", "unlearned"]


# ------------------------------------------------------------ sidecars


def test_sidecar_that_is_a_symlink_to_etc_shadow(root: Path) -> None:
    (root / "unlearned" / "vocab.json").symlink_to("/etc/shadow")
    refuse_merge(root, 6, "unlearned/vocab.json", "link to /etc/shadow", "outside its directory")


@pytest.mark.parametrize("target", ["../secret.txt", "sub/../../secret.txt", "hop"])
def test_sidecar_that_links_out_of_its_checkpoint(root: Path, target: str) -> None:
    (root / "secret.txt").write_text("secret")
    (root / "original" / "sub").mkdir()
    (root / "original" / "a.txt").symlink_to(target)
    if target == "hop":  # by way of another link
        (root / "original" / "hop").symlink_to("../secret.txt")
    refuse_merge(root, 6, "original/a.txt", "outside its directory", "the file itself")


def test_sidecar_that_is_a_fifo_a_loop_or_dangling(root: Path) -> None:
    odd = root / "unlearned" / "odd.txt"
    os.mkfifo(odd)
    refuse_merge(root, 4, "odd.txt", "is a FIFO, not a regular file")
    odd.unlink()
    odd.symlink_to("odd.txt")
    refuse_merge(root, 4, "odd.txt", "is a link to itself")
    odd.unlink()
    odd.symlink_to("gone.txt")
    refuse_merge(root, 4, "odd.txt", "no such file")


def test_sidecar_that_links_inside_its_checkpoint_is_copied_as_a_file(root: Path) -> None:
    (root / "unlearned" / "alias.json").symlink_to("tokenizer.json")
    merged(root, alpha=0)
    copied = root / "out" / "alias.json"
    assert not copied.is_symlink()
    assert copied.read_text() == "{}"


# ------------------------------------------------------------ modes


@pytest.mark.parametrize(
    ("umask", "file_mode", "directory_mode"),
    [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)],
)
def test_umask_decides_the_modes(
    root: Path, umask: int, file_mode: int, directory_mode: int
) -> None:
    for source in (root / "unlearned").rglob("*"):
        source.chmod(0o777)  # modes of the inputs are not carried over

    def restrict() -> None:
        os.umask(umask)

    assert run_cli(*merge_command(root, "out"), before=restrict, cwd=root).code == 0
    modes: dict[bool, set[int]] = {True: set(), False: set()}
    for entry in [root / "out", *(root / "out").rglob("*")]:
        modes[entry.is_dir()].add(entry.stat().st_mode & 0o7777)
    assert modes == {True: {directory_mode}, False: {file_mode}}
