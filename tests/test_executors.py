"""What every executor owes to the engine, and what only the threads do."""

import itertools
import resource
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import pytest

from uipe_merge.executors import Executor, Serial, Threads, make_executor


class Recorder:
    """Makes workers that note what happens to them. A worker squares its items."""

    def __init__(self, fail_at: tuple[int, ...] = (), fail_making: bool = False) -> None:
        self.done: list[int] = []
        self.made: list[Squarer] = []
        self.threads: set[int] = set()
        self.fail_at = fail_at
        self.fail_making = fail_making

    def make(self) -> "Squarer":
        if self.fail_making:
            raise MemoryError("no worker")
        worker = Squarer(self)
        self.made.append(worker)
        return worker


class Squarer:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.closed = 0
        self.home = threading.get_ident()

    def __call__(self, item: int) -> int:
        assert not self.closed
        assert threading.get_ident() == self.home, "a worker is used in the thread that made it"
        self.recorder.threads.add(self.home)
        if item in self.recorder.fail_at:
            raise ValueError(f"item {item}")
        self.recorder.done.append(item)
        return item * item

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


Make = Callable[..., Recorder]


class ExecutorContract(ABC):
    """Subclassed by each implementation."""

    @pytest.fixture
    @abstractmethod
    def executor(self) -> Executor: ...

    @pytest.fixture
    def recording(self) -> Make:
        """Makes recorders; workers in other processes need one that writes down what happens."""
        return Recorder

    def test_every_item_is_done_once(self, executor: Executor, recording: Make) -> None:
        recorder = recording()
        results = list(executor.run(recorder.make, range(100)))
        assert sorted(results) == [number**2 for number in range(100)]
        assert sorted(recorder.done) == list(range(100))

    @pytest.mark.parametrize("count", [0, 1])
    def test_few_items_are_fine(self, executor: Executor, recording: Make, count: int) -> None:
        recorder = recording()
        assert list(executor.run(recorder.make, range(count))) == [0] * count
        assert {worker.closed for worker in recorder.made} == {1}

    def test_items_are_taken_in_order(self, executor: Executor, recording: Make) -> None:
        taken: list[int] = []

        def items() -> Iterator[int]:
            for number in range(50):
                taken.append(number)
                yield number

        results = list(executor.run(recording().make, items()))
        assert taken == list(range(50))
        assert len(results) == 50

    def test_items_are_taken_by_one_thread_at_a_time(
        self, executor: Executor, recording: Make
    ) -> None:
        inside = 0

        def items() -> Iterator[int]:
            nonlocal inside
            for number in range(20):
                inside += 1
                assert inside == 1
                time.sleep(0.001)
                inside -= 1
                yield number

        assert len(list(executor.run(recording().make, items()))) == 20

    def test_there_are_no_more_workers_than_the_width_and_all_are_closed_once(
        self, executor: Executor, recording: Make
    ) -> None:
        recorder = recording()
        list(executor.run(recorder.make, range(30)))
        assert 1 <= len(recorder.made) <= executor.width
        assert [worker.closed for worker in recorder.made] == [1] * len(recorder.made)

    def test_the_first_exception_is_raised_and_ends_the_run(
        self, executor: Executor, recording: Make
    ) -> None:
        recorder = recording(fail_at=(10,))
        with pytest.raises(ValueError, match="item 10"):
            list(executor.run(recorder.make, itertools.count()))  # there is no other end
        assert set(range(10)) <= set(recorder.done)
        assert all(worker.closed == 1 for worker in recorder.made)

    def test_results_before_the_exception_may_come_and_none_after_it(
        self, executor: Executor, recording: Make
    ) -> None:
        recorder = recording(fail_at=(10,))
        results = executor.run(recorder.make, range(100))
        seen: list[int] = []
        with pytest.raises(ValueError, match="item 10"):
            seen.extend(results)  # list.extend keeps what came before the exception
        assert set(seen) <= {number**2 for number in recorder.done}
        assert list(results) == []

    def test_an_exception_in_the_items_is_raised(self, executor: Executor, recording: Make) -> None:
        def items() -> Iterator[int]:
            yield 1
            raise LookupError("no more shards")

        recorder = recording()
        with pytest.raises(LookupError, match="no more shards"):
            list(executor.run(recorder.make, items()))
        assert all(worker.closed == 1 for worker in recorder.made)

    def test_a_worker_that_cannot_be_made_is_an_error(
        self, executor: Executor, recording: Make
    ) -> None:
        with pytest.raises(MemoryError, match="no worker"):
            list(executor.run(recording(fail_making=True).make, range(10)))

    def test_an_exception_that_is_no_error_comes_through(
        self, executor: Executor, recording: Make
    ) -> None:
        def fail() -> Squarer:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(executor.run(fail, range(10)))

    def test_closing_the_iterator_stops_the_run_and_closes_all_workers(
        self, executor: Executor, recording: Make
    ) -> None:
        recorder = recording()
        results = executor.run(recorder.make, itertools.count())
        next(results)
        results.close()
        assert recorder.made
        assert all(worker.closed == 1 for worker in recorder.made)

    def test_nothing_happens_before_the_first_result_is_asked_for(
        self, executor: Executor, recording: Make
    ) -> None:
        recorder = recording()
        executor.run(recorder.make, range(10)).close()
        assert not recorder.made
        assert not recorder.done

    def test_it_can_run_again(self, executor: Executor, recording: Make) -> None:
        for _ in range(3):
            assert sorted(executor.run(recording().make, range(3))) == [0, 1, 4]


class TestSerial(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return Serial()

    def test_results_come_in_order_from_this_thread(self, executor: Executor) -> None:
        recorder = Recorder()
        assert list(executor.run(recorder.make, range(9))) == [n * n for n in range(9)]
        assert recorder.threads == {threading.get_ident()}


class TestOneThread(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return Threads(1)


class TestThreads(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return Threads(4)

    def test_as_many_items_are_in_hand_as_there_are_threads(self, executor: Executor) -> None:
        # Each item waits for all four: with fewer threads the barrier would break.
        barrier = threading.Barrier(4)

        class Meeting(Squarer):
            def __call__(self, item: int) -> int:
                barrier.wait(60)
                return super().__call__(item)

        recorder = Recorder()
        assert sorted(executor.run(lambda: Meeting(recorder), range(4))) == [0, 1, 4, 9]
        assert len(recorder.threads) == 4

    def test_no_item_is_started_after_the_first_failure(self, executor: Executor) -> None:
        # The other three are in hand when the first fails; what follows is never taken.
        barrier = threading.Barrier(4)
        taken: list[int] = []

        class Failing(Squarer):
            def __call__(self, item: int) -> int:
                barrier.wait(60)
                if item == 0:
                    raise ValueError("item 0")
                while not stopped():
                    time.sleep(0.001)
                return item

        def stopped() -> bool:
            return sum("uipe-merge" in thread.name for thread in threading.enumerate()) < 4

        def items() -> Iterator[int]:
            for number in range(100):
                taken.append(number)
                yield number

        with pytest.raises(ValueError, match="item 0"):
            list(executor.run(lambda: Failing(Recorder()), items()))
        assert taken == [0, 1, 2, 3]


class TestMakeExecutor:
    def test_one_thread_needs_no_thread(self) -> None:
        assert isinstance(make_executor(1), Serial)

    def test_the_width_is_what_was_asked_for(self) -> None:
        assert make_executor(3).width == 3

    def test_by_default_it_is_at_most_eight(self) -> None:
        assert 1 <= make_executor(None).width <= 8

    @pytest.mark.parametrize(("limit", "most"), [(9, 1), (16, 2), (20, 3)])
    def test_by_default_its_files_fit_under_the_limit_of_open_files(
        self, limit: int, most: int
    ) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            width = make_executor(None).width
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert 1 <= width <= most
