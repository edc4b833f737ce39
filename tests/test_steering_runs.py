"""Steered merges as runs: the same bytes however they go, nothing done twice, nothing left over."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from cli_tools import tree
from fakes_output import FailingFileSystem, Manner
from helpers import (
    CONFIG,
    assert_refused,
    bits,
    contents,
    moved,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
)
from runs import Merge, in_memory
from safetensors.torch import save_file

import uipe_merge
from uipe_merge import api, decomposing, engine, job, matrices, measuring, native, running
from uipe_merge.checkpoint.storage import LocalFile
from uipe_merge.errors import OutputError
from uipe_merge.executors import Serial, Threads
from uipe_merge.output.filesystem import FileSystem, LocalFileSystem
from uipe_merge.plan import BLOCK, CELL
from uipe_merge.progress import Progress, Silent
from uipe_merge.recipe import Recipe
from uipe_merge.report import MergeReport
from uipe_merge.steering import Steering, Update
from uipe_merge.worker import MergeWorker

Tensors = dict[str, torch.Tensor]

BIG = "model.layers.0.mlp.up_proj.weight"
"""More than two cells, and large enough for the iterations that find singular vectors."""

STACK = "model.layers.1.mlp.experts.gate_up_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

OPTIONS = {
    "along": "--along {related}",
    "along two, tensor by tensor": (
        "--along {related} --along {kept}@@{unlearned} --min-cos -1 --granularity tensor"
    ),
    "away": "--alpha 0.7 --away-from {kept} --always",
    "away, over the model": "--alpha 0.7 --away-from {kept}@@{unlearned} --granularity model",
    "away from the original": "--alpha 0.7 --away-from original",
    "add": "--alpha 0.5 --add {kept}=0.3 --add {related}@@{unlearned}=-0.2",
    "control": "--alpha 0.9 --control random --seed 3",
    "rank": "--alpha 0.9 --rank 3 --rank-all",
    "energy": "--alpha 0.9 --energy 0.7",
    "by chance": "--along {related} --away-from {kept} --always --rounding stochastic --seed 5",
    "random of low rank by chance": (
        "--along {related} --rank 2 --control random --rounding stochastic --seed -4"
    ),
    "all": (
        "--along {related} --away-from {kept} --always --rank 3 --add {kept}=0.1 "
        "--rounding stochastic --seed 7"
    ),
}


class Family(NamedTuple):
    """Checkpoints of one model: the pair, a related update and a protected one."""

    root: Path

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.root / "original", self.root / "unlearned"

    def words(self, options: str) -> list[str]:
        """The options with the paths of this family."""
        names = ("original", "unlearned", "related", "kept", "adapter")
        return options.format(**{name: self.root / name for name in names}).split()

    def merge(self, out: Path, options: str, *more: object) -> dict[str, bytes]:
        """Merge in this process, which must succeed; every file of the output."""
        result = run_here(*self.pair, "-o", out, "-q", *self.words(options), *more)
        assert (result.code, result.err) == (0, "")
        assert os.listdir(out.parent).count(f".{out.name}.uipe-partial") == 0
        return contents(out)

    def sources(self) -> dict[str, tuple[int, int, str | bytes]]:
        """All that is in the checkpoints, to show that it is not touched."""
        return tree(self.root)


def small_tensors(matrix: int = 24) -> Tensors:
    """A model of two layers with one of every kind of tensor."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    return {
        EMBEDDING: draw(40, 16),
        "model.layers.0.self_attn.q_proj.weight": draw(matrix, 16),
        BIG: draw(matrix, 20),
        "model.layers.0.half": draw(33).half(),
        "model.layers.0.ids": torch.arange(5),
        STACK: draw(3, matrix, 12),
        "model.layers.1.self_attn.q_proj.weight": draw(matrix, 16),
        "model.layers.1.norm.weight": draw(16),
        "model.norm.weight": draw(16),
        "scale": draw(),
        "empty": draw(0, 3),
        HEAD: draw(40, 16),
    }


def write_family(root: Path, tensors: Tensors, *, shards: int = 2) -> Family:
    """Write the checkpoints; ``related`` goes on from the unlearned one, ``kept`` elsewhere."""
    unlearned = moved(tensors)
    sides = {
        "original": tensors,
        "unlearned": unlearned,
        "related": moved(unlearned, seed=3),
        "kept": moved(tensors, seed=5),
    }
    for name, side in sides.items():
        write_checkpoint(root / name, side, shards=shards)
    return Family(root)


def write_adapter(path: Path, base: str = "base", size: tuple[int, int] = (24, 20)) -> Path:
    """A LoRA adapter on ``BIG``."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = size
    prefix = f"base_model.model.{BIG.removesuffix('.weight')}"
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(2, columns, generator=generator) * 0.1,
        f"{prefix}.lora_B.weight": torch.randn(rows, 2, generator=generator) * 0.1,
    }
    path.mkdir(parents=True)
    save_file(factors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    config["base_model_name_or_path"] = base
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family whose largest tensor takes three cells; nobody writes to it."""
    tensors = small_tensors()
    generator = torch.Generator().manual_seed(12)
    tensors[BIG] = (torch.randn(300, 1000, generator=generator) * 0.02).bfloat16()
    return write_family(tmp_path_factory.mktemp("family"), tensors)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family of tiny tensors; nobody writes to it."""
    found = write_family(tmp_path_factory.mktemp("small"), small_tensors())
    write_adapter(found.root / "adapter", str(found.root / "original"))
    return found


def groups_of(output: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What the manifest says was measured."""
    found = json.loads(output["uipe_merge.json"]).get("groups", {})
    assert isinstance(found, dict)
    return found


def weights_of(output: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in output.items() if name.endswith(".safetensors")}


def is_measured(options: str) -> bool:
    return any(word in options for word in ("--along", "--away-from", "--control"))


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_threads_change_no_byte(tmp_path: Path, family: Family, options: str) -> None:
    before = family.sources()
    one, three = (
        family.merge(tmp_path / "out", options, "--threads", threads, "--overwrite")
        for threads in (1, 3)
    )
    assert one == three
    assert groups_of(one) == groups_of(three)
    assert bool(groups_of(one)) == is_measured(options)
    assert not any("measured" in name or "factors" in name for name in one)
    assert os.listdir(tmp_path) == ["out"]
    assert family.sources() == before


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_change_no_byte(
    tmp_path: Path, family: Family, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for block in (BLOCK, 2 * CELL, CELL):
        monkeypatch.setattr(job.Job, "block", block)
        monkeypatch.setattr(matrices, "BLOCK", block)
        found.append(family.merge(tmp_path / "out", options, "--threads", 2, "--overwrite"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("width", [1, 3])
def test_blocks_and_threads_change_no_product(tmp_path: Path, family: Family, width: int) -> None:
    steering = Steering(
        along=(Update(str(family.root / "related")),),
        away_from=Update(str(family.root / "kept"), str(family.root / "unlearned")),
        control="random",
    )
    prepared = job.prepare(*family.pair, tmp_path / "out", Recipe(1.0, steering=steering))
    measured = measuring.to_measure(prepared.plan, {})
    executor = Serial() if width == 1 else Threads(width)
    found = [
        measuring.measure(measured, prepared.pair, executor, Silent(), block)
        for block in (CELL, BLOCK)
    ]
    assert found[0] == found[1]
    assert set(found[0]) == {step.name for step in prepared.plan.steps if step.group}
    assert len(found[0][BIG]) == 4 * 5 // 2
    sides = [read_tensors(family.root / name)[BIG].double() for name in ("original", "unlearned")]
    assert found[0][BIG][0] == pytest.approx(float((sides[1] - sides[0]).square().sum()), rel=1e-6)


@pytest.mark.skipif(not native.COMPILED, reason="this copy was built without a compiler")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_the_compiled_arithmetic_the_same_bytes(
    tmp_path: Path, family: Family, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = family.merge(tmp_path / "out", options)
    monkeypatch.setattr(native, "COMPILED", False)
    plain = family.merge(tmp_path / "out", options, "--overwrite")
    assert weights_of(compiled) == weights_of(plain)
    reported = {"effective_alpha", "share_kept"}  # sums over the output, close but not the same
    one, two = (
        {
            name: {key: value for key, value in group.items() if key not in reported}
            for name, group in groups_of(each).items()
        }
        for each in (compiled, plain)
    )
    assert one == two


ALONE = {
    "along": "--along {related} --granularity tensor",
    "rank": "--alpha 0.9 --rank 3",
    "energy": "--alpha 0.9 --energy 0.6",
    "control": "--alpha 0.9 --control random --granularity tensor",
    "by chance": "--along {related} --granularity tensor --rounding stochastic --seed 2",
    "all": (
        "--along {related} --away-from {kept} --always --rank 2 --control random --add {kept}=0.2 "
        "--granularity tensor --rounding stochastic --seed 2"
    ),
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_a_tensor_alone_comes_out_as_in_the_model(
    tmp_path: Path, family: Family, options: str
) -> None:
    family.merge(tmp_path / "out", options)
    whole = read_tensors(tmp_path / "out")
    for number, name in enumerate((BIG, STACK)):
        alone = Family(tmp_path / f"alone-{number}")
        for side in ("original", "unlearned", "related", "kept"):
            write_checkpoint(alone.root / side, {name: read_tensors(family.root / side)[name]})
        alone.merge(tmp_path / f"out-{number}", options)
        found = read_tensors(tmp_path / f"out-{number}")[name]
        assert bits(found).tobytes() == bits(whole[name]).tobytes(), name


def test_the_cores_of_the_machine_change_no_byte(tmp_path: Path, family: Family) -> None:
    options = OPTIONS["all"]
    here = family.merge(tmp_path / "out", options)
    command = (*family.pair, "-o", tmp_path / "out", *family.words(options), "--overwrite")
    assert run_cli(*command, env={"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}).code == 0
    assert contents(tmp_path / "out") == here


@pytest.mark.found("a head stored beside its embedding was rounded by other chances")
def test_a_parameter_that_is_stored_twice_stays_one(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    sides = {"original": (0, 0), "unlearned": (1, 0), "related": (1, 1), "kept": (0, 1)}
    generator = torch.Generator().manual_seed(0)
    start, one, two = (torch.randn(70, 50, generator=generator) for _ in range(3))
    for side, (first, second) in sides.items():
        tensor = (start + 0.1 * first * one + 0.1 * second * two).bfloat16()
        tensors = {EMBEDDING: tensor, HEAD: tensor.clone()}
        write_checkpoint(tmp_path / side, tensors, config=tied)
    family = Family(tmp_path)
    for number, options in enumerate(
        [
            "--alpha 0.3 --rank 2 --rank-all --rounding stochastic",
            "--along {related} --control random --granularity tensor --rounding stochastic",
            "--along {related} --away-from {kept} --always --add {kept}=0.1",
        ]
    ):
        family.merge(tmp_path / f"out-{number}", options)
        found = read_tensors(tmp_path / f"out-{number}")
        assert bits(found[EMBEDDING]).tobytes() == bits(found[HEAD]).tobytes(), options
        assert (
            bits(found[HEAD]).tobytes()
            != bits(read_tensors(tmp_path / "unlearned")[HEAD]).tobytes()
        )


def test_what_is_drawn_for_a_tensor_is_drawn_for_no_other(tmp_path: Path) -> None:
    base = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    for side, moving in (("original", 0.0), ("unlearned", 0.1)):
        both = (base * (1 + moving)).repeat(2, 1, 1)
        tensors = {f"model.layers.{layer}.a.weight": each for layer, each in enumerate(both)}
        write_checkpoint(tmp_path / side, {name: each.clone() for name, each in tensors.items()})
    family, found = Family(tmp_path), []
    for seed in (0, 1):
        family.merge(tmp_path / f"{seed}", f"--alpha 1 --control random --seed {seed}")
        found += list(read_tensors(tmp_path / f"{seed}").values())
    steps = [(each - base * 1.1).double().reshape(-1) for each in found]
    for one, two in itertools.combinations(steps, 2):
        assert abs(float(one @ two / (one.norm() * two.norm()))) < 0.25
    for step in steps:
        assert float(step.norm()) == pytest.approx(float((base * 0.1).norm()), rel=1e-5)


SAME_AS_PLAIN = {
    "all of the energy": ("--alpha 0.7 --energy 1 --rank-all", "--alpha 0.7"),
    "all of the rank": ("--alpha 0.7 --rank 1000 --rank-all", "--alpha 0.7"),
    "nothing added": ("--alpha 0.7 --add {kept}=0", "--alpha 0.7"),
    "along itself": ("--alpha 0.7 --along {unlearned}", "--alpha 0.7"),
    "away from what did not move": ("--alpha 0.7 --away-from {original} --always", "--alpha 0.7"),
    "its own update added": ("--alpha 0 --add {unlearned}=0.5", "--alpha 0.5"),
    "no cosine is enough": ("--along {kept} --min-cos 1 --granularity model", "--alpha 0"),
    "no step is allowed": ("--along {related} --max-alpha 0", "--alpha 0"),
    "along nothing": ("--along {kept}@@{kept}", "--alpha 0"),
}


@pytest.mark.parametrize(("options", "plain"), SAME_AS_PLAIN.values(), ids=SAME_AS_PLAIN)
def test_what_comes_to_the_plain_rule_gives_its_bytes(
    tmp_path: Path, small: Family, options: str, plain: str
) -> None:
    small.merge(tmp_path / "one", options)
    small.merge(tmp_path / "two", plain)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert {name: bits(each).tobytes() for name, each in one.items()} == {
        name: bits(each).tobytes() for name, each in two.items()
    }


def test_every_option_makes_another_model(tmp_path: Path, small: Family) -> None:
    found = {}
    for number, options in enumerate(OPTIONS.values()):
        found[options] = weights_of(small.merge(tmp_path / f"out-{number}", options))
    assert all(one != two for one, two in itertools.combinations(found.values(), 2))


# ---------------------------------------------------------------- interruptions


@dataclass(frozen=True)
class Steered(Merge):
    """A steered merge of a small family, as often as a test likes."""

    steered: str = OPTIONS["all"]

    @property
    def family(self) -> Family:
        return Family(self.root)

    def run(
        self,
        filesystem: FileSystem | None = None,
        progress: Progress | None = None,
        *,
        overwrite: bool = False,
    ) -> MergeReport:
        """Merge in this process."""
        root = self.root
        steering = Steering(
            along=(Update(str(root / "related")),),
            away_from=Update(str(root / "kept")),
            always=True,
            rank=3,
            add=((Update(str(root / "kept")), 0.1),),
        )
        plan = api.plan(
            *self.inputs,
            self.output,
            steering=steering,
            rounding="stochastic",
            seed=7,
            overwrite=overwrite,
        )
        executor = Serial() if self.threads == 1 else Threads(self.threads)
        return running.run(plan, executor, filesystem or LocalFileSystem(), progress or Silent())

    def command(self, *more: str) -> list[str]:
        words = [*map(str, self.inputs), "-o", str(self.output), "--threads", str(self.threads)]
        return [*words, "-q", *self.family.words(self.steered), *more]

    @property
    def measured(self) -> Path:
        return self.partial / "measured"


def steered_merge(root: Path, *, threads: int = 1) -> Steered:
    """A merge whose output goes where nothing else is."""
    write_family(root / "models", small_tensors())
    (root / "made").mkdir()
    return Steered(root / "models", threads=threads, disk=root / "made")


class Stopped(BaseException):
    """The run ends here, as by a signal."""


class Done(NamedTuple):
    """What a run did not find done: matrices decomposed, and passes of inner products."""

    factors: int
    measures: int


@contextmanager
def counted() -> Iterator[Callable[[], Done]]:
    """Count what is measured while the body runs."""
    calls: Counter[str] = Counter()
    decompose, measure = decomposing.FactorsWorker.__call__, measuring.measure

    def decomposed(self: decomposing.FactorsWorker, item: Any) -> Any:
        calls["factors"] += 1
        return decompose(self, item)

    def measured(*arguments: Any) -> Any:
        calls["measures"] += 1
        return measure(*arguments)

    with (
        patch.object(decomposing.FactorsWorker, "__call__", decomposed),
        patch.object(measuring, "measure", measured),
    ):
        yield lambda: Done(calls["factors"], calls["measures"])


def stop_at(kind: type, number: int) -> Any:
    """Make the call of this number of a worker end the run."""
    call: Callable[..., Any] = kind.__call__
    made = itertools.count(1)

    def stopping(*arguments: Any) -> Any:
        if next(made) == number:
            raise Stopped
        return call(*arguments)

    return patch.object(kind, "__call__", stopping)


def stopped(merge: Steered, kind: type = MergeWorker, number: int = 1) -> None:
    """Leave behind what a run leaves that ends at this call; by default before the first block."""
    with stop_at(kind, number), pytest.raises(Stopped):
        merge.run()
    assert merge.left_over() == [merge.partial.name]


MATRICES = 4

KILLER = """
import os, signal, sys
from importlib import import_module
how, module, name, number = sys.argv[1:5]
kind = getattr(import_module(f"uipe_merge.{module}"), name)
call, made = kind.__call__, []
def killing(*arguments):
    made.append(1)
    if len(made) == int(number):
        os.kill(os.getpid(), signal.Signals[how])
    return call(*arguments)
kind.__call__ = killing
sys.argv[1:] = sys.argv[5:]
from uipe_merge.cli.app import main
main()
"""


def killed(merge: Steered, how: str, place: str, number: int) -> tuple[int, str]:
    """Run a merge in a process that sends itself a signal at a call: how it ends, and stderr."""
    words = [sys.executable, "-c", KILLER, how, *place.split(), str(number), *merge.command()]
    done = subprocess.run(words, capture_output=True, check=False, timeout=100, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("place", "number", "threads", "to_do"),
    [
        ("decomposing FactorsWorker", 1, 1, Done(MATRICES, 1)),
        ("decomposing FactorsWorker", 3, 1, Done(MATRICES - 2, 1)),
        ("measuring ProductsWorker", 1, 1, Done(0, 1)),
        ("measuring ProductsWorker", 5, 3, Done(0, 1)),
        ("worker MergeWorker", 1, 1, Done(0, 0)),
        ("worker MergeWorker", 8, 1, Done(0, 0)),
    ],
    ids=str,
)
def test_hazard_sigkill_then_run_again_same_bytes(
    tmp_path: Path, place: str, number: int, threads: int, to_do: Done
) -> None:
    merge = steered_merge(tmp_path, threads=threads)
    with counted() as done:
        complete = merge.undisturbed()
    assert done() == (MATRICES, 1)
    before = merge.family.sources()
    assert killed(merge, "SIGKILL", place, number) == (-signal.SIGKILL, "")
    assert merge.state(complete) == "absent"
    assert merge.left_over() == [merge.partial.name]
    with counted() as done:
        result = run_here(*merge.command())
    assert (result.code, result.err) == (0, "")
    assert done() == to_do
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []
    assert merge.family.sources() == before


@pytest.mark.parametrize("place", ["decomposing FactorsWorker", "measuring ProductsWorker"])
def test_hazard_a_signal_before_anything_is_written(tmp_path: Path, place: str) -> None:
    merge = steered_merge(tmp_path, threads=2)
    complete = merge.undisturbed()
    code, err = killed(merge, "SIGTERM", place, 2)
    assert (code, err.count("\n")) == (143, 1), err
    assert "the same command goes on where this one stopped" in err
    assert merge.state(complete) == "absent"
    assert merge.left_over() == [merge.partial.name]
    assert not (merge.partial / "lock").exists()
    merge.mend(complete)


def test_a_run_that_is_stopped_again_and_again_gets_to_its_end(tmp_path: Path) -> None:
    merge = steered_merge(tmp_path)
    complete = merge.undisturbed()
    total = Done(0, 0)
    for kind, number in [
        *[(decomposing.FactorsWorker, 2)] * 3,
        (measuring.ProductsWorker, 4),
        (MergeWorker, 1),
        (MergeWorker, 7),
    ]:
        with counted() as done:
            stopped(merge, kind, number)
        total = Done(total.factors + done().factors, total.measures + done().measures)
    with counted() as done:
        merge.run()
    assert done() == (0, 0)
    # The factors were found once each; the inner products taken up twice and finished once.
    assert total == (MATRICES, 2)
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


@pytest.mark.parametrize("manner", ["before", "onwards"])
def test_the_disk_fails_at_any_call_for_what_is_measured(tmp_path: Path, manner: Manner) -> None:
    with in_memory(tmp_path) as memory:
        merge = steered_merge(memory / "merge")
        complete = merge.undisturbed()
        log = FailingFileSystem(merge.output.parent)
        merge.run(log)
        merge.clear()
        places = [n for n, call in enumerate(log.calls, 1) if "measured" in f"{call}"]
        names = {log.calls[n - 1].name for n in places}
        assert {"make_directory", "create", "write", "rename", "append", "remove_tree"} <= names
        # Making the journal ready, and the first shard that follows what was measured.
        for number in [places[0] - 1, *places, places[-1] - 1, places[-1] + 1]:
            fake = FailingFileSystem(merge.output.parent, number, manner=manner)
            with pytest.raises(OutputError):
                merge.run(fake)
            assert fake.failed, number
            merge.state(complete)
            assert merge.left_over() in ([], [merge.partial.name]), log.calls[number - 1]
            merge.mend(complete)
            merge.clear()


def line(value: object) -> bytes:
    """A line as journals have it, with the CRC that belongs to it."""
    text = json.dumps(value).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def flipped(raw: bytes) -> bytes:
    return raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]


def other_products(raw: bytes) -> bytes:
    """Products of the same tensors that were measured of something else."""
    value = json.loads(raw.partition(b" ")[2])
    value["key"] = "0" * 64
    value["value"] = {name: [1.0] * len(row) for name, row in value["value"].items()}
    return line(value)


Change = Callable[[bytes], bytes | None]

FACTOR = "000001.safetensors"
DAMAGES: dict[str, tuple[str, Change, Done]] = {
    "products torn": ("products", lambda raw: raw[: len(raw) // 2], Done(0, 1)),
    "products without their end": ("products", lambda raw: raw[:-1], Done(0, 1)),
    "products with a bit flipped": ("products", flipped, Done(0, 1)),
    "products emptied": ("products", lambda _: b"", Done(0, 1)),
    "products gone": ("products", lambda _: None, Done(0, 1)),
    "products of something else": ("products", other_products, Done(0, 1)),
    "products that are none": ("products", lambda _: line([1, 2]), Done(0, 1)),
    "a factor torn": (FACTOR, lambda raw: raw[: len(raw) // 2], Done(1, 0)),
    "a factor with a bit flipped": (FACTOR, flipped, Done(1, 0)),
    "a factor longer": (FACTOR, lambda raw: raw + b"\0", Done(1, 0)),
    "a factor gone": (FACTOR, lambda _: None, Done(1, 0)),
    "the list of factors torn": ("factors", lambda raw: raw[:-5], Done(1, 0)),
    "the list of factors gone": ("factors", lambda _: None, Done(MATRICES, 0)),
    "a draft beside": ("products.tmp", lambda _: b"x", Done(0, 0)),
}


@pytest.mark.parametrize(("name", "change", "to_do"), DAMAGES.values(), ids=DAMAGES)
def test_what_was_measured_and_is_damaged_is_measured_again(
    tmp_path: Path, name: str, change: Change, to_do: Done
) -> None:
    merge = steered_merge(tmp_path)
    complete = merge.undisturbed()
    stopped(merge)
    path = merge.measured / name
    changed = change(path.read_bytes() if path.exists() else b"")
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    with counted() as done:
        merge.run()
    assert done() == to_do
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


def test_what_is_measured_is_there_between_the_passes_and_nowhere_after(tmp_path: Path) -> None:
    merge = steered_merge(tmp_path)
    stopped(merge)
    names = [f"{number:06d}.safetensors" for number in range(MATRICES)]
    assert sorted(os.listdir(merge.measured)) == [*names, "factors", "products"]
    (raw,) = (merge.measured / "products").read_bytes().splitlines(keepends=True)
    assert raw == line(json.loads(raw[9:])) or zlib.crc32(raw[9:-1]) == int(raw[:8], 16)
    merge.run()
    assert merge.left_over() == []
    assert not any("measured" in name or name in names for name in contents(merge.output))


# ---------------------------------------------------------------- another command in between

BASE = "--along {related} --rank 2 --add {kept}=0.1"
OTHERS = {
    "--along {kept} --rank 2 --add {kept}=0.1": ["along"],
    "--along {related}@@{kept} --rank 2 --add {kept}=0.1": ["along"],
    "--along {related} --along {kept} --rank 2 --add {kept}=0.1": ["along"],
    f"{BASE} --min-cos 0.5": ["min_cos"],
    f"{BASE} --max-alpha 2": ["max_alpha"],
    f"{BASE} --away-from original": ["away_from"],
    f"{BASE} --away-from original --always": ["always", "away_from"],
    "--along {related} --rank 3 --add {kept}=0.1": ["rank"],
    "--along {related} --energy 0.5 --add {kept}=0.1": ["energy", "rank"],
    f"{BASE} --rank-all": ["rank_all"],
    "--along {related} --rank 2": ["add"],
    "--along {related} --rank 2 --add {kept}=0.2": ["add"],
    "--along {related} --rank 2 --add {related}=0.1": ["add"],
    f"{BASE} --granularity tensor": ["granularity"],
    f"{BASE} --control random": ["control"],
    f"{BASE} --seed 1": ["seed"],
    f"{BASE} --alpha 2": ["alpha"],
    "--alpha 1": ["add", "along", "rank"],
}


def changed_at(path: Path) -> None:
    """Change one bit of a file's last byte."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_another_command_is_refused_naming_what_differs(tmp_path: Path) -> None:
    family = write_family(tmp_path / "models", small_tensors(), shards=1)
    out = tmp_path / "out"
    complete = family.merge(out, BASE)
    shutil.rmtree(out)
    with stop_at(MergeWorker, 2), pytest.raises(Stopped):
        run_here(*family.pair, "-o", out, *family.words(BASE))
    partial = tmp_path / ".out.uipe-partial"
    left = contents(partial)

    def refused(options: str, fields: list[str]) -> None:
        for more in ([], ["--dry-run"]):
            result = run_here(*family.pair, "-o", out, *family.words(options), *more)
            assert_refused(result, 8, str(partial), "unfinished run that differs in")
            named = result.err.partition("differs in ")[2].partition(";")[0].split(", ")
            assert set(fields) <= set(named) <= {*fields, "plan", "further"}, (options, named)
            assert contents(partial) == left

    for options, fields in OTHERS.items():
        refused(options, fields)
    file = family.root / "related" / "model.safetensors"
    original, times = file.read_bytes(), file.stat()
    changed_at(file)
    refused(BASE, ["further"])
    file.write_bytes(original)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with counted() as done:
        assert family.merge(out, BASE) == complete
    assert done() == (0, 0)


@pytest.mark.parametrize("options", [options for options in OTHERS if "{related}" in options])
def test_to_start_anew_with_another_command_takes_nothing_stale(
    tmp_path: Path, small: Family, options: str
) -> None:
    out = tmp_path / "out"
    complete = small.merge(out, options)
    shutil.rmtree(out)
    with stop_at(MergeWorker, 2), pytest.raises(Stopped):
        run_here(*small.pair, "-o", out, *small.words(BASE))
    assert small.merge(out, options, "--overwrite") == complete


@pytest.mark.parametrize(
    "second", ["--rank 2 --seed 1", "--energy 0.85", "--rank 2 --dtype float32"]
)
def test_products_of_other_factors_are_stale(tmp_path: Path, second: str) -> None:
    """A matrix large enough to be decomposed by iterations, which end a little elsewhere."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, side, generator=generator) for side in (160, 192))
    update = (one.T * torch.tensor([3.0, 2.0, 0.9])) @ two
    update += 0.2 * torch.randn(160, 192, generator=generator)
    base = torch.randn(160, 192, generator=generator)
    related = base + 0.1 * update + 0.1 * torch.randn(160, 192, generator=generator)
    name = "model.layers.0.a.weight"
    family, out = Family(tmp_path / "models"), tmp_path / "out"
    for side, tensor in (
        ("original", base),
        ("unlearned", base + 0.1 * update),
        ("related", related),
    ):
        write_checkpoint(family.root / side, {name: tensor.bfloat16()})
    first = family.merge(out, "--along {related} --rank 2")
    wanted = family.merge(out, f"--along {{related}} {second}", "--overwrite")
    assert json.loads(wanted["uipe_merge.json"])["tensors"][name]["rank"] == 2
    if "--seed" in second:
        assert groups_of(first) != groups_of(wanted), "nothing that could be stale"
    shutil.rmtree(out)
    with stop_at(MergeWorker, 1), pytest.raises(Stopped):
        run_here(*family.pair, "-o", out, *family.words("--along {related} --rank 2"))
    found = family.merge(out, f"--along {{related}} {second}", "--overwrite")
    assert groups_of(found) == groups_of(wanted)
    assert found == wanted


def test_a_related_checkpoint_that_changed_is_measured_anew(tmp_path: Path) -> None:
    family, out = write_family(tmp_path / "models", small_tensors(), shards=1), tmp_path / "out"
    with stop_at(MergeWorker, 1), pytest.raises(Stopped):
        run_here(*family.pair, "-o", out, *family.words("--along {related}"))
    write_checkpoint(family.root / "related", moved(small_tensors(), seed=9))
    found = family.merge(out, "--along {related}", "--overwrite")
    shutil.rmtree(out)
    assert family.merge(out, "--along {related}") == found


def test_overwrite_replaces_a_model_and_nothing_else(tmp_path: Path, small: Family) -> None:
    out = tmp_path / "out"
    small.merge(out, "--alpha 2")
    result = run_here(*small.pair, "-o", out, *small.words(OPTIONS["all"]))
    assert_refused(result, 8, "exists and is not empty")
    replaced = small.merge(out, OPTIONS["all"], "--overwrite")
    shutil.rmtree(out)
    assert small.merge(out, OPTIONS["all"]) == replaced
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------- reads

Reads = Counter[tuple[str, int, int]]
PASSES = ("factors", "products", "shards")


@contextmanager
def reads() -> Iterator[dict[str, Reads]]:
    """Note every read of a local file: its path, where and how long, by the pass it is made in."""
    found: dict[str, Reads] = {name: Counter() for name in ("", *PASSES)}
    now = [""]
    read = LocalFile.read_into

    def noted(self: LocalFile, buffer: memoryview, offset: int) -> None:
        found[now[0]][os.path.realpath(self.path), offset, len(buffer)] += 1
        read(self, buffer, offset)

    def during(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*arguments: Any, **options: Any) -> Any:
            now[0] = name
            try:
                return function(*arguments, **options)
            finally:
                now[0] = ""

        return inside

    with (
        patch.object(LocalFile, "read_into", noted),
        patch.object(decomposing, "decompose", during("factors", decomposing.decompose)),
        patch.object(measuring, "measure", during("products", measuring.measure)),
        patch.object(engine, "write_shards", during("shards", engine.write_shards)),
    ):
        yield found


def assert_once(found: Reads, directory: Path, nbytes: int) -> None:
    """Every read of a checkpoint was made once, none overlaps, and together they are so long."""
    own = sorted(key for key in found if Path(key[0]).parent == directory)
    assert {found[key] for key in own} <= {1}, directory
    for (file, start, count), (other, following, _) in itertools.pairwise(own):
        assert file != other or start + count <= following
    assert sum(count for _, _, count in own) == nbytes, directory


def bytes_of(directory: Path, wanted: Callable[[str], bool] = lambda _: True) -> int:
    return sum(each.nbytes for name, each in read_tensors(directory).items() if wanted(name))


def is_float(name: str) -> bool:
    return not name.endswith(".ids")


def test_every_checkpoint_is_read_once_a_pass_however_often_it_is_named(
    tmp_path: Path, small: Family
) -> None:
    link = tmp_path / "link"
    link.symlink_to(small.root / "related")
    options = (
        f"--along {{related}} --along {{related}}@@{{unlearned}} --along {link} --away-from {{kept}} "
        f"--always --add {{related}}/=0.5 --add {{related}}@@{{unlearned}}=1 --add {link}@@{{kept}}=1 "
        "--add {unlearned}=0.1 --add {kept}@@{original}=0.3 --granularity model --min-cos -1"
    )
    with reads() as found:
        small.merge(tmp_path / "out", options, "--threads", 1)
    assert not found["factors"]
    for name in ("original", "unlearned", "related", "kept"):
        directory = small.root / name
        assert_once(found["products"], directory, bytes_of(directory, is_float))
        # Integers are kept: of the pair alone, and held against one another.
        pair = name in ("original", "unlearned")
        assert_once(
            found["shards"],
            directory,
            bytes_of(directory, lambda _: True) if pair else bytes_of(directory, is_float),
        )
    inputs = {small.root / name for name in ("original", "unlearned", "related", "kept")}
    assert {Path(key[0]).parent for each in PASSES for key in found[each]} == inputs


def test_what_is_not_needed_is_not_read(tmp_path: Path, small: Family) -> None:
    with reads() as found:
        small.merge(tmp_path / "out", "--alpha 1 --away-from original", "--threads", 1)
    for name in ("original", "unlearned"):
        assert_once(found["products"], small.root / name, bytes_of(small.root / name, is_float))
    with reads() as found:
        small.merge(tmp_path / "two", "--along {related} --add {kept}=1", "--threads", 1)
    files = {name: {Path(key[0]).parent.name for key in found[name]} for name in PASSES}
    assert files["products"] == {"original", "unlearned", "related"}
    assert files["shards"] == {"original", "unlearned", "kept"}


def test_the_pass_for_singular_vectors_reads_the_pair_once(tmp_path: Path, small: Family) -> None:
    with reads() as found:
        small.merge(tmp_path / "out", "--alpha 1 --rank 2 --add {related}=0.5", "--threads", 1)

    def is_target(name: str) -> bool:
        return ".layers." in name and (name.endswith("proj.weight") or name == STACK)

    for name in ("original", "unlearned"):
        assert_once(found["factors"], small.root / name, bytes_of(small.root / name, is_target))
        assert_once(found["shards"], small.root / name, bytes_of(small.root / name))
    others = {Path(key[0]).parent.name for key in found["factors"]} - {"original", "unlearned"}
    assert others <= {"measured"}  # the headers of the factors that it made


def test_an_adapter_as_an_update_shares_the_bytes_of_the_original(
    tmp_path: Path, small: Family
) -> None:
    options = "--along {adapter} --add {adapter}=0.5 --add {adapter}@@{unlearned}=0.25 --min-cos -1"
    with reads() as found:
        small.merge(tmp_path / "out", options, "--threads", 1)
    for name in ("original", "unlearned"):
        assert_once(found["products"], small.root / name, bytes_of(small.root / name, is_float))
        assert_once(found["shards"], small.root / name, bytes_of(small.root / name))
    factors = bytes_of(small.root / "adapter")
    assert_once(found["products"], small.root / "adapter", factors)
    assert_once(found["shards"], small.root / "adapter", factors)


def test_an_adapter_as_an_update_is_the_model_that_it_makes(tmp_path: Path, small: Family) -> None:
    original = read_tensors(small.root / "original")
    factors = read_tensors(small.root / "adapter")
    left = next(each for name, each in factors.items() if "lora_B" in name)
    right = next(each for name, each in factors.items() if "lora_A" in name)
    whole = {name: each.float() if is_float(name) else each for name, each in original.items()}
    whole[BIG] = original[BIG].float() + 2.0 * left @ right
    write_checkpoint(tmp_path / "whole", whole, shards=2)
    for number, update in enumerate(("{adapter}", str(tmp_path / "whole"), "{original}+{adapter}")):
        options = f"--alpha 0.5 --add {update}=0.5 --dtype float32"
        small.merge(tmp_path / f"out-{number}", options)
    one, two, three = (read_tensors(tmp_path / f"out-{number}") for number in range(3))
    for name in original:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(one[name], three[name])


# ---------------------------------------------------------------- with other options


def layers_of(names: list[str]) -> dict[str, list[str]]:
    """The groups of a model by layer; what is in none is alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:3]) if "layers" in parts else name, []).append(name)
    return groups


def projections(family: Family) -> dict[str, tuple[float | None, float]]:
    """Cosine and κ of ``related`` by layer, in float64."""
    original, unlearned, related = (
        {name: each.double() for name, each in read_tensors(family.root / side).items()}
        for side in ("original", "unlearned", "related")
    )
    found: dict[str, tuple[float | None, float]] = {}
    for group, names in layers_of([name for name in unlearned if is_float(name)]).items():
        v, r = (
            torch.cat([(side[name] - original[name]).reshape(-1) for name in names])
            for side in (unlearned, related)
        )
        square, inner = float(v @ v), float(v @ r)
        scale = square**0.5 * float(r @ r) ** 0.5
        cosine = inner / scale if scale else None
        kappa = 0.0 if cosine is None or cosine < 0.05 else inner / square
        found[group] = cosine, min(kappa, 5.0)
    return found


def assert_steered(family: Family, out: Path, alpha: float, dtype: torch.dtype) -> None:
    """Hold an output against α·κ·v in float64, to within the rounding of its type."""
    merged = read_tensors(out)
    original, unlearned = (read_tensors(side) for side in family.pair)
    kappas = projections(family)
    assert merged.keys() == unlearned.keys()
    for group, names in layers_of([name for name in unlearned if is_float(name)]).items():
        for name in names:
            assert merged[name].dtype == dtype
            new, old = unlearned[name].double(), original[name].double()
            wanted = new + alpha * kappas[group][1] * (new - old)
            epsilon = torch.finfo(dtype).eps
            torch.testing.assert_close(
                merged[name].double(), wanted, rtol=epsilon, atol=epsilon / 64
            )


def test_another_dtype_keeps_the_step(tmp_path: Path, small: Family) -> None:
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        small.merge(tmp_path / name, f"--along {{related}} --alpha 0.3 --dtype {name}")
        assert_steered(small, tmp_path / name, 0.3, dtype)


def test_the_size_of_shards_changes_no_tensor(tmp_path: Path, family: Family) -> None:
    for number, options in enumerate((OPTIONS["all"], OPTIONS["random of low rank by chance"])):
        one, two = tmp_path / f"one-{number}", tmp_path / f"two-{number}"
        family.merge(one, options)
        limited = family.merge(two, options, "--max-shard-size", "601KB")
        assert len(weights_of(limited)) > 2
        assert "model.safetensors.index.json" in limited
        for name, tensor in read_tensors(one).items():
            assert bits(tensor).tobytes() == bits(read_tensors(two)[name]).tobytes(), name


def test_chance_keeps_a_small_step_on_average(tmp_path: Path, family: Family) -> None:
    for seed in (0, 1):
        options = f"--along {{related}} --alpha 0.01 --rounding stochastic --seed {seed}"
        manifest = json.loads(family.merge(tmp_path / f"{seed}", options)["uipe_merge.json"])
        assert manifest["groups"]["model.layers.0"]["share_kept"] == pytest.approx(1, abs=0.05)
    one, two = (read_tensors(tmp_path / f"{seed}")[BIG] for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("rows", [0, 40, 45, 50], ids="related has {} rows".format)
@pytest.mark.parametrize(
    "options",
    [
        "--along {related}",
        "--along {related} --rank 2 --rank-all",
        "--along {related} --control random --granularity model",
        "--alpha 1 --add {related}=0.5 --dtype float32",
    ],
)
def test_a_tensor_that_does_not_match_is_kept_and_counts_nowhere(
    tmp_path: Path, small: Family, rows: int, options: str
) -> None:
    """The unlearned embedding has 45 rows, the original one 40."""
    sides = {name: read_tensors(small.root / name) for name in ("original", "unlearned", "related")}
    longer = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    sides["unlearned"][EMBEDDING] = longer[:45]
    sides["related"][EMBEDDING] = longer[:rows]
    if not rows:
        del sides["related"][EMBEDDING]
    other = Family(tmp_path / "other")
    without = Family(tmp_path / "without")
    for name, tensors in sides.items():
        write_checkpoint(other.root / name, tensors)
        rest = {key: each for key, each in tensors.items() if key != EMBEDDING}
        write_checkpoint(without.root / name, rest)
    kept = other.merge(tmp_path / "one", options, "--on-mismatch", "keep-unlearned")
    plain = without.merge(tmp_path / "two", options)
    assert all(EMBEDDING not in group for group in groups_of(kept))
    assert groups_of(kept) == groups_of(plain)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    wanted = longer[:45].to(one[EMBEDDING].dtype)
    assert bits(one.pop(EMBEDDING)).tobytes() == bits(wanted).tobytes()
    assert {name: bits(each).tobytes() for name, each in one.items()} == {
        name: bits(each).tobytes() for name, each in two.items()
    }


def test_rows_that_only_one_side_has_move_by_what_is_added_alone(
    tmp_path: Path, small: Family
) -> None:
    other = Family(tmp_path / "models")
    generator = torch.Generator().manual_seed(0)
    for name in ("original", "unlearned", "related"):
        tensors = read_tensors(small.root / name)
        if name != "original":
            more = (torch.randn(5, 16, generator=generator) * 0.02).bfloat16()
            tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], more])
        write_checkpoint(other.root / name, tensors)
    rows = ("--on-mismatch", "common-rows", "--dtype", "float32")
    other.merge(tmp_path / "out", "--along {related}", *rows)
    unlearned, related = (
        read_tensors(other.root / name)[EMBEDDING].float() for name in ("unlearned", "related")
    )
    found = read_tensors(tmp_path / "out")[EMBEDDING]
    assert torch.equal(found[40:], unlearned[40:])
    assert not torch.equal(found[:40], unlearned[:40])
    other.merge(tmp_path / "two", "--alpha 1 --add {related}@@{unlearned}=0.5", *rows)
    found = read_tensors(tmp_path / "two")[EMBEDDING]
    assert torch.equal(found[40:], unlearned[40:] + 0.5 * (related[40:] - unlearned[40:]))


def test_from_python_as_from_the_command_line(tmp_path: Path, small: Family) -> None:
    root, out = small.root, tmp_path / "out"
    options = (
        "--along {related} --min-cos -0.5 --max-alpha 2 --away-from {kept}@@{unlearned} --always "
        "--energy 0.5 --rank-all --granularity model --add {kept}=-0.25 --seed 4"
    )
    told = small.merge(out, options)
    shutil.rmtree(out)
    steering = uipe_merge.Steering(
        along=(uipe_merge.Update(str(root / "related")),),
        min_cos=-0.5,
        max_alpha=2.0,
        away_from=uipe_merge.Update(str(root / "kept"), str(root / "unlearned")),
        always=True,
        energy=0.5,
        rank_all=True,
        granularity="model",
        add=((uipe_merge.Update(str(root / "kept")), -0.25),),
    )
    report = uipe_merge.merge(*small.pair, out, steering=steering, seed=4, progress=False)
    assert contents(out) == told
    assert json.loads(json.dumps(report.groups)) == groups_of(told)
    assert set(report.groups) == {"model"}


def test_whole_numbers_from_python_give_the_same_bytes(tmp_path: Path, small: Family) -> None:
    """``max_alpha=2`` and ``2.0`` are one recipe, and one run goes on with the other's work."""
    found = []
    for most, least in ((2, 0), (2.0, 0.0)):
        update = Update(str(small.root / "related"))
        steering = Steering(along=(update,), max_alpha=most, min_cos=least, add=((update, most),))
        out = tmp_path / "out"
        uipe_merge.merge(*small.pair, out, steering=steering, overwrite=True, progress=False)
        found.append(contents(out))
    assert found[0] == found[1]


def test_the_bar_of_every_pass_is_shown(tmp_path: Path, small: Family) -> None:
    """Whoever watches is told of each pass, and of as many bytes as were announced."""

    class Watch:
        def __init__(self) -> None:
            self.passes: list[list[int]] = []
            self.closed = 0

        def start(self, total: int) -> None:
            self.passes.append([total, 0])

        def advance(self, written: int, shard: str) -> None:
            assert shard
            self.passes[-1][1] += written

        def close(self) -> None:
            self.closed += 1

    steering = Steering(along=(Update(str(small.root / "related")),), rank=2)
    watch = Watch()
    uipe_merge.merge(*small.pair, tmp_path / "out", steering=steering, progress=watch)
    assert len(watch.passes) == 3
    assert watch.closed == 1
    for announced, done in watch.passes[:2]:
        assert done == announced
    uipe_merge.merge(*small.pair, tmp_path / "two", steering=steering, progress=True)


# ---------------------------------------------------------------- dry runs


def dry(family: Family, out: Path, options: str, *more: object) -> tuple[str, str]:
    """A dry run's stdout and stderr; it must leave everything as it is."""
    before = tree(family.root), tree(out.parent)
    result = run_here(*family.pair, "-o", out, *family.words(options), "--dry-run", *more)
    assert result.code == 0, result
    assert (tree(family.root), tree(out.parent)) == before
    return result.out, result.err


def test_a_dry_run_shows_what_was_measured_and_writes_nothing(
    tmp_path: Path, small: Family
) -> None:
    out = tmp_path / "out"
    options = "--along {related} --away-from {kept} --alpha 0.5"
    text, _ = dry(small, out, options)
    found = json.loads(dry(small, out, options, "--json")[0])["groups"]
    wanted = projections(small)
    assert found.keys() == wanted.keys()
    for name, (cosine, kappa) in wanted.items():
        group = found[name]
        assert group["cosines"] == [cosine if cosine is None else pytest.approx(cosine, rel=1e-6)]
        assert group["kappas"] == [pytest.approx(kappa, rel=1e-6)] or kappa == 5.0
        assert group["kappa"] == pytest.approx(kappa, rel=1e-6)
        assert group["alpha"] == pytest.approx(0.5 * kappa, rel=1e-6)
        assert group["conflict"] is ((group["protected_cosine"] or 0) < 0)
        assert bool(group["removed"]) is group["conflict"]
        row = next(each for each in text.splitlines() if each.startswith(f"{name} "))
        assert f"{group['kappa']:.4g}" in row
        assert f"{group['alpha']:.4g}" in row
        assert ("yes" if group["conflict"] else "no") in row.split()
        assert cosine is None or f"{cosine:.4g}" in row
    assert {group["conflict"] for group in found.values()} == {True, False}
    for title in ("group", "cos(r, v)", "κ", "cos(s, protected)", "conflict", "removed", "α"):
        assert title in text
    ran = groups_of(small.merge(out, options))
    assert {name: {key: ran[name][key] for key in found[name]} for name in ran} == found


def test_a_dry_run_of_one_option_shows_its_columns_alone(tmp_path: Path, small: Family) -> None:
    text, _ = dry(small, tmp_path / "out", "--alpha 1 --away-from original --granularity model")
    assert "conflict" in text
    assert "κ" not in text
    text, _ = dry(small, tmp_path / "out", "--along {related}")
    assert "κ" in text
    assert "conflict" not in text
    for options in ("--alpha 1 --add {kept}=1", "--alpha 1 --rank 2"):
        text, err = dry(small, tmp_path / "out", options)
        assert "group" not in text
        assert "measured" not in err
        assert "groups" not in json.loads(dry(small, tmp_path / "out", options, "--json")[0])


def test_a_dry_run_with_a_rank_says_that_coefficients_come_later(
    tmp_path: Path, small: Family
) -> None:
    text, err = dry(small, tmp_path / "out", "--along {related} --rank 2")
    assert "coefficients are measured when it runs" in err
    assert "peak memory" in text
    assert "κ" not in text
    assert os.listdir(tmp_path) == []


PEAK = """
import sys
from pathlib import Path
from uipe_merge.cli.app import _run
code = _run(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
[peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
sys.stderr.write(f"PEAK {int(peak) * 1024}")
sys.stderr.flush()
sys.exit(code)
"""


@pytest.mark.parametrize("options", ["--alpha 1 --rank 2", "--alpha 1 --rank 300"])
def test_the_peak_of_memory_that_is_told_holds_with_a_rank(tmp_path: Path, options: str) -> None:
    family = Family(tmp_path / "models")
    for side in ("original", "unlearned"):
        names = [f"model.layers.0.{kind}.weight" for kind in ("a", "b")]
        tensors = {name: torch.randn(1000, 4000).bfloat16() for name in names}
        write_checkpoint(family.root / side, tensors)
    found = json.loads(dry(family, tmp_path / "out", options, "--json", "--threads", 2)[0])
    words = [*map(str, family.pair), *family.words(options), "-o", str(tmp_path / "out")]
    words += ["--threads", "2", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], capture_output=True, check=True, text=True
    )
    peak = int(done.stderr.rpartition("PEAK ")[2])
    assert peak <= found["peak_memory_bytes"]


@pytest.mark.skipif(not native.COMPILED, reason="this copy was built without a compiler")
def test_torch_is_not_imported_where_it_is_not_needed(tmp_path: Path, small: Family) -> None:
    program = (
        "import sys; from uipe_merge.cli.app import _run; code = _run(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    for options, more in (
        ("--alpha 1", ["--dry-run"]),
        ("--along {related}", ["--dry-run"]),
        ("--along {related} --away-from original --add {related}=0.5", []),
    ):
        words = [*map(str, small.pair), "-o", str(tmp_path / "out"), *small.words(options), "-q"]
        command = [sys.executable, "-c", program, *words, *more]
        subprocess.run(command, check=True, timeout=60)


# ---------------------------------------------------------------- the command of the manifest

ODD_NAMES = ["with space", "a,b", "x=1", "y@@z", "it's", "[bold]", "-dash", "ünï", "merge", "a+b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_command_in_the_manifest_gives_the_same_bytes(
    tmp_path: Path, small: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    for side in ("original", "unlearned", "kept"):
        (tmp_path / side).symlink_to(small.root / side)
    (tmp_path / name).symlink_to(small.root / "related")
    monkeypatch.chdir(tmp_path)
    named = f"./{name}" if name.startswith("-") else name
    words = ["--along", named, "--away-from", f"{named}@@unlearned", "--add", f"{named}=0.25"]
    words += ["--add", f"kept@@{named}=-1e-05" if "@@" not in name else "kept=0.1"]
    words += ["--min-cos", "-0.25", "--max-alpha", "0.1", "--seed", "3"]
    result = run_here("original", "unlearned", "-o", "out", "-q", *words)
    assert (result.code, result.err) == (0, "")
    command = json.loads(Path("out/uipe_merge.json").read_text())["command"]
    program, *again = shlex.split(command)
    assert program == "uipe-merge"
    again[again.index("-o") + 1] = "again"
    result = run_here(*again, "-q")
    assert (result.code, result.err) == (0, "")
    assert weights_of(contents(Path("again"))) == weights_of(contents(Path("out")))
    one, two = (groups_of(contents(Path(each))) for each in ("out", "again"))
    assert one == two


@pytest.mark.parametrize(
    ("new", "old"),
    [("related", "y@@z"), ("y@@z", "unlearned"), ("original", ""), ("related", "original")],
    ids=str,
)
def test_the_command_says_what_python_was_told(
    tmp_path: Path, small: Family, new: str, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that the command line reads otherwise: ``original``, and ``@@`` in an older one."""
    import shlex

    for side in ("original", "unlearned", "related"):
        (tmp_path / side).symlink_to(small.root / side)
    (tmp_path / "y@@z").symlink_to(small.root / "kept")
    monkeypatch.chdir(tmp_path)
    steering = Steering(along=(Update(new, old),), min_cos=-1, add=((Update(new, old), 0.5),))
    uipe_merge.merge("original", "unlearned", "out", steering=steering, progress=False)
    again = shlex.split(json.loads(Path("out/uipe_merge.json").read_text())["command"])[1:]
    again[again.index("-o") + 1] = "again"
    result = run_here(*again, "-q")
    assert (result.code, result.err) == (0, "")
    assert weights_of(contents(Path("again"))) == weights_of(contents(Path("out")))


def test_a_directory_whose_name_has_the_sign_wins(
    tmp_path: Path, small: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("original", "unlearned", "related", "kept"):
        (tmp_path / side).symlink_to(small.root / side)
    monkeypatch.chdir(tmp_path)
    family = Family(tmp_path)
    pair = family.merge(tmp_path / "pair", "--alpha 1 --add related@@kept=1")
    (tmp_path / "related@@kept").symlink_to(small.root / "related")
    whole = family.merge(tmp_path / "whole", "--alpha 1 --add related@@kept=1")
    alone = family.merge(tmp_path / "alone", "--alpha 1 --add related=1")
    assert weights_of(whole) == weights_of(alone) != weights_of(pair)
