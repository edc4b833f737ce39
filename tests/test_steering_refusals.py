"""Steered merges that are refused: in one line that names what is wrong, leaving nothing behind."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import refuse, refuse_merge, tree
from helpers import (
    CONFIG,
    assert_refused,
    contents,
    moved,
    random_tensors,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
)
from test_hazards_pickle import write_bin

import uipe_merge
from uipe_merge.errors import NumericError, RecipeError, UipeMergeError, UsageError
from uipe_merge.recipe import Recipe
from uipe_merge.steering import (
    ORIGINAL_ITSELF,
    Steering,
    Update,
    parse_added,
    parse_protected,
    parse_update,
)

Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The pair, and an update that is related to it."""
    tensors = {**random_tensors(), "ids": torch.arange(6)}
    unlearned = moved(tensors)
    write_checkpoint(tmp_path / "original", tensors)
    write_checkpoint(tmp_path / "unlearned", unlearned)
    write_checkpoint(tmp_path / "related", moved(unlearned, seed=3))
    return tmp_path


def words(root: Path, options: str) -> list[str]:
    return [word.replace("REL", str(root / "related")) for word in options.split()]


NONSENSE = [
    ("--always", 2, "--away-from"),
    ("--always --along REL", 2, "--away-from"),
    ("--rank 2 --energy 0.5", 2, "both a rank and an energy"),
    ("--rank 0", 3, "rank is 0"),
    ("--rank -3", 3, "rank is -3"),
    ("--rank 1.5", 2, "--rank"),
    ("--rank x", 2, "--rank"),
    ("--energy 0", 3, "energy is 0"),
    ("--energy -0.5", 3, "energy is -0.5"),
    ("--energy 1.5", 3, "energy is 1.5"),
    ("--energy nan", 3, "energy is nan"),
    ("--energy inf", 3, "energy is inf"),
    ("--energy much", 2, "--energy"),
    ("--rank-all", 2, "--rank"),
    ("--along REL --min-cos 2", 3, "min-cos is 2"),
    ("--along REL --min-cos -1.01", 3, "min-cos is -1.01"),
    ("--along REL --min-cos nan", 3, "min-cos is nan"),
    ("--along REL --max-alpha -1", 3, "max-alpha is -1"),
    ("--along REL --max-alpha inf", 3, "max-alpha is inf"),
    ("--along REL --max-alpha nan", 3, "max-alpha is nan"),
    ("--min-cos 0.5", 2, "--along"),
    ("--max-alpha 2", 2, "--along"),
    ("--away-from original --min-cos 0.5", 2, "--along"),
    ("--add REL", 3, "is not UPDATE=BETA"),
    ("--add REL=", 3, "is not UPDATE=BETA"),
    ("--add =1", 3, "is not UPDATE=BETA"),
    ("--add =", 3, "is not UPDATE=BETA"),
    ("--add REL=x", 3, "is not UPDATE=BETA"),
    ("--add REL=1_0", 3, "is not UPDATE=BETA"),
    ("--add REL=٣", 3, "is not UPDATE=BETA"),
    ("--add REL=nan", 3, "is nan"),
    ("--add REL=inf", 3, "is inf"),
    ("--add REL=1e999", 3, "is inf"),
    ("--add REL=1e30", 7, "so large"),
    ("--add @@REL=1", 3, "is not NEW or NEW@@OLD"),
    ("--add REL@@=1", 3, "is not NEW or NEW@@OLD"),
    ("--add original=1", 3, "./original"),
    ("--along original", 3, "./original"),
    ("--along @@", 3, "is not NEW or NEW@@OLD"),
    ("--along @@REL", 3, "is not NEW or NEW@@OLD"),
    ("--along REL@@", 3, "is not NEW or NEW@@OLD"),
    ("--away-from @@REL", 3, "is not NEW or NEW@@OLD"),
    ("--away-from REL@@", 3, "is not NEW or NEW@@OLD"),
    ("--control up", 2, "--control"),
    ("--granularity block", 2, "--granularity"),
    ("--granularity model", 2, "--granularity"),
    ("--granularity tensor --rank 2", 2, "--granularity"),
    ("--granularity tensor --add REL=1", 2, "--granularity"),
    ("--seed 1.5 --rank 2", 2, "--seed"),
    ("--seed 18446744073709551616 --rank 2", 3, "seed"),
    ("--as adapter --along REL", 2, "--as model"),
    ("--as adapter --away-from original", 2, "--as model"),
    ("--as adapter --rank 2", 2, "--as model"),
    ("--as adapter --energy 1", 2, "--as model"),
    ("--as adapter --control random", 2, "--as model"),
    ("--as adapter --add REL=1", 2, "--as model"),
    ("--as adapter --add REL=0", 2, "--as model"),
]


@pytest.mark.parametrize(("options", "code", "fragment"), NONSENSE, ids=[n[0] for n in NONSENSE])
def test_what_makes_no_sense_is_refused(root: Path, options: str, code: int, fragment: str) -> None:
    for more in ((), ("--dry-run",)):
        refuse_merge(root, code, fragment, extra=(*words(root, options), *more))


@pytest.mark.parametrize("option", ["--along", "--away-from"])
def test_an_empty_update_is_refused(root: Path, option: str) -> None:
    refuse_merge(root, 3, "NEW@@OLD", extra=(option, ""))


@pytest.mark.parametrize(
    "options", ["--add REL=1", "--away-from original", "--rank 2", "--control random"]
)
def test_alpha_may_be_left_out_with_related_updates_alone(root: Path, options: str) -> None:
    arguments = (root / "original", root / "unlearned", "-o", root / "out")
    refuse(root, 2, "no alpha", "--alpha", arguments=(*arguments, *words(root, options)))
    result = run_here(*arguments, *words(root, options), "--along", root / "related")
    assert result.code == 0, result


def test_a_recipe_in_a_file_and_options_exclude_one_another(root: Path) -> None:
    recipe = root / "recipe.yaml"
    recipe.write_text("alpha: 1\n")
    arguments = (root / "original", root / "unlearned", "-o", root / "out", "--recipe", recipe)
    for options in ("--along REL", "--rank 2", "--add REL=1", "--control random", "--energy 1"):
        refuse(root, 2, "a recipe says all of it", arguments=(*arguments, *words(root, options)))


@pytest.mark.parametrize("option", ["--rank 1", "--energy 0.5"])
def test_a_rank_where_no_matrix_is_in_a_layer(tmp_path: Path, option: str) -> None:
    tensors = {"a.weight": torch.randn(8, 6), "b.bias": torch.randn(8)}
    write_checkpoint(tmp_path / "original", tensors)
    write_checkpoint(tmp_path / "unlearned", moved(tensors))
    extra = tuple(option.split())
    for more in ((), ("--dry-run",)):
        refuse_merge(tmp_path, 3, "no matrix is in a layer", "--rank-all", extra=(*extra, *more))
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1, "-o", tmp_path / "out")
    assert run_here(*command, *extra, "--rank-all").code == 0


def test_a_rank_where_there_is_no_matrix_at_all(tmp_path: Path) -> None:
    tensors = {"model.layers.0.bias": torch.randn(8)}
    write_checkpoint(tmp_path / "original", tensors)
    write_checkpoint(tmp_path / "unlearned", moved(tensors))
    for extra in (("--rank", 1), ("--rank", 1, "--rank-all")):
        refuse_merge(tmp_path, 3, "no matrix", extra=extra)
    with pytest.raises(AssertionError):  # there is nothing to hint at
        refuse_merge(tmp_path, 3, "add --rank-all", extra=("--rank", 1, "--rank-all"))


# ---------------------------------------------------------------- a related checkpoint


ROLES = ["--along REL", "--alpha 1 --away-from REL --always", "--alpha 1 --add REL=0.5"]


def arguments_of(root: Path, options: str) -> tuple[object, ...]:
    return (root / "original", root / "unlearned", "-o", root / "out", *words(root, options))


@pytest.mark.parametrize("options", [*ROLES, "--along REL --rank 2", "--alpha 1 --add REL@@REL=1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_hazard_values_that_are_not_finite_are_named_and_counted(
    root: Path, options: str, value: float
) -> None:
    tensors = read_tensors(root / "related")
    tensors[Q_PROJ].reshape(-1)[[37, 40, 255]] = value
    write_checkpoint(root / "related", tensors)
    inputs = {name: tree(root / name) for name in ("original", "unlearned", "related")}
    file = root / "related" / "model.safetensors"
    for threads in (1, 3):
        result = run_here(*arguments_of(root, options), "--threads", threads)
        assert_refused(result, 7, f"{file}: ", f"'{Q_PROJ}'", "holds 3 values", "first at index 37")
        assert sorted(os.listdir(root)) == ["original", "related", "unlearned"]
    if "--along" in options and "--rank" not in options:
        result = run_here(*arguments_of(root, options), "--dry-run")
        assert_refused(result, 7, f"{file}: ", Q_PROJ)
    assert sorted(os.listdir(root)) == ["original", "related", "unlearned"]
    assert {name: tree(root / name) for name in inputs} == inputs


@pytest.mark.parametrize("options", ["--alpha 1 --rank 2", "--along REL", "--alpha 1 --add REL=1"])
@pytest.mark.parametrize("side", ["original", "unlearned"])
def test_hazard_of_the_pair_the_one_that_is_broken_is_named(
    root: Path, options: str, side: str
) -> None:
    tensors = read_tensors(root / side)
    tensors[Q_PROJ].reshape(-1)[11] = math.nan
    write_checkpoint(root / side, tensors)
    result = run_here(*arguments_of(root, options))
    file = root / side / "model.safetensors"
    assert_refused(result, 7, f"{file}: ", Q_PROJ, "holds 1 values", "first at index 11")
    assert sorted(os.listdir(root)) == ["original", "related", "unlearned"]


def test_what_is_not_read_may_hold_anything(root: Path) -> None:
    tensors = read_tensors(root / "related")
    tensors[NORM].fill_(math.nan)
    write_checkpoint(root / "related", tensors)
    result = run_here(*arguments_of(root, "--along REL --alpha-rule model.norm*=0"))
    assert result.code == 0, result
    result = run_here(
        *arguments_of(root, "--along REL --alpha-rule model.norm*=0 --add REL=1 --overwrite")
    )
    assert_refused(result, 7, NORM, "related")


def test_a_step_that_the_output_cannot_hold(root: Path) -> None:
    for side in ("original", "unlearned", "related"):
        tensors = {
            name: each.half() if each.is_floating_point() else each
            for name, each in read_tensors(root / side).items()
        }
        tensors[NORM].fill_({"original": 0.0, "unlearned": 1.0, "related": 60000.0}[side])
        write_checkpoint(root / side, tensors)
    result = run_here(*arguments_of(root, "--alpha 1 --add REL=2"))
    assert_refused(result, 7, NORM, "16 values do not fit into F16")
    assert sorted(os.listdir(root)) == ["original", "related", "unlearned"]


def test_a_kappa_that_leaves_nothing_of_the_model(tmp_path: Path) -> None:
    base = torch.zeros(8, 8)
    update = torch.full((8, 8), 1e-6)
    for name, scale in (("original", 0.0), ("unlearned", 1.0), ("related", 1e8)):
        write_checkpoint(tmp_path / name, {"model.layers.3.w": base + scale * update})
    extra = "--along REL --max-alpha 1e9"
    result = run_here(*arguments_of(tmp_path, extra))
    assert_refused(result, 7, "model.layers.3", "--max-alpha")
    assert sorted(os.listdir(tmp_path)) == ["original", "related", "unlearned"]
    assert run_here(*arguments_of(tmp_path, "--along REL")).code == 0


def lacking(root: Path) -> None:
    tensors = read_tensors(root / "related")
    del tensors[Q_PROJ]
    write_checkpoint(root / "related", tensors)


def reshaped(root: Path) -> None:
    tensors = read_tensors(root / "related")
    tensors[Q_PROJ] = torch.zeros(16, 17).bfloat16()
    write_checkpoint(root / "related", tensors)


def integers(root: Path) -> None:
    tensors = read_tensors(root / "related")
    tensors[Q_PROJ] = tensors[Q_PROJ].int()
    write_checkpoint(root / "related", tensors)


def other_architecture(root: Path) -> None:
    config = {**CONFIG, "model_type": "gpt2"}
    write_checkpoint(root / "related", read_tensors(root / "related"), config=config)


def truncated(root: Path) -> None:
    file = root / "related" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def no_header(root: Path) -> None:
    (root / "related" / "model.safetensors").write_bytes(b"\xff" * 100)


def empty(root: Path) -> None:
    (root / "related" / "model.safetensors").unlink()


def pickled(root: Path) -> None:
    tensors = read_tensors(root / "related")
    (root / "related" / "model.safetensors").unlink()
    write_bin(root / "related", tensors)


BROKEN: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "lacks a tensor": (lacking, 5, (Q_PROJ,)),
    "another shape": (reshaped, 5, (Q_PROJ, "[16, 17]", "[16, 16]")),
    "integers": (integers, 5, (Q_PROJ, "I32")),
    "another architecture": (other_architecture, 5, ("model_type", "gpt2")),
    "truncated": (truncated, 4, ("model.safetensors",)),
    "no header": (no_header, 4, ("model.safetensors",)),
    "holds nothing": (empty, 4, ()),
    "pickled": (pickled, 6, ("pytorch_model.bin", "--allow-pickle")),
}


@pytest.mark.parametrize("options", [*ROLES, "--along {unlearned}@@REL"])
@pytest.mark.parametrize(("breaks", "code", "fragments"), BROKEN.values(), ids=BROKEN)
def test_hazard_a_related_checkpoint_that_cannot_be_used(
    root: Path,
    options: str,
    breaks: Callable[[Path], None],
    code: int,
    fragments: tuple[str, ...],
) -> None:
    breaks(root)
    options = options.replace("{unlearned}", str(root / "unlearned"))
    where = str(root / "related")
    for more in ((), ("--dry-run",)):
        arguments = (*arguments_of(root, options), *more)
        refuse(root, code, where, *fragments, arguments=arguments)


def test_a_pickled_checkpoint_is_read_where_it_is_allowed(root: Path) -> None:
    arguments = arguments_of(root, "--along REL")
    assert run_here(*arguments).code == 0
    first = read_tensors(root / "out")
    pickled(root)
    assert run_here(*arguments, "--allow-pickle", "--overwrite").code == 0
    second = read_tensors(root / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "--allow-pickle" in (root / "out" / "uipe_merge.json").read_text()


@pytest.mark.parametrize("options", ["--along {}", "--alpha 1 --add {}=1", "--along REL@@{}"])
def test_hazard_a_related_checkpoint_that_is_not_there(root: Path, options: str) -> None:
    for name in ("nowhere", "original/model.safetensors"):
        extra = options.format(root / name)
        refuse(root, 2, str(root / name), arguments=arguments_of(root, extra))
    for name in ("x" * 300, "x" * 5000, "x" * 5000 + "@@y"):
        result = run_here(*arguments_of(root, options.format(name)))
        assert result.code in (2, 8), result
        assert "Traceback" not in result.err


def test_hazard_bytes_that_are_no_text_name_no_checkpoint(root: Path) -> None:
    arguments = (root / "original", root / "unlearned", "-o", root / "out", "--along")
    result = run_cli(*arguments, b"\xff\xfe")
    assert_refused(result, 2, "no such directory")
    (root / "related").rename(os.fsdecode(os.fsencode(root) + b"/\xff"))
    result = run_cli(*arguments, os.fsencode(root) + b"/\xff")
    assert result.code == 0, result


@pytest.mark.parametrize("options", ROLES)
def test_hazard_the_output_is_a_related_checkpoint(root: Path, options: str) -> None:
    arguments = (root / "original", root / "unlearned", *words(root, options))
    (root / "link").symlink_to(root / "related")
    for out in ("related", "link", "related/inside"):
        for more in ((), ("--overwrite",), ("--dry-run",)):
            refuse(root, 2, str(root), "input", arguments=(*arguments, "-o", root / out, *more))


def test_hazard_an_adapter_that_was_made_for_another_base(root: Path) -> None:
    from test_steering_runs import BIG, write_adapter

    adapter = write_adapter(root / "adapter", "org/other-model")
    arguments = (root / "original", root / "unlearned", "-o", root / "out", "--along", adapter)
    refuse(root, 5, str(adapter), BIG.removesuffix(".weight"), arguments=arguments)
    for side in ("original", "unlearned"):
        tensors = read_tensors(root / side)
        write_checkpoint(root / side, {**tensors, BIG: torch.randn(24, 21).bfloat16()})
    refuse(root, 5, str(adapter), BIG, arguments=arguments)
    for side in ("original", "unlearned"):
        tensors = read_tensors(root / side)
        write_checkpoint(root / side, {**tensors, BIG: torch.randn(24, 20).bfloat16()})
    result = run_here(*arguments)
    assert result.code == 0
    assert "org/other-model" in result.err


def test_rows_in_common_need_the_rows_of_the_unlearned_model(root: Path) -> None:
    tensors = read_tensors(root / "unlearned")
    name = "lm_head.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:3]])
    write_checkpoint(root / "unlearned", tensors)
    options = "--along REL --on-mismatch common-rows"
    refuse(root, 5, str(root / "related"), name, arguments=arguments_of(root, options))


def test_what_is_left_of_a_refusal_can_be_built_upon(root: Path) -> None:
    """A run that fails in its first pass leaves nothing that keeps the next from beginning."""
    wanted = run_here(*arguments_of(root, "--along REL --rank 2"))
    assert wanted.code == 0
    complete = contents(root / "out")
    (root / "out").rename(root / "kept")
    good = (root / "related" / "model.safetensors").read_bytes()
    status = (root / "related" / "model.safetensors").stat()
    tensors = read_tensors(root / "related")
    tensors[Q_PROJ].fill_(math.nan)
    write_checkpoint(root / "related", tensors)
    assert run_here(*arguments_of(root, "--along REL --rank 2")).code == 7
    (root / "related" / "model.safetensors").write_bytes(good)
    os.utime(root / "related" / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run_here(*arguments_of(root, "--along REL --rank 2")).code == 0
    assert contents(root / "out") == complete


# ---------------------------------------------------------------- from Python


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"always": True}, UsageError),
        ({"rank": 1, "energy": 0.5}, UsageError),
        ({"rank_all": True}, UsageError),
        ({"min_cos": 0.1}, UsageError),
        ({"max_alpha": 1.0}, UsageError),
        ({"granularity": "model"}, UsageError),
        ({"granularity": "block", "control": "random"}, UsageError),
        ({"control": "up"}, UsageError),
        ({"rank": 0}, RecipeError),
        ({"energy": 0.0}, RecipeError),
        ({"energy": math.nan}, RecipeError),
        ({"energy": 1.0000001}, RecipeError),
        ({"along": (Update("a"),), "min_cos": math.nan}, RecipeError),
        ({"along": (Update("a"),), "max_alpha": math.inf}, RecipeError),
        ({"add": ((Update("a"), math.nan),)}, RecipeError),
        ({"add": ((Update("a"), -math.inf),)}, RecipeError),
    ],
    ids=str,
)
def test_steering_checks_itself(fields: dict[str, object], error: type[UipeMergeError]) -> None:
    with pytest.raises(error):
        Steering(**fields)  # type: ignore[arg-type]


def test_a_beta_is_as_large_as_an_alpha_may_be() -> None:
    Recipe(1.0, steering=Steering(add=((Update("a"), -(2.0**24) + 1),)))
    with pytest.raises(NumericError):
        Recipe(1.0, steering=Steering(add=((Update("a"), -(2.0**24)),)))


def test_what_an_adapter_cannot_say_python_refuses_too(root: Path) -> None:
    with pytest.raises(UsageError, match="--as model"):
        uipe_merge.merge(
            root / "original",
            root / "unlearned",
            root / "out",
            alpha=1,
            as_="adapter",
            steering=Steering(rank=1),
            progress=False,
        )


def test_updates_are_read_as_the_command_line_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_update("a") == Update("a")
    assert parse_update("a@@b") == Update("a", "b")
    assert parse_update("a@@b@@c") == Update("a@@b", "c")
    assert parse_update("org/a@main@@org/b@main") == Update("org/a@main", "org/b@main")
    assert parse_update("./original") == Update("./original")
    assert parse_protected("original") == ORIGINAL_ITSELF
    assert parse_protected("a@@original") == Update("a", "original")
    assert parse_added("a=b=-1e-3") == (Update("a=b"), -0.001)
    assert parse_added("a@@b=.5") == (Update("a", "b"), 0.5)
    (tmp_path / "a@@b").mkdir()
    assert parse_update("a@@b") == Update("a@@b")
    assert parse_added("a@@b=2") == (Update("a@@b"), 2.0)
    assert parse_protected("a@@b") == Update("a@@b")
    assert parse_update("c@@d") == Update("c", "d")
