"""What the program prints, where, and when it prints nothing."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_tools import merged
from helpers import Result, assert_refused, contents, run_cli, write_checkpoint

NAME = "model.layers.0.mlp.down_proj.weight"
MODEL = {NAME: torch.ones(2, 2)}
COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-7]m")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair and ``model``, which was merged from it; no test changes them."""
    root = tmp_path_factory.mktemp("pair")
    write_checkpoint(root / "original", MODEL)
    write_checkpoint(root / "unlearned", {NAME: torch.full((2, 2), 2.0)})
    assert cli(root, "original", "unlearned", "--alpha", "0", "-o", "model").code == 0
    return root


def cli(root: Path, *arguments: str) -> Result:
    result = run_cli(*arguments, cwd=root)
    assert "Traceback" not in result.err
    return result


def plan(*extra: str) -> tuple[str, ...]:
    return ("original", "unlearned", "--alpha", "1", "-o", "out", "--dry-run", *extra)


# ------------------------------------------------------------ JSON


@pytest.mark.parametrize("verbosity", [(), ("-q",), ("-v",)])
def test_json_of_a_merge_is_all_of_stdout(
    root: Path, tmp_path: Path, verbosity: tuple[str, ...]
) -> None:
    arguments = ("original", "unlearned", "--alpha", "0", "-o", str(tmp_path / "out"))
    result = cli(root, *arguments, "--json", *verbosity)
    assert result.code == 0
    report = json.loads(result.out)
    assert report["output"] == str(tmp_path / "out")
    assert report["summary"]["alpha"] == 0
    assert ("tensors" in report) == (verbosity == ("-v",))
    assert result.err == ""


def test_json_of_dry_run_inspect_and_verify_is_all_of_stdout(root: Path) -> None:
    shown = cli(root, *plan("--json"))
    assert json.loads(shown.out)["operations"]["extrapolate"]["tensors"] == 1
    inspected = cli(root, "inspect", "original", "unlearned", "--json", "--alpha", "0.5")
    found = json.loads(inspected.out)
    assert found["alphas"] == [0.5]
    assert found["total"]["norm"] == 2.0  # four elements that moved by 1
    verified = cli(root, "verify", "model", "--json")
    assert json.loads(verified.out)["ok"] is True
    assert shown.err == inspected.err == verified.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("original", "nowhere", "--alpha", "1", "-o", "out", "--json"),
        ("original", "unlearned", "--alpha", "nan", "-o", "out", "--json"),
        ("inspect", "original", "nowhere", "--json"),
        ("verify", "original", "--json"),
    ],
)
def test_json_of_a_refusal_is_nothing(root: Path, arguments: tuple[str, ...]) -> None:
    result = cli(root, *arguments)
    assert result.code in (2, 3)
    assert result.out == ""
    assert result.err.startswith("error: ")


# ------------------------------------------------------------ quiet, bars, colours


def test_quiet_prints_nothing_on_success(root: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    # Identical inputs: even the warning is left out.
    result = cli(root, "original", "original", "--alpha", "2", "-o", out, "-q")
    assert result == Result(0, "", "")
    assert cli(root, "verify", out, "-q") == Result(0, "", "")


def test_quiet_still_prints_errors(root: Path) -> None:
    result = cli(root, "original", "unlearned", "--alpha", "nan", "-o", "out", "--quiet")
    assert_refused(result, 3, "alpha")


def test_no_bar_and_no_escape_sequences_when_not_on_a_terminal(root: Path, tmp_path: Path) -> None:
    arguments = ("original", "unlearned", "--alpha", "0", "-o", str(tmp_path / "out"))
    result = run_cli(*arguments, cwd=root, env={"NO_COLOR": "", "TERM": "xterm-256color"})
    assert result.code == 0
    assert result.err == ""
    assert "\x1b" not in result.out
    assert "tensors copied" in result.out


def terminal(root: Path, *arguments: str, env: dict[str, str]) -> tuple[int, bytes]:
    """Run the program on a terminal; its exit code and all that appeared there."""
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    leader, follower = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "uipe_merge", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=follower,
            cwd=root,
            env={**clean, "TERM": "xterm-256color", "COLUMNS": "120", **env},
        )
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end was closed
            while piece := os.read(leader, 65536):
                shown += piece
        return process.wait(timeout=60), shown
    finally:
        os.close(leader)


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_honoured_on_a_terminal(
    root: Path, tmp_path: Path, env: dict[str, str], coloured: bool
) -> None:
    code, shown = terminal(root, "verify", "nowhere", env=env)
    assert code == 2
    assert b"error:" in shown
    assert bool(COLOUR.search(shown)) == coloured, shown
    arguments = ("original", "unlearned", "--alpha", "0", "-o", str(tmp_path / "out"))
    code, shown = terminal(root, *arguments, env=env)
    assert code == 0
    assert b"model.safetensors" in shown, "the bar names the shard in hand"
    assert bool(COLOUR.search(shown)) == coloured, shown


def test_tensor_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    name = "layer[red]\u202e.weight"  # markup of rich, and right-to-left override
    for side in ("original", "unlearned"):
        write_checkpoint(tmp_path / side, {name: torch.ones(1)})
    result = cli(tmp_path, *plan("-v"))
    assert result.code in (0, 4)
    assert "\u202e" not in result.out + result.err
    assert "[red]" in result.out + result.err


# ------------------------------------------------------------ streams that are gone


SHELL_LINES = [
    "{} --help",
    "{} --version",
    "{} verify model",
    "{} verify model --json",
    "{} original unlearned --alpha 1 -o out --dry-run -v",
    "{} original unlearned --alpha 1 -o out --dry-run --json",
]


def shell(root: Path, line: str) -> Result:
    """Run a line in bash; ``{}`` stands for the program."""
    program = f"'{sys.executable}' -m uipe_merge"
    finished = subprocess.run(
        ["bash", "-c", "set -o pipefail\n" + line.replace("{}", program)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return Result(finished.returncode, finished.stdout, finished.stderr)


@pytest.mark.parametrize("line", SHELL_LINES)
def test_closed_pipe_gives_no_traceback(root: Path, line: str) -> None:
    result = shell(root, f"{line} | head -0")
    assert result.code in (0, 8)  # 0 where everything fitted before head was gone
    assert result.err == ""


def test_closed_pipe_after_the_merge_leaves_the_model(root: Path, tmp_path: Path) -> None:
    arguments = f"original unlearned --alpha 0 -o {tmp_path / 'out'}"
    result = shell(root, f"{{}} {arguments} | head -0")
    assert result.code in (0, 8)
    assert result.err == ""
    assert cli(root, "verify", str(tmp_path / "out")).code == 0


@pytest.mark.parametrize("line", [SHELL_LINES[2], SHELL_LINES[3], SHELL_LINES[5]])
def test_full_disk_behind_stdout_is_an_error_of_one_line(root: Path, line: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    result = shell(root, f"{line} > /dev/full")
    assert result.code == 8
    assert "Traceback" not in result.err
    assert result.err.count("\n") <= 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_closed_from_the_start(root: Path, tmp_path: Path, closed: str) -> None:
    out = tmp_path / "out"
    result = shell(root, f"{{}} original unlearned --alpha 0 -o {out} {closed}")
    assert result.code == 0
    assert result.err == ""
    # What was written is the same as with the streams open: nothing was printed into a file.
    weights = contents(root / "model")["model.safetensors"]
    assert contents(out)["model.safetensors"] == weights
    assert cli(root, "verify", str(out)).code == 0
    refused = shell(root, f"{{}} verify nowhere {closed}")
    assert refused.code == 2
    assert "Traceback" not in refused.err


# ------------------------------------------------------------ the command itself


def test_merge_is_the_default_command_and_options_may_come_first(
    root: Path, tmp_path: Path
) -> None:
    pair = ("original", "unlearned")
    lines = [
        ("merge", *pair, "--alpha", "0", "-o", "NAME"),
        ("--alpha", "0", "-o", "NAME", *pair),
        ("original", "--alpha=0", "unlearned", "--output=NAME"),
        ("-qa0", "-oNAME", *pair),
        ("merge", "-a", "-0", "-o", "NAME", *pair),
    ]
    reference = contents(root / "model")
    for number, line in enumerate(lines):
        name = str(tmp_path / f"out{number}")
        assert cli(root, *(word.replace("NAME", name) for word in line)).code == 0, line
        made = contents(Path(name))
        assert made.keys() == reference.keys()
        assert made["model.safetensors"] == reference["model.safetensors"]


def test_version(root: Path) -> None:
    import uipe_merge

    assert cli(root, "--version") == Result(0, f"uipe-merge {uipe_merge.__version__}\n", "")


def test_no_arguments_print_the_help_and_are_a_mistake(root: Path) -> None:
    result = cli(root)
    assert result.code == 2
    assert "Usage: uipe-merge" in result.out
    assert "ORIGINAL UNLEARNED --alpha A -o OUT" in result.out
    assert result.out == cli(root, "--help").out
    assert cli(root, "-h").code == 0


@pytest.mark.parametrize("command", ["merge", "inspect", "verify", "demo"])
def test_every_command_has_help(root: Path, command: str) -> None:
    result = cli(root, command, "--help")
    assert result.code == 0
    assert f"Usage: uipe-merge {command}" in result.out


def test_directory_with_the_name_of_a_command(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "verify", MODEL)
    write_checkpoint(tmp_path / "unlearned", MODEL)
    for line in (("merge", "verify"), ("./verify",)):
        assert cli(tmp_path, *line, "unlearned", "--alpha", "1", "-o", "x", "--dry-run").code == 0


def test_merging_prints_the_table_and_the_warnings(root: Path, tmp_path: Path) -> None:
    for side in ("original", "unlearned"):
        (tmp_path / side).symlink_to(root / "original")
    result = merged(tmp_path, "-v")
    assert "α asked / effective" in result.out
    assert NAME in result.out
    assert result.err.startswith("warning: the two checkpoints hold identical weights")
