"""What one thread computes with when the compiled kernel does not do; made when first needed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uipe_merge.deltas import Deltas, Growths
    from uipe_merge.kernels import Kernels
    from uipe_merge.reader import Pair


class Computing:
    """The kernels and deltas of one thread. Nothing of torch is imported before they are asked for."""

    def __init__(self, pair: Pair, growths: Growths) -> None:
        """Remember what they are made from."""
        self._pair = pair
        self._growths = growths
        self._made: tuple[Kernels, Deltas] | None = None

    def get(self) -> tuple[Kernels, Deltas]:
        """Return them, made at the first call."""
        if self._made is None:
            from uipe_merge.deltas import Deltas
            from uipe_merge.kernels import Kernels

            self._made = Kernels(), Deltas(self._pair, self._growths)
        return self._made

    def close(self) -> None:
        """Close the files of the deltas, if any were made."""
        if self._made is not None:
            self._made[1].close()


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch its number of threads back, which every ``Kernels`` sets to one.

    Where torch was not there before, that is the number it began with.
    """
    threads = None
    if "torch" in sys.modules:
        import torch

        threads = torch.get_num_threads()
    try:
        yield
    finally:
        if "uipe_merge.kernels" in sys.modules:
            import torch

            from uipe_merge.kernels import THREADS_FOUND

            torch.set_num_threads(threads or THREADS_FOUND)
