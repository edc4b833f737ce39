"""The executor seam on a Ray cluster: a worker is an actor, wherever Ray puts it.

An item whose worker died with its process or its node is given to another one. Workers are
never restarted by Ray itself: which item is in whose hands is known here alone.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

from uipe_merge._version import __version__
from uipe_merge.errors import RemoteError, UipeMergeError, UsageError
from uipe_merge.output.bucket import BucketStaging
from uipe_merge.output.filesystem import LocalFileSystem

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from uipe_merge.executors import Worker
    from uipe_merge.job import Job

Item = TypeVar("Item")
Result = TypeVar("Result")
Handle: TypeAlias = Any  # of an actor: Ray makes its methods as they are asked for
Reference: TypeAlias = Any  # to what an actor will have answered

MOST_TRIES = 4
"""Workers that may die with one item before it is given up."""

_STARTING = 600.0  # seconds after which a cluster without a single worker is given up
_CONNECTING = 10.0  # seconds
_TICK = 1.0  # seconds at most between two looks at signals
_CLOSING = 10.0  # seconds that workers get to close what they hold
_GRACE = 2.0  # seconds that workers in hand get to end by themselves


@contextmanager
def cluster(job: Job, address: str | None, width: int | None) -> Iterator[RayExecutor]:
    """Connect to a cluster while the body runs.

    Args:
        job: What will be run there.
        address: ``HOST:PORT`` of the cluster, or ``auto`` for one that this machine is a node of;
            ``None`` for the one that RAY_ADDRESS names.
        width: Workers at most; by default one for each processor.

    Raises:
        UsageError: Ray is not installed, no cluster is named, or the job cannot be run on one.
        RemoteError: The cluster cannot be reached.
    """
    if job.plan.recipe.steering.low_rank and isinstance(
        job.staging(LocalFileSystem()), BucketStaging
    ):
        raise UsageError(
            "factors of --rank and --energy are kept on this machine when the output is a URL, "
            "where other nodes do not see them",
            file=job.named,
            remedy="name a directory that all nodes share, or leave out --executor ray",
        )
    ray = _import_ray()
    # Ray would start one on this machine, open to the network, where threads do as well.
    named = address or os.environ.get("RAY_ADDRESS")
    if not named:
        raise UsageError(
            "--executor ray without a cluster",
            remedy="name it by --ray-address HOST:PORT or RAY_ADDRESS; `ray start` starts one",
        )
    _require_listener(named)
    _connect(ray, named)
    try:
        yield RayExecutor(width or int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


def _import_ray() -> Any:  # noqa: ANN401 - a module
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--executor ray needs Ray, which is not installed",
            remedy="`pip install 'uipe-merge[ray]'`",
        ) from None
    return ray


def _require_listener(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UsageError(
            f"the address '{address}' is not of the kind HOST:PORT",
            remedy="run on a node of the cluster, and name it by the address that `ray start` said",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> RemoteError:
    return RemoteError(
        f"cannot be reached: {' '.join(str(error).split())}",
        file=f"the Ray cluster at {address}",
        remedy="check the address, and that Ray and Python are of the same version there",
    )


def _connect(ray: Any, address: str) -> None:  # noqa: ANN401 - a module
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    except Exception as error:  # noqa: BLE001 - it raises bare ones
        raise _unreachable(address, error) from None
    finally:
        for number, handler in handlers.items():
            with suppress(ValueError):  # not in the main thread, where Ray changes nothing either
                signal.signal(number, handler)


class RayExecutor:
    """Runs workers on the cluster that this process is connected to."""

    def __init__(self, width: int) -> None:
        """Use ``width`` workers at most, each with a processor."""
        self.width = max(width, 1)

    def run(
        self, make_worker: Callable[[], Worker[Item, Result]], items: Iterable[Item]
    ) -> Generator[Result]:
        """Yield the results as they come; closing the iterator stops the workers.

        ``make_worker``, items, results and what is raised are pickled.

        Raises:
            RemoteError: Workers cannot be started, or die again and again.
        """
        crew = _Crew(make_worker, items, self.width)
        try:
            yield from crew.results()
        finally:
            crew.dismiss()


class _Post:
    """One actor.

    Attributes:
        handle: The actor.
        pending: What it was asked last and has not answered yet.
        task: The item in its hands; nothing while it makes its worker.
    """

    def __init__(self, handle: Handle, pending: Reference) -> None:
        self.handle = handle
        self.pending: Reference | None = pending
        self.task: _Task | None = None


class _Task:
    """An item, and how many workers had it."""

    def __init__(self, item: object) -> None:
        self.item = item
        self.tries = 0


class _Crew(Generic[Item, Result]):
    """The actors of one run and what each of them does."""

    def __init__(
        self,
        make_worker: Callable[[], Worker[Item, Result]],
        items: Iterable[Item],
        width: int,
    ) -> None:
        import ray

        self._ray: Any = ray
        self._items = iter(items)
        self._again: deque[_Task] = deque()
        self._posts: list[_Post] = []
        self._width = width
        self._started = False
        self._stillborn = 0  # workers that died before they were made, one after the other
        self._made_by = ray.put(make_worker)
        remote: Any = ray.remote(_Actor)
        self._actor = remote.options(
            num_cpus=1,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )

    def results(self) -> Iterator[Result]:
        """Yield what comes until there is nothing to do."""
        end = time.monotonic() + _STARTING
        # Not more workers than items. One is made in any case: that it can be is part of a run.
        while len(self._posts) < self._width and (task := self._next_fresh()) is not None:
            self._again.append(task)
            self._hire()
        if not self._posts:
            self._hire()
        while self._again or not self._started or any(post.task for post in self._posts):
            pending = {post.pending: post for post in self._posts if post.pending is not None}
            ready, _ = self._ray.wait(list(pending), timeout=_TICK)
            for reference in ready:
                yield from self._answered(pending[reference])
            if ready or any(post.task for post in self._posts):
                end = time.monotonic() + _STARTING
            elif time.monotonic() > end:
                raise RemoteError(
                    f"no worker could be started in {_STARTING:.0f} s",
                    file="the Ray cluster",
                    remedy="see `ray status`: every worker takes one processor",
                )

    def dismiss(self) -> None:
        """Close the workers: those that are in the middle of something after a moment."""
        with suppress(Exception):  # the cluster may be gone; what ended the run is what counts
            closing = {post.handle.close.remote(): post for post in self._posts}
            idle = [reference for reference, post in closing.items() if post.pending is None]
            for references, seconds in ((idle, _CLOSING), (list(closing), _GRACE)):
                if references:
                    self._ray.wait(references, num_returns=len(references), timeout=seconds)
            for post in self._posts:
                self._ray.kill(post.handle)
        self._posts = []

    def _answered(self, post: _Post) -> Iterator[Result]:
        task, reference = post.task, post.pending
        post.pending = post.task = None
        try:
            outcome: _Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # before or after our own code ran
            raise _not_ours(error) from None
        except self._ray.exceptions.RayError as error:
            self._replace(post, task, error)
            return
        if outcome.error is not None:
            raise outcome.error
        if outcome.version != __version__:
            raise UsageError(
                f"a node of the cluster has uipe-merge {outcome.version}, this one {__version__}",
                remedy="install the same version on all nodes",
            )
        self._started, self._stillborn = True, 0
        if task is not None:
            yield outcome.result
        self._occupy(post)

    def _replace(self, post: _Post, task: _Task | None, error: Exception) -> None:
        """Hire another for a worker that died, and give its item to whoever is free first."""
        self._posts.remove(post)
        with suppress(Exception):  # it may only have been out of reach
            self._ray.kill(post.handle)
        self._stillborn += task is None
        if self._stillborn > self._width + MOST_TRIES or (task and task.tries >= MOST_TRIES):
            raise RemoteError(
                f"workers die again and again ({type(error).__name__})",
                file="the Ray cluster",
                remedy="see its logs: a node may lack memory, or this uipe-merge",
            ) from None
        if task is not None:
            self._again.append(task)
        self._hire()
        for other in self._posts:  # one that had nothing to do
            if other.pending is None:
                self._occupy(other)

    def _occupy(self, post: _Post) -> None:
        task = self._next()
        if task is not None:
            task.tries += 1
            post.task = task
            post.pending = post.handle.work.remote(task.item)

    def _hire(self) -> None:
        handle = self._actor.remote()
        self._posts.append(_Post(handle, handle.make.remote(self._made_by)))

    def _next(self) -> _Task | None:
        return self._again.popleft() if self._again else self._next_fresh()

    def _next_fresh(self) -> _Task | None:
        for item in self._items:
            return _Task(item)
        return None


class _Outcome(NamedTuple):
    """What came of a call: a result or an error, which Ray would wrap otherwise."""

    version: str
    result: Any = None
    error: BaseException | None = None


class _Actor:
    """What runs on a node: one worker."""

    def __init__(self) -> None:
        self._worker: Worker[Any, Any] | None = None

    def make(self, make_worker: Callable[[], Worker[Any, Any]]) -> _Outcome:
        """Make the worker."""

        def made() -> None:
            self._worker = make_worker()

        return _outcome_of(made)

    def work(self, item: object) -> _Outcome:
        """Do one item."""
        worker = self._worker
        assert worker is not None  # noqa: S101 - nothing is asked for before it was made
        return _outcome_of(lambda: worker(item))

    def close(self) -> None:
        """Close the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def _outcome_of(call: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(__version__, call())
    except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
        error.__traceback__ = None
        return _Outcome(__version__, error=_picklable(error))


def _picklable(error: BaseException) -> BaseException:
    error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made on the line itself
    except Exception:  # noqa: BLE001 - whatever its own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _not_ours(error: Any) -> Exception:  # noqa: ANN401 - Ray's, imported only where it is there
    """Return what to raise for an error of a node outside of our own code."""
    cause = error.cause
    if isinstance(cause, UipeMergeError):
        return cause
    if isinstance(cause, ImportError):
        return UsageError(
            f"a node of the cluster cannot import {cause.name}",
            remedy="install the same uipe-merge on all nodes",
        )
    return RuntimeError(f"{type(cause).__name__} on a node: {cause}")
