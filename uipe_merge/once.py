"""What all threads of a run need and one of them is enough to compute."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Value = TypeVar("Value")

_KEPT = 32
"""Values that are remembered. The threads work on neighbouring tensors, so few are needed."""


class Once(Generic[Value]):
    """Values computed by whoever asks first, while the others wait; the oldest are forgotten."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._lock = threading.Lock()
        self._values: dict[Hashable, Future[Value]] = {}

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return the value of ``key``, from ``compute`` if nobody asked for it lately.

        Raises:
            BaseException: What ``compute`` raised, to everybody who waits for it.
        """
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                found, first = value, False
            else:
                found, first = Future(), True
                if len(self._values) >= _KEPT:
                    del self._values[next(iter(self._values))]
                self._values[key] = found
        if first:
            try:
                found.set_result(compute())
            except BaseException as error:  # noqa: BLE001 - result() raises it again, here too
                found.set_exception(error)
        return found.result()
