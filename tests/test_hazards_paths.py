"""Where the output may go and what may be read, group G of the hazards.

Refused with 8, or with 2 where the arguments contradict one another; nothing is touched.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import (
    bind_by_permissions,
    merge_command,
    refuse,
    refuse_merge,
    require_binding_permissions,
    tree,
)
from helpers import Result, assert_refused, contents, run_cli, write_checkpoint

MODEL = {"model.layers.0.mlp.down_proj.weight": torch.ones(2, 2).bfloat16()}
FILES = {"tokenizer.json": "{}", "sub/chat.jinja": "{{ x }}"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with ``original`` and ``unlearned``."""
    write_checkpoint(tmp_path / "original", MODEL)
    write_checkpoint(tmp_path / "unlearned", {k: 2 * v for k, v in MODEL.items()}, files=FILES)
    return tmp_path


@pytest.fixture(scope="module")
def unprivileged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], None]:
    """What a child runs to be bound by permissions."""
    require_binding_permissions(tmp_path_factory.mktemp("probe"))
    return bind_by_permissions


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount something at ``tmp_path/mounted``; unmounted afterwards."""
    target = tmp_path / "mounted"
    target.mkdir()
    done = False

    def perform(*options: object) -> Path:
        nonlocal done
        command = ["mount", *map(str, options), str(target)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            pytest.skip(f"may not mount here: {finished.stderr.strip()}")
        done = True
        return target

    yield perform
    if done:
        subprocess.run(["umount", str(target)], check=True)


def merge_to(root: Path, output: object, *extra: object) -> Result:
    result = run_cli(*merge_command(root, output, *extra), cwd=root)
    assert "Traceback" not in result.err
    return result


def denied(root: Path, before: Callable[[], None], *arguments: object, names: object) -> None:
    """The arguments are refused with 8, "permission denied" and the name of what denies it."""
    result = run_cli(*arguments, cwd=root, before=before)
    assert_refused(result, 8, str(names), "permission denied")
    assert "not found" not in result.err
    assert "no such" not in result.err


# ------------------------------------------------------------ the output and the inputs


@pytest.mark.parametrize(
    ("output", "problem", "extra"),
    [
        ("original", "is an input", ()),
        ("unlearned/", "is an input", ()),
        ("./original/../original//", "is an input", ()),
        ("link", "is an input", ("--overwrite",)),
        ("original/out", "lies in the input", ("--overwrite",)),
        ("link/deep/out", "lies in the input", ()),
        (".", "contains the input", ("--overwrite",)),
        ("/", "contains the input", ()),
    ],
)
def test_output_equals_lies_in_contains_or_links_to_an_input(
    root: Path, output: str, problem: str, extra: tuple[str, ...]
) -> None:
    (root / "link").symlink_to("unlearned")
    refuse(root, 2, problem, "choose another output", arguments=merge_command(root, output, *extra))


def test_input_given_by_a_link_into_the_output(root: Path) -> None:
    (root / "holder").mkdir()
    (root / "original").rename(root / "holder" / "model")
    (root / "original").symlink_to("holder/model")
    refuse(root, 2, "contains the input", arguments=merge_command(root, "holder"))


@pytest.mark.parametrize("output", ["mounted", "mounted/out"])
def test_output_is_or_lies_in_a_bind_mount_of_an_input(
    root: Path, mount: Callable[..., Path], output: str
) -> None:
    mount("--bind", root / "unlearned")
    problem = "is an input" if output == "mounted" else "lies in the input"
    refuse(root, 2, problem, arguments=merge_command(root, output))


# ------------------------------------------------------------ what is there already


def test_output_exists_and_is_not_empty(root: Path) -> None:
    (root / "out").mkdir()
    (root / "out" / "thesis.tex").write_text("three years of work")
    refuse_merge(root, 8, "exists and is not empty", "choose another output")
    extra = ("--overwrite",)
    refuse_merge(root, 8, "not written by this tool", "remove it yourself", extra=extra)


@pytest.mark.parametrize("extra", [(), ("--overwrite",)])
def test_output_is_a_file(root: Path, extra: tuple[str, ...]) -> None:
    (root / "out").write_bytes(b"kept")
    refuse_merge(root, 8, "exists and is not a directory", extra=extra)


@pytest.mark.parametrize("extra", [(), ("--overwrite",)])
def test_output_is_an_empty_directory_and_is_used(root: Path, extra: tuple[str, ...]) -> None:
    (root / "out").mkdir()
    assert merge_to(root, "out", *extra).code == 0
    assert (root / "out" / "uipe_merge.json").is_file()


def test_overwrite_replaces_a_model_of_this_tool_whole(root: Path) -> None:
    assert merge_to(root, "out").code == 0
    (root / "out" / "stale.safetensors").write_bytes(b"stale")
    refuse_merge(root, 8, "exists and is not empty", "--overwrite")
    (root / "unlearned" / "tokenizer.json").write_text('{"new": 1}')
    assert merge_to(root, "out", "--overwrite").code == 0
    assert (root / "out" / "tokenizer.json").read_text() == '{"new": 1}'
    assert not (root / "out" / "stale.safetensors").exists()
    assert sorted(os.listdir(root)) == ["original", "out", "unlearned"]


def test_output_through_a_link_is_made_where_it_points(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "out").symlink_to("elsewhere/model")
    assert merge_to(root, "out").code == 0
    assert (root / "out").is_symlink()
    assert (root / "elsewhere" / "model" / "uipe_merge.json").is_file()


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("missing/out", "no such directory"),
        ("original/config.json/out", "lies in the input"),
        ("file/out", "is not a directory"),
        ("file/deeper/out", ""),
    ],
)
def test_parent_of_the_output_is_no_directory(root: Path, output: str, problem: str) -> None:
    (root / "file").write_bytes(b"")
    code = 2 if "input" in problem else 8
    refuse(root, code, problem, arguments=merge_command(root, output))


# ------------------------------------------------------------ permissions


def test_read_only_directory(root: Path, unprivileged: Callable[[], None]) -> None:
    (root / "shelf").mkdir(mode=0o555)
    before = tree(root)
    denied(root, unprivileged, *merge_command(root, "shelf/out"), names=root / "shelf")
    assert tree(root) == before


@pytest.mark.parametrize(("locked", "mode"), [("shelf", 0), ("shelf/out", 0), ("shelf/out", 0o444)])
def test_output_that_may_not_be_looked_at(
    root: Path, unprivileged: Callable[[], None], locked: str, mode: int
) -> None:
    (root / "shelf" / "out").mkdir(parents=True)
    (root / "shelf" / "out" / "uipe_merge.json").write_text("{}")
    (root / locked).chmod(mode)
    arguments = merge_command(root, "shelf/out", "--overwrite")
    denied(root, unprivileged, *arguments, names="shelf")
    (root / locked).chmod(0o755)
    assert contents(root / "shelf") == {"out/uipe_merge.json": b"{}"}


def test_working_directory_that_is_gone(root: Path) -> None:
    (root / "gone").mkdir()

    def leave_it() -> None:
        os.chdir(root / "gone")
        (root / "gone").rmdir()

    result = run_cli("original", "unlearned", "--alpha", 0, "-o", "out", before=leave_it)
    assert_refused(result, 8, "no such file or directory")


@pytest.mark.parametrize(
    "locked",
    [
        "unlearned/model.safetensors",
        "original/model.safetensors",
        "original/config.json",
        "unlearned/tokenizer.json",
        "unlearned/sub",
        "unlearned/sub/chat.jinja",
        "original",
    ],
)
def test_input_mode_0000(root: Path, unprivileged: Callable[[], None], locked: str) -> None:
    (root / locked).chmod(0)
    denied(root, unprivileged, *merge_command(root, "out"), names=locked)
    assert sorted(os.listdir(root)) == ["original", "unlearned"]
    (root / locked).chmod(0o755)


# ------------------------------------------------------------ file systems


def test_output_is_a_mount_point(root: Path, mount: Callable[..., Path]) -> None:
    mount("-t", "tmpfs", "none")
    refuse(root, 8, "is a mount point", "inside it", arguments=merge_command(root, "mounted"))


def test_output_on_another_file_system(root: Path, mount: Callable[..., Path]) -> None:
    mounted = mount("-t", "tmpfs", "-o", "size=40m", "none")
    assert mounted.stat().st_dev != root.stat().st_dev
    assert merge_to(root, "mounted/out").code == 0
    assert os.listdir(mounted) == ["out"]
    assert run_cli("verify", mounted / "out").code == 0


def test_file_system_that_is_too_small(root: Path, mount: Callable[..., Path]) -> None:
    mount("-t", "tmpfs", "-o", "size=1m", "none")
    refuse(root, 8, "needs 16", "are free", arguments=merge_command(root, "mounted/out"))
