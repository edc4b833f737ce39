"""Values that one thread computes for all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from uipe_merge.once import Once


def test_one_thread_computes_and_the_others_wait() -> None:
    once: Once[int] = Once()
    calls: list[str] = []
    begin = threading.Barrier(4)

    def ask(key: str) -> int:
        begin.wait(timeout=60)

        def compute() -> int:
            calls.append(key)
            return len(key)

        return once.get(key, compute)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, ["a", "a", "bb", "bb"])) == [1, 1, 2, 2]
    assert sorted(calls) == ["a", "bb"]


def test_an_error_reaches_everybody_who_asks() -> None:
    once: Once[int] = Once()

    def fail() -> int:
        raise ValueError("no such value")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such value"):
            once.get("a", fail)


def test_the_oldest_values_are_forgotten() -> None:
    once: Once[int] = Once()
    for number in range(1000):
        assert once.get(number, lambda number=number: number) == number  # type: ignore[misc]
    assert once.get(999, lambda: -1) == 999
    assert once.get(0, lambda: -1) == -1
