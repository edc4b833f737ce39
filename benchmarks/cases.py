"""What is measured: one function a case, each with checkpoints of its own."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from checkpoints import Geometry, geometry
from comparing import compare
from measuring import Contender, Series, aside, interleave
from pairs import TENSOR_WIDTH, Pair, write_model_pair, write_sparse_pair, write_tensor_pair
from peer import Mergekit, recipe
from results import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Arguments = ParamSpec("Arguments")

ALPHA = 2.0
RECIPE_ALPHA = 0.3
PROGRAM = Path(sys.executable).with_name("uipe-merge")
ENGINE: list[str | Path] = [sys.executable, Path(__file__).with_name("engine.py")]


@dataclass(frozen=True, slots=True)
class Bench:
    """What every case needs to know.

    Attributes:
        root: An empty directory to work in.
        size: Bytes of a checkpoint.
        shards: Files of a checkpoint.
        runs: Rounds.
        mergekit: What to compare with; ``None`` leaves it out.
        say: Told what happens, a line at a time.
    """

    root: Path
    size: int
    shards: int
    runs: int
    mergekit: Mergekit | None
    say: Callable[[str], None]

    def pair(
        self,
        write: Callable[Concatenate[Pair, Arguments], None],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Pair:
        """Make a pair of checkpoints with a function of `pairs` and its arguments."""
        pair = Pair(self.root / "original", self.root / "unlearned")
        self.say("making the checkpoints")
        aside(write, pair, *args, **kwargs)
        return pair


@dataclass(frozen=True, slots=True)
class Findings:
    """What a case found.

    Attributes:
        title: What was measured.
        series: Its rows.
        checks: What is held against the bar.
        notes: Sentences about what else was seen.
    """

    title: str
    series: Sequence[Series]
    checks: Sequence[Check] = ()
    notes: Sequence[str] = field(default_factory=list)


def measure_pair(bench: Bench) -> Findings:
    """Measure the floor, the program, the engine and mergekit in turn; compare the results."""
    shape = geometry(bench.size)
    pair = bench.pair(write_model_pair, shape, bench.shards)
    ours, engine = _program(bench, pair, ALPHA), _engine(bench, pair, ALPHA)
    contenders = [_floor(bench, pair), ours, engine]
    peer = _mergekit(bench, pair, "float32") if bench.mergekit else None
    if peer is not None:
        contenders.append(peer)
    found = interleave(contenders, bench.runs, bench.say)
    floor = found["floor"]
    inside = found[engine.name].seconds or 0.0
    checks = [Check("engine ÷ floor", inside / floor.wall, 1.15), _memory(found[ours.name])]
    notes = [_describe(shape, bench)]
    if peer is not None and ours.makes and peer.makes:
        ratio = found[ours.name].wall / found[peer.name].wall
        checks.insert(0, Check("uipe-merge ÷ mergekit", ratio, 1 / 8))
        notes.append(_compared("mergekit in float32", ours.makes, peer.makes))
        rough = _mergekit(bench, pair, "bfloat16")
        found |= interleave([rough], 1, bench.say)
        if rough.makes:
            notes.append(_compared("mergekit in bfloat16, its default", ours.makes, rough.makes))
    return Findings("A whole model", list(found.values()), checks, notes)


def measure_recipe(bench: Bench) -> Findings:
    """Measure one recipe of mergekit's in both programs, at an α that rounds; compare the bits."""
    pair = bench.pair(write_model_pair, geometry(bench.size), bench.shards)
    made = bench.root / "merged"
    written = bench.root / "recipe.yml"
    written.write_text(recipe(pair.original, pair.unlearned, RECIPE_ALPHA, "float32"))
    ours = Contender(
        "uipe-merge CONFIG.yml", [[PROGRAM, written, "-o", made, "--json"]], pair.both(), made
    )
    contenders = [_floor(bench, pair), ours]
    theirs = bench.root / "theirs"
    if bench.mergekit is not None:
        command: list[str | Path] = [bench.mergekit.program, written, theirs]
        contenders.append(Contender("mergekit-yaml CONFIG.yml", [command], pair.both(), theirs))
    found = interleave(contenders, bench.runs, bench.say)
    checks, notes = [_memory(found[ours.name])], []
    if bench.mergekit is not None:
        ratio = found[ours.name].wall / found["mergekit-yaml CONFIG.yml"].wall
        checks.insert(0, Check("CONFIG.yml: uipe-merge ÷ mergekit", ratio, 1 / 8))
        notes.append(_compared("mergekit on the same recipe", made, theirs))
    return Findings("A recipe of mergekit's", list(found.values()), checks, notes)


def measure_few(bench: Bench) -> Findings:
    """Measure a pair in which three tensors differ and all others are identical, as RMU's."""
    pair = bench.pair(write_model_pair, geometry(bench.size), bench.shards, few=True)
    contenders = [_floor(bench, pair), _program(bench, pair, ALPHA), _engine(bench, pair, ALPHA)]
    found = interleave(contenders, bench.runs, bench.say)
    ratio = (found["engine"].seconds or 0.0) / found["floor"].wall
    return Findings(
        "Three tensors changed, all others identical",
        list(found.values()),
        [_memory(found["uipe-merge"])],
        [f"Engine ÷ floor: {ratio:.2f}."],
    )


def measure_steered(bench: Bench) -> Findings:
    """Measure stochastic rounding, and steps that a third checkpoint decides, against α·v."""
    pair = bench.pair(write_model_pair, geometry(bench.size), bench.shards)
    third = bench.root / "third"
    shutil.copytree(pair.unlearned, third)
    made = bench.root / "merged"

    def run(name: str, *options: str | Path) -> Contender:
        command = [*_merge(pair, ALPHA, made), *options, "--json"]
        return Contender(name, [command], [*pair.both(), third], made)

    reading: list[str | Path] = ["sh", "-c", 'cat "$@" > /dev/null', "cat", *_weights(third)]
    plain, chance = run("uipe-merge"), run("--rounding stochastic", "--rounding", "stochastic")
    along = run("--along", "--along", third)
    # The third checkpoint's update is v, so all of the step goes; --always keeps both terms in it.
    away = run("--away-from, --always", "--away-from", third, "--always")
    third_read = Contender("reading the third checkpoint", [reading], [third])
    contenders = [plain, chance, along, away, third_read]
    found = interleave(contenders, bench.runs, bench.say)
    one = found[plain.name].seconds or 0.0
    allowed = 2 * one + found[third_read.name].wall
    steered = [(each.name, found[each.name].seconds or 0.0) for each in (along, away)]
    return Findings(
        "Steps of more than α·v",
        list(found.values()),
        [
            Check("stochastic ÷ plain", (found[chance.name].seconds or 0.0) / one, 2.5),
            *(
                Check(f"{name} ÷ (2 × plain + reading the third)", seconds / allowed, 1.0)
                for name, seconds in steered
            ),
            _memory(max((found[each.name] for each in (along, away)), key=lambda each: each.peak)),
        ],
        ["The ratios are of what the program says itself, without the start of Python."],
    )


GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


def measure_grid(bench: Bench) -> Findings:
    """Measure a grid of eight α against eight runs of one α each."""
    pair = bench.pair(write_model_pair, geometry(bench.size), bench.shards)
    made = bench.root / "grid"
    alphas = ",".join(map(str, GRID))
    command: list[str | Path] = [PROGRAM, "grid", pair.original, pair.unlearned, "-o", made]
    grid = Contender("grid of 8", [[*command, "--alphas", alphas, "--json"]], pair.both(), made)
    runs = [_merge(pair, alpha, made / str(alpha)) for alpha in GRID]
    single = Contender("8 single runs", [["mkdir", made], *runs], pair.both(), made)
    found = interleave([single, grid], bench.runs, bench.say)
    ratio = found[grid.name].wall / found[single.name].wall
    return Findings(
        "A grid of eight",
        list(found.values()),
        [Check("grid ÷ 8 single runs", ratio, 0.55), _memory(found[grid.name])],
        ["Both write eight models; the grid reads the two checkpoints once."],
    )


def measure_copy(bench: Bench) -> Findings:
    """Measure α = 0, which copies the unlearned checkpoint, against ``cp`` and ``sync``."""
    pair = bench.pair(write_model_pair, geometry(bench.size), bench.shards)
    copy = bench.root / "copy"
    contenders = [
        Contender(
            "cp and sync",
            [["cp", "-r", pair.unlearned, copy], _sync(pair.unlearned, copy)],
            [pair.unlearned],
            copy,
        ),
        _program(bench, pair, 0.0),
        _engine(bench, pair, 0.0),
    ]
    found = interleave(contenders, bench.runs, bench.say)
    ratio = (found["engine"].seconds or 0.0) / found["cp and sync"].wall
    return Findings(
        "α = 0, a checked copy",
        list(found.values()),
        [_memory(found["uipe-merge"])],
        [f"Engine ÷ (`cp -r` and `sync`): {ratio:.2f}."],
    )


def measure_tensor(bench: Bench) -> Findings:
    """Measure a model of one large tensor: memory must not follow its size."""
    rows = max(1, bench.size * 8 // 5 // 2 // TENSOR_WIDTH)
    pair = bench.pair(write_tensor_pair, rows)
    found = interleave([_program(bench, pair, ALPHA)], min(bench.runs, 3), bench.say)
    return Findings(
        f"One tensor of {rows * TENSOR_WIDTH * 2 / 1e9:.2g} GB",
        list(found.values()),
        [_memory(found["uipe-merge"])],
    )


def measure_plan(bench: Bench) -> Findings:
    """Measure ``--dry-run`` of a model of 700 shards and 100,100 tensors."""
    pair = bench.pair(write_sparse_pair)
    command: list[str | Path] = [*_merge(pair, ALPHA, bench.root / "planned"), "--dry-run"]
    dry = Contender("uipe-merge --dry-run", [command], pair.both())
    found = interleave([dry], bench.runs, bench.say)[dry.name]
    return Findings(
        "Planning 700 shards and 100,100 tensors",
        [found],
        [Check("`--dry-run`, seconds", found.wall, 2.0), _memory(found)],
    )


def measure_help(bench: Bench) -> Findings:
    """Measure how soon ``--help`` answers."""
    contender = Contender("uipe-merge --help", [[PROGRAM, "--help"]])
    found = interleave([contender], max(bench.runs, 5), bench.say)[contender.name]
    return Findings("Starting", [found], [Check("`--help`, seconds", found.wall, 0.4)])


CASES: dict[str, Callable[[Bench], Findings]] = {
    "help": measure_help,
    "plan": measure_plan,
    "pair": measure_pair,
    "recipe": measure_recipe,
    "few": measure_few,
    "steered": measure_steered,
    "grid": measure_grid,
    "copy": measure_copy,
    "tensor": measure_tensor,
}
"""Every case by the name that ``--only`` takes."""


def room_needed(size: int, *, mergekit: bool) -> int:
    """Return the bytes of disk that the hungriest case takes."""
    # pair: two inputs, a copy, two outputs, two of mergekit's. tensor: 3 × 8/5 of the size.
    # The rest is for mergekit's environment.
    return (7 if mergekit else 5) * size + 2_000_000_000


# ------------------------------------------------------------------- contenders


def _floor(bench: Bench, pair: Pair) -> Contender:
    copy = bench.root / "copy"
    inputs = [path for directory in pair.both() for path in _weights(directory)]
    commands: list[list[str | Path]] = [
        ["sh", "-c", 'cat "$@" > /dev/null', "cat", *inputs],
        ["cp", "-r", pair.original, copy],
        _sync(pair.original, copy),
    ]
    return Contender("floor", commands, pair.both(), copy)


def _program(bench: Bench, pair: Pair, alpha: float) -> Contender:
    made = bench.root / "merged"
    return Contender("uipe-merge", [[*_merge(pair, alpha, made), "--json"]], pair.both(), made)


def _engine(bench: Bench, pair: Pair, alpha: float) -> Contender:
    made = bench.root / "engine"
    command = [*ENGINE, pair.original, pair.unlearned, made, str(alpha)]
    return Contender("engine", [command], pair.both(), made)


def _mergekit(bench: Bench, pair: Pair, dtype: str) -> Contender:
    assert bench.mergekit is not None  # noqa: S101 - asked for only where it is there
    made = bench.root / f"mergekit-{dtype}"
    written = bench.root / f"mergekit-{dtype}.yml"
    written.write_text(recipe(pair.original, pair.unlearned, ALPHA, dtype))
    command = [bench.mergekit.program, written, made]
    return Contender(f"mergekit, {dtype}", [command], pair.both(), made)


def _merge(pair: Pair, alpha: float, output: Path) -> list[str | Path]:
    return [PROGRAM, pair.original, pair.unlearned, "--alpha", str(alpha), "-o", output]


def _sync(source: Path, copy: Path) -> list[str | Path]:
    return ["sync", *(copy / path.name for path in sorted(source.iterdir())), copy]


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


# ---------------------------------------------------------------------- helpers


def _memory(series: Series) -> Check:
    return Check("peak memory, MiB", series.peak / 2**20, 512.0)


def _describe(shape: Geometry, bench: Bench) -> str:
    return (
        f"Llama-shaped, bfloat16, {bench.size / 1e9:.3g} GB in {bench.shards} shards: "
        f"{shape.layers} layers of {shape.hidden}, vocabulary {shape.vocabulary:,}, tied."
    )


def _compared(name: str, ours: Path, theirs: Path) -> str:
    found = aside(compare, ours, theirs)
    missing = f", and {len(found.missing)} tensors are in one only" if found.missing else ""
    return (
        f"Against {name}: {found.differing:,} of {found.elements:,} elements differ "
        f"({found.share:.2g}){missing}."
    )
