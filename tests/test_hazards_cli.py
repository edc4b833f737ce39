"""Command lines that make no sense, group J and the scalars of F of the hazards: 2, 3 and 7."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from cli_tools import merged, refuse, refuse_merge, tree
from helpers import CONFIG, Result, assert_refused, run_here, write_checkpoint

A, B = (f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1))
MODEL = {A: torch.ones(4, 8), B: torch.ones(2, 8)}  # 128 and 64 bytes
FULL = ("original", "unlearned", "--alpha", "1", "-o", "out")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with ``original`` and ``unlearned``."""
    write_checkpoint(tmp_path / "original", MODEL)
    write_checkpoint(tmp_path / "unlearned", {name: 2 * value for name, value in MODEL.items()})
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("original",), "UNLEARNED"),
        (("original", "unlearned", "-o", "out"), "--alpha"),
        (("original", "unlearned", "--alpha", "1"), "--output"),
        (("--alpha", "1", "-o", "out"), "ORIGINAL"),
        ((*FULL, "third"), "third"),
        ((*FULL, "--aplha", "2"), "--aplha"),
        ((*FULL, "-x"), "-x"),
        ((*FULL, "--threads", "0"), "--threads"),
        ((*FULL, "--threads", "two"), "--threads"),
        ((*FULL, "--dtype", "int8"), "int8"),
        ((*FULL, "--dtype"), "--dtype"),
        (("original", "unlearned", "--alpha", "much", "-o", "out"), "--alpha"),
        (("original", "unlearned", "--alpha", "1,5", "-o", "out"), "valid number"),
        (("merge",), "ORIGINAL"),
        (("verify",), "OUT"),
        (("inspect", "original"), "UNLEARNED"),
        (("inspect", "original", "unlearned", "--plot", "map.svg"), "map.svg"),
        (("original", "nowhere", "--alpha", "1", "-o", "out"), "nowhere: no such directory"),
        (("org/a--b", "unlearned", "--alpha", "1", "-o", "out"), "nor a hub id"),
    ],
)
def test_arguments_missing_or_unknown(
    root: Path, arguments: tuple[str, ...], fragment: str
) -> None:
    refuse(root, 2, fragment, arguments=arguments)


@pytest.mark.parametrize(
    ("alpha", "code", "fragment"),
    [
        ("nan", 3, "alpha is nan"),
        ("inf", 3, "alpha is inf"),
        ("-inf", 3, "alpha is -inf"),
        ("1e400", 3, "give a finite number"),
        ("1e30", 7, "so large that nothing of the model would be left"),
        ("-1e30", 7, "alpha -1e+30"),
        ("16777216", 7, "choose |alpha| below"),
    ],
)
def test_alpha_that_is_no_coefficient(root: Path, alpha: str, code: int, fragment: str) -> None:
    refuse(root, code, fragment, arguments=(*FULL[:3], alpha, *FULL[4:]))


@pytest.mark.parametrize("alpha", ["nan", "1e30"])
def test_inspect_refuses_the_same_alpha(root: Path, alpha: str) -> None:
    code = 3 if alpha == "nan" else 7
    refuse(root, code, "alpha", arguments=("inspect", "original", "unlearned", "--alpha", alpha))


@pytest.mark.parametrize("size", ["0", "-1", "5XB", "", "GB", "1e9", "0.1B", "9" * 16])
def test_max_shard_size_that_is_none(root: Path, size: str) -> None:
    refuse(root, 2, f"'{size}'", "such as 5GB", arguments=(*FULL, "--max-shard-size", size))


def test_tensor_larger_than_a_shard(root: Path) -> None:
    arguments = (*FULL, "--max-shard-size", "100B")
    refuse(root, 2, A, "128 bytes", "at least 128", arguments=arguments)


@pytest.mark.parametrize(
    ("card", "config"),
    [
        ("---\nbase_model: unlearned\n---\n", {}),
        ("---\nbase_model:\n- other\n- unlearned\n---\n", {}),
        ("", {"_name_or_path": "unlearned"}),
    ],
)
def test_swapped_originals(root: Path, card: str, config: dict[str, object]) -> None:
    files = {"README.md": card} if card else None
    write_checkpoint(root / "original", MODEL, config={**CONFIG, **config}, files=files)
    fragments = ("original: says that it was made from unlearned", "swap the two arguments")
    refuse_merge(root, 2, *fragments)
    refuse_merge(root, 2, *fragments, extra=("--dry-run",))


@pytest.mark.parametrize(
    "card",
    [
        "---\nbase_model: original\n---\n",
        "---\nbase_model: [elsewhere/model]\n---\n",
        "---\nbase_model: null\n---\n",
        "---\nbase_model: {a: &a [*a]}\n---\n",
        "---\n: : not yaml [\n---\n",
        "---\n- a list\n---\n",
        "no front matter: unlearned",
    ],
)
def test_cards_that_do_not_show_a_swap(root: Path, card: str) -> None:
    write_checkpoint(root / "original", MODEL, files={"README.md": card})
    assert_writes_nothing(root)


# ------------------------------------------------------------ dry run


def assert_writes_nothing(root: Path, *extra: str) -> Result:
    before = tree(root)
    result = run_here(*FULL, "--dry-run", *extra, cwd=root)
    assert result.code == 0, result
    assert tree(root) == before
    return result


def test_dry_run_prints_the_plan_and_writes_nothing(root: Path) -> None:
    shown = assert_writes_nothing(root)
    assert "extrapolate" in shown.out
    assert "peak memory" in shown.out
    assert shown.err == ""
    verbose = assert_writes_nothing(root, "-v")
    assert A in verbose.out
    assert B in verbose.out


def test_dry_run_as_json_matches_what_the_run_does(root: Path) -> None:
    extra = ("--max-shard-size", "150B", "--dtype", "bfloat16", "--threads", "3")
    plan = json.loads(assert_writes_nothing(root, *extra, "--json").out)
    assert plan["operations"] == {"extrapolate": {"tensors": 2, "bytes": 96}}
    assert plan["shards"] == 1
    assert plan["read_bytes"] == 2 * (128 + 64)
    assert plan["threads"] == 3
    assert plan["sidecars"] == ["config.json"]
    merged(root, *extra)
    assert (root / "out" / "model.safetensors").stat().st_size == plan["write_bytes"]


@pytest.mark.parametrize(
    ("damage", "code", "fragment"),
    [
        ("output", 8, "exists and is not empty"),
        ("partial", 8, "alpha"),
        ("shape", 5, "[4, 8]"),
        ("truncated", 4, "model.safetensors"),
        ("link", 6, "outside its directory"),
        ("parent", 8, "no such directory"),
    ],
)
def test_dry_run_refuses_what_the_run_would_refuse(
    root: Path, damage: str, code: int, fragment: str
) -> None:
    output = "out"
    if damage == "output":
        (root / "out").mkdir()
        (root / "out" / "mine").write_bytes(b"")
    elif damage == "partial":
        leave_partial(root)
    elif damage == "shape":
        write_checkpoint(root / "original", {**MODEL, A: torch.ones(4, 9)})
    elif damage == "truncated":
        weights = root / "original" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "link":
        (root / "original" / "notes.txt").symlink_to("/etc/hostname")
    else:
        output = "missing/out"
    before = tree(root)
    for extra in (("--dry-run",), ("--dry-run", "--json"), ()):
        result = run_here(*FULL[:4], "-o", output, *extra, cwd=root)
        assert_refused(result, code, fragment)
        if extra:
            assert tree(root) == before


def leave_partial(root: Path) -> None:
    """What an unfinished run with another α leaves."""
    partial = root / ".out.uipe-partial"
    (partial / "model").mkdir(parents=True)
    line = json.dumps({"schema": 1, "alpha": "0x0.0p+0"}).encode()
    (partial / "journal").write_bytes(f"{zlib.crc32(line):08x} ".encode() + line + b"\n")
