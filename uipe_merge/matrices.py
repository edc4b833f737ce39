"""One matrix at a time: its update read to where it is decomposed, and the coherent part of it.

Importing this imports torch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from uipe_merge.arithmetic.svd import LowRank, by_energy, by_rank
from uipe_merge.coherent import at_once, targets
from uipe_merge.cutting import ranges
from uipe_merge.deltas import Deltas, Growths
from uipe_merge.device import Filling, slots, slower
from uipe_merge.errors import NumericError
from uipe_merge.guard import Guard
from uipe_merge.kernels import Kernels
from uipe_merge.once import Once
from uipe_merge.plan import BLOCK
from uipe_merge.planning import noise_key
from uipe_merge.reader import BlockReader, Pair, shown, widest_input

if TYPE_CHECKING:
    from uipe_merge.plan import Plan, Step


class Matrices:
    """The updates of one thread's matrices, each on the device as a whole."""

    def __init__(self, plan: Plan, pair: Pair, growths: Growths, device: str) -> None:
        """Allocate the buffers that all of them are read through."""
        self._plan = plan
        self._pair = pair
        self._device = device
        self._slots = slots(device)
        self._reader = BlockReader(pair, widest_input(plan), BLOCK)
        self._kernels = Kernels()
        self._deltas = Deltas(pair, growths)

    def load(self, step: Step, number: int) -> torch.Tensor:
        """Return v of a tensor's matrix, float32 of shape ``(rows, columns)``.

        Args:
            step: Of a matrix, or of a stack of them.
            number: Which of the stack.

        Raises:
            NumericError: A value is not finite.
        """
        rows, columns = step.source.shape[-2:]
        first, end = number * rows * columns, (number + 1) * rows * columns
        filling = Filling(rows * columns, self._device, self._slots)
        for start, count in ranges([step], BLOCK):
            if start < end and start + count > first:
                self._fill(filling, step, max(start, first), min(start + count, end))
        update = filling.whole()
        if not bool(torch.isfinite(update).all()):
            self._refuse(step)
        return update.reshape(rows, columns)

    def decompose(self, step: Step, number: int, update: torch.Tensor) -> LowRank:
        """Return the coherent part of an update that was loaded."""
        steering = self._plan.recipe.steering
        first = number * update.numel()
        seed = noise_key(self._plan.recipe.seed, f"rank\0{step.parameter}\0{first}")
        if steering.rank is not None:
            return by_rank(update, steering.rank, seed)
        assert steering.energy is not None  # noqa: S101 - one of the two is why we are here
        return by_energy(update, steering.energy, seed)

    def close(self) -> None:
        """Close the input files."""
        self._reader.close()
        self._deltas.close()

    def _fill(self, filling: Filling, step: Step, begin: int, end: int) -> None:
        """Append the update of elements ``begin`` to ``end``, which lie in one block."""
        here = step.at(begin, end - begin)
        self._reader.begin()
        operands = self._reader.operands(here, end - begin)
        for _, values in self._kernels.update(here, operands, self._deltas.at(step, begin)):
            filling.add(values)

    def _refuse(self, step: Step) -> None:
        Guard(self._plan, self._pair).check_inputs(step)
        raise NumericError(
            "has an update too large for float32",
            file=shown(self._pair, step.source, 1),
            tensor=step.name,
            remedy="leave it out with --alpha-rule 'NAME=0'",
        )


def compare(plan: Plan, pair: Pair, device: str, threads: int) -> str | None:
    """Do the largest matrix on a device and on the processor; say so if the device is slower.

    Nothing that is written depends on it. Nothing is said where the processor cannot do it, for
    want of memory.

    Raises:
        NumericError: A value is not finite.
        CorruptInputError: An input changed or ended early.
    """
    todo = targets(plan)
    if not todo:
        return None
    step = max(todo, key=lambda each: math.prod(each.source.shape[-2:]))._replace(further=())
    matrices = Matrices(plan, pair, Once(), device)
    try:
        update = matrices.load(step, 0)
        found = slower(partial(matrices.decompose, step, 0), update, min(threads, at_once()))
    except (RuntimeError, MemoryError):
        return None
    finally:
        matrices.close()
    return found and f"--device {device} took {found}: it is faster without"
