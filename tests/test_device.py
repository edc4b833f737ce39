"""device.py: what goes to a GPU, piece by piece; and a slow one is told of."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_here, write_pair

from uipe_merge import api, device, matrices
from uipe_merge.arithmetic.svd import LowRank, by_rank
from uipe_merge.device import PIECE, Filling, Slot, slower
from uipe_merge.steering import Steering

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


class SlowSlot:
    """A slot whose values arrive when somebody waits for them, and not before."""

    def __init__(self, size: int) -> None:
        self.values = torch.full((size,), torch.nan)
        self.waited = self.begun = 0
        self._sent: tuple[torch.Tensor, int] | None = None

    def begin(self, device: torch.device) -> None:
        self.begun += 1

    def send(self, target: torch.Tensor) -> None:
        assert self.begun
        assert self._sent is None, "what was sent before may not have arrived"
        self._sent = (target, len(target))

    def wait(self) -> None:
        self.waited += 1
        if self._sent is not None:
            target, count = self._sent
            target.copy_(self.values[:count])
            self._sent = None


class TestFilling:
    @pytest.mark.parametrize("number", [0, 1, 2, 3])
    @pytest.mark.parametrize(
        "sizes",
        [[1], [8], [7, 1], [8, 8, 8], [3, 3, 3, 3, 3], [40], [5, 19, 1, 16], []],
        ids=str,
    )
    def test_the_values_in_their_order(self, sizes: list[int], number: int) -> None:
        values = torch.arange(sum(sizes), dtype=torch.float32)
        filling = Filling(len(values), "cpu", [SlowSlot(8) for _ in range(number)])
        for piece in torch.split(values, sizes) if sizes else ():
            filling.add(piece)
        assert filling.whole().tolist() == values.tolist()

    def test_slots_are_used_again_for_the_next(self) -> None:
        slots = [SlowSlot(4), SlowSlot(4)]
        for start in (0, 100, 200):
            values = torch.arange(start, start + 11, dtype=torch.float32)
            filling = Filling(11, "cpu", slots)
            filling.add(values)
            assert filling.whole().tolist() == values.tolist()

    def test_one_is_filled_while_another_is_on_its_way(self) -> None:
        one, two = SlowSlot(4), SlowSlot(4)
        filling = Filling(8, "cpu", [one, two])
        filling.add(torch.zeros(4))
        before = one.waited
        filling.add(torch.zeros(4))
        assert one.waited == before
        filling.whole()

    @pytest.mark.parametrize("number", [0, 2])
    def test_more_than_there_is_room_for(self, number: int) -> None:
        filling = Filling(5, "cpu", [SlowSlot(4) for _ in range(number)])
        filling.add(torch.zeros(3))
        with pytest.raises(ValueError, match="more values"):
            filling.add(torch.zeros(3))

    def test_wider_values_are_rounded(self) -> None:
        filling = Filling(2, "cpu", ())
        filling.add(torch.tensor([1 / 3, 2.0], dtype=torch.float64))
        assert filling.whole().tolist() == torch.tensor([1 / 3, 2.0]).tolist()


class Clock:
    """Says when each look at it is."""

    def __init__(self, *durations: float) -> None:
        steps = itertools.chain.from_iterable((1.0, each) for each in durations)
        self._times = itertools.accumulate(steps)

    def __call__(self) -> float:
        return next(self._times)


def found(matrix: torch.Tensor) -> LowRank:
    return by_rank(matrix, 1, 0)


class TestSlower:
    @pytest.mark.parametrize(
        ("there", "here", "told"), [(3.0, 8.0, False), (3.0, 4.0, True), (1.0, 2.0, False)]
    )
    def test_a_device_that_is_slower_than_all_threads_is_told_of(
        self, there: float, here: float, told: bool
    ) -> None:
        said = slower(found, torch.ones(3, 5), 2, Clock(there, here))
        wanted = (
            f"{there:.3g} s for the singular vectors of 3 × 5, the processor with 2 threads "
            f"{here / 2:.3g} s"
        )
        assert said == (wanted if told else None)

    def test_the_first_time_is_not_measured(self) -> None:
        done: list[torch.Tensor] = []

        def count(matrix: torch.Tensor) -> LowRank:
            done.append(matrix)
            return found(matrix)

        assert slower(count, torch.ones(2, 2), 1, Clock(1.0, 2.0)) is None
        assert len(done) == 3


class TestMerging:
    """The whole way, with a device that is the processor in disguise."""

    @pytest.fixture
    def disguised(self, monkeypatch: pytest.MonkeyPatch) -> list[SlowSlot]:
        made: list[SlowSlot] = []

        def slots(name: str) -> tuple[Slot, ...]:
            if name == "cpu":
                return ()
            made.extend(SlowSlot(100) for _ in range(2))
            return tuple(made[-2:])

        class Disguised(Filling):
            def __init__(self, elements: int, name: str, slots: tuple[Slot, ...]) -> None:
                super().__init__(elements, "cpu", slots)

        monkeypatch.setattr(device, "require_device", lambda name: None)
        monkeypatch.setattr(matrices, "slots", slots)
        monkeypatch.setattr(matrices, "Filling", Disguised)
        monkeypatch.setattr(matrices, "slower", lambda *_: None)
        return made

    @pytest.mark.parametrize("steering", [Steering(rank=2), Steering(energy=0.5)], ids=str)
    def test_the_same_bytes_through_slots(
        self, tmp_path: Path, disguised: list[SlowSlot], steering: Steering
    ) -> None:
        pair = write_pair(tmp_path)
        api.merge(*pair, tmp_path / "one", alpha=1, steering=steering, threads=1)
        assert not disguised
        api.merge(*pair, tmp_path / "two", alpha=1, steering=steering, threads=1, device="cuda:0")
        assert all(slot.waited > 2 for slot in disguised)
        one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()

    @pytest.mark.parametrize("command", ["merge", "grid"])
    def test_a_slow_device_is_in_the_report(
        self,
        tmp_path: Path,
        disguised: list[SlowSlot],
        monkeypatch: pytest.MonkeyPatch,
        command: str,
    ) -> None:
        seen: list[tuple[int, ...]] = []

        def slow(find: Callable[[torch.Tensor], LowRank], matrix: torch.Tensor, _: int) -> str:
            seen.append(tuple(matrix.shape))
            assert find(matrix).right.shape == (2, matrix.shape[1])
            return "9 s"

        monkeypatch.setattr(matrices, "slower", slow)
        alphas = ("--alpha", 1) if command == "merge" else ("--alphas", "1,2")
        words = (*write_pair(tmp_path), *alphas, "--rank", 2, "--device", "cuda:0")
        result = run_here(command, *words, "-o", tmp_path / "out")
        assert result.code == 0, result
        assert result.err.count("--device cuda:0 took 9 s: it is faster without") == 1
        assert seen == [(16, 40)]  # the largest that is in a layer

    @pytest.mark.parametrize("error", [RuntimeError, MemoryError])
    def test_what_the_processor_cannot_do_ends_no_merge(
        self,
        tmp_path: Path,
        disguised: list[SlowSlot],
        monkeypatch: pytest.MonkeyPatch,
        error: type[Exception],
    ) -> None:
        def fail(*_: object) -> str:
            raise error

        monkeypatch.setattr(matrices, "slower", fail)
        words = ("--alpha", 1, "--rank", 2, "--device", "cuda:0", "-o", tmp_path / "out")
        result = run_here(*write_pair(tmp_path), *words)
        assert result.code == 0, result

    def test_a_device_without_work_is_told_of(
        self, tmp_path: Path, disguised: list[SlowSlot]
    ) -> None:
        pair = write_pair(tmp_path)
        words = ("--alpha", 1, "--device", "cuda:0", "-o", tmp_path / "out")
        result = run_here(*pair, *words)
        assert result.code == 0, result
        assert "--device cuda:0 has nothing to do" in result.err
        assert not disguised


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_hazard_a_device_that_is_not_there(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    result = run_here(*pair, "--alpha", 1, "-o", tmp_path / "out", "--device", "cuda")
    assert result.code == 2
    assert "device 'cuda' cannot be used" in result.err
    assert result.err.count("\n") == 1


@needs_a_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("count", [1, PIECE - 1, PIECE, 3 * PIECE + 5])
    def test_what_arrives_is_what_was_sent(self, count: int) -> None:
        values = torch.randn(count)
        filling = Filling(count, "cuda", device.slots("cuda"))
        for piece in torch.split(values, 65536):
            filling.add(piece)
        whole = filling.whole()
        assert whole.device.type == "cuda"
        assert torch.equal(whole.cpu(), values)

    @pytest.mark.parametrize("steering", [Steering(rank=2), Steering(energy=0.5)], ids=str)
    def test_a_merge_is_close_to_that_of_the_processor(
        self, tmp_path: Path, steering: Steering
    ) -> None:
        pair = write_pair(tmp_path)
        reports = [
            api.merge(*pair, tmp_path / name, alpha=1, steering=steering, device=name)
            for name in ("cpu", "cuda")
        ]
        one, two = (report.summary.as_dict() for report in reports)
        assert one["effective_alpha"] == pytest.approx(two["effective_alpha"], rel=1e-4)
