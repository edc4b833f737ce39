"""Singular vectors on a GPU: the way there, and whether it was worth it. Importing this imports torch.

Nothing else of a merge is computed there. An element is read once, and its arithmetic on the
processor takes less time than the disk; a GPU would get it over one more bus, twice.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from uipe_merge.arithmetic.svd import LowRank

PIECE = 2**20
"""Elements of float32 that are sent at a time."""


def require_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: It is none, or torch cannot use it here.
    """
    if not re.fullmatch(r"cuda(:[0-9]{1,3})?", device):
        raise UsageError(f"'{device}' is no device", remedy="choose cpu, cuda or cuda:0 and so on")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UsageError(
            f"device '{device}' cannot be used: {reason}", remedy="leave out --device"
        ) from None


class Slot(Protocol):
    """A buffer whose values may be on their way.

    Attributes:
        values: float32, of shape ``(n,)``, in the processor's memory.
    """

    values: torch.Tensor

    def begin(self, device: torch.device, /) -> None:
        """Let all that the device was told so far come before what will be sent."""

    def send(self, target: torch.Tensor, /) -> None:
        """Begin to copy the first values to ``target``, of shape ``(k,)`` with k ≤ n."""

    def wait(self) -> None:
        """Return when what was sent last has arrived, at once if nothing was."""


class PinnedSlot:
    """A slot in memory that stays where it is, so that the GPU fetches from it by itself."""

    def __init__(self, device: str) -> None:
        """Allocate ``PIECE`` values, and a stream of the device of its own."""
        self.values = torch.empty(PIECE, dtype=torch.float32, pin_memory=True)
        # torch has no types for the two.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self, device: torch.device) -> None:
        """Wait once: the memory that is filled may be a tensor's whose last use is still to come."""
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def send(self, target: torch.Tensor) -> None:
        """Begin to copy, beside whatever other threads let the device do."""
        with torch.cuda.stream(self._stream):
            target.copy_(self.values[: len(target)], non_blocking=True)
            self._arrived.record(self._stream)

    def wait(self) -> None:
        """Wait for the copy."""
        self._arrived.synchronize()


def slots(device: str) -> tuple[Slot, ...]:
    """Return the two buffers that one thread sends from; none where nothing is sent."""
    return () if device == "cpu" else (PinnedSlot(device), PinnedSlot(device))


class Filling:
    """A vector that is filled from its beginning to its end, in the memory where it is used.

    On a device it goes through slots: one is filled while another is on its way, so that the disk,
    the processor and the bus are busy at a time, and the processor's memory never has the whole.
    """

    def __init__(self, elements: int, device: str, slots: Sequence[Slot]) -> None:
        """Allocate float32 of shape ``(elements,)`` on a device; with no slots, the processor's."""
        self._whole = torch.empty(elements, dtype=torch.float32, device=device)
        self._slots = slots
        self._turn = 0
        self._sent = self._held = 0
        for slot in slots:
            slot.begin(self._whole.device)

    def add(self, values: torch.Tensor) -> None:
        """Append values, of shape ``(n,)``.

        Raises:
            ValueError: They are more than there is room for.
        """
        if self._sent + self._held + len(values) > len(self._whole):
            raise ValueError("more values than elements")
        while len(values):
            space = self._space()
            taken = values[: len(space)]
            space[: len(taken)] = taken
            self._held += len(taken)
            values = values[len(taken) :]
            if self._slots and len(taken) == len(space):
                self._send()

    def whole(self) -> torch.Tensor:
        """Return the vector, all of which was added."""
        if self._slots:
            self._send()
            for slot in self._slots:
                slot.wait()
        return self._whole

    def _space(self) -> torch.Tensor:
        """Return where the next values go."""
        if not self._slots:
            return self._whole[self._held :]
        slot = self._slots[self._turn]
        if not self._held:
            slot.wait()
        return slot.values[self._held :]

    def _send(self) -> None:
        if self._held:
            self._slots[self._turn].send(self._whole[self._sent : self._sent + self._held])
            self._sent += self._held
            self._held = 0
            self._turn = (self._turn + 1) % len(self._slots)


def slower(
    find: Callable[[torch.Tensor], LowRank],
    matrix: torch.Tensor,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> str | None:
    """Say so if the processor takes less time for a matrix than the device that it lies on.

    Args:
        find: What is done with it.
        matrix: Of shape ``(rows, columns)``.
        threads: How many matrices the processor does at a time; the device does one.
        clock: Seconds.
    """

    def timed(matrix: torch.Tensor) -> float:
        began = clock()
        find(matrix).right.cpu()  # comes when all of it is done
        return clock() - began

    find(matrix)  # the first time, libraries are loaded
    there, here = timed(matrix), timed(matrix.cpu()) / threads
    if there <= here:
        return None
    size = " × ".join(map(str, matrix.shape))
    return (
        f"{there:.3g} s for the singular vectors of {size}, the processor with {threads} threads "
        f"{here:.3g} s"
    )
