"""The executor seam: anything that maps a worker over items and yields what comes back.

An executor makes its workers itself, one per thread or process, so that each can own its
buffers and descriptors. Results come in any order. The first exception ends the run: no
further item is started, all workers are closed, and it is raised in the caller.
"""

from __future__ import annotations

import os
import queue
import resource
import sys
import threading
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

_READ_A_THREAD = 3  # two inputs, and one a library opens meanwhile
_WRITTEN_A_THREAD = 2  # of each output, which is open twice
_LOCKS = 1  # of each output
_COMMON_FILES = 8  # the three streams, the lock, the journal, a directory being synced

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

MOST_THREADS = 8
"""Threads used by default at most: beyond it the disk is the limit, and memory grows."""


class Worker(Protocol[Item_contra, Result_co]):
    """Does one item after the other, in one thread."""

    def __call__(self, item: Item_contra, /) -> Result_co:
        """Do one item."""

    def close(self) -> None:
        """Give back what it holds."""


class Executor(Protocol):
    """Runs workers."""

    @property
    def width(self) -> int:
        """How many items may be in hand at once."""

    def run(
        self, make_worker: Callable[[], Worker[Item, Result]], items: Iterable[Item]
    ) -> Generator[Result]:
        """Yield the result of every item, as they come. ``items`` are taken in order."""


class Serial:
    """One item after the other, in the calling thread."""

    width = 1

    def run(
        self, make_worker: Callable[[], Worker[Item, Result]], items: Iterable[Item]
    ) -> Generator[Result]:
        """Yield the results in the order of the items."""
        worker = make_worker()
        try:
            for item in items:
                yield worker(item)
        finally:
            worker.close()


class Threads:
    """A few threads; the work releases the interpreter in its reads, writes and kernels."""

    def __init__(self, width: int) -> None:
        """Use ``width`` threads."""
        self.width = width

    def run(
        self, make_worker: Callable[[], Worker[Item, Result]], items: Iterable[Item]
    ) -> Generator[Result]:
        """Yield the results as they come; closing the iterator stops the threads."""
        crew = _Crew(make_worker, items)
        threads = [
            threading.Thread(target=crew.work, name=f"uipe-merge-{number}", daemon=True)
            for number in range(self.width)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                _start(thread)
                started.append(thread)
            yield from crew.results(len(threads))
        finally:
            crew.stop.set()
            for thread in started:
                thread.join()


def _start(thread: threading.Thread) -> None:
    """Start a thread; that there is no room for its stack is what is missing memory.

    Raises:
        MemoryError: It cannot be started.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise MemoryError(str(error)) from None


class _Crew(Generic[Item, Result]):
    """What the threads of one run share: the items, the results and the sign to stop."""

    def __init__(
        self, make_worker: Callable[[], Worker[Item, Result]], items: Iterable[Item]
    ) -> None:
        self._make_worker = make_worker
        self._items = iter(items)
        self._taking = threading.Lock()
        self._done: queue.SimpleQueue[_Done[Result] | BaseException | None] = queue.SimpleQueue()
        self.stop = threading.Event()

    def work(self) -> None:
        """Do items until there are none; the body of a thread."""
        try:
            worker = self._make_worker()
            try:
                for item in self._take():
                    self._done.put(_Done(worker(item)))
            finally:
                worker.close()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller
            self.stop.set()
            self._done.put(error)
        else:
            self._done.put(None)

    def results(self, running: int) -> Iterator[Result]:
        """Yield what comes until every thread has ended; then raise the first failure."""
        failure: BaseException | None = None
        while running:
            value = self._done.get()
            if isinstance(value, _Done):
                if failure is None:
                    yield value.result
            else:
                running -= 1
                failure = failure or value
        if failure is not None:
            raise failure

    def _take(self) -> Iterator[Item]:
        while True:
            with self._taking:
                if self.stop.is_set():
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    return
            yield item


class _Done(Generic[Result]):
    """A result in the queue, told from the end of a thread."""

    def __init__(self, result: Result) -> None:
        self.result = result


def make_executor(threads: int | None, *, remote: bool = False, outputs: int = 1) -> Executor:
    """Return an executor of the given width, or of one that suits this machine.

    Args:
        threads: The width asked for.
        remote: Whether it will wait for a network.
        outputs: Models that are written at once.
    """
    # Two a processor: one computes while the other waits for the disk.
    suitable = MOST_THREADS if remote else 2 * len(os.sched_getaffinity(0))
    width = threads or min(suitable, MOST_THREADS, _affordable_threads(outputs))
    return Serial() if width == 1 else Threads(width)


def affordable_outputs() -> int:
    """Return how many models one thread may write at once under the limit of open files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max((limit - _COMMON_FILES - _READ_A_THREAD) // (_WRITTEN_A_THREAD + _LOCKS), 1)


def _affordable_threads(outputs: int) -> int:
    """Return the threads whose files fit under the limit of open files, at least 1."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_THREADS
    thread = _READ_A_THREAD + _WRITTEN_A_THREAD * outputs
    return max((limit - _COMMON_FILES - _LOCKS * (outputs - 1)) // thread, 1)
