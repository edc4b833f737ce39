"""Finds out why numbers are not finite, and says it: which tensor, how many, where first.

The block loop only notices that a sum is not finite. What follows here runs once, on the way
to an error message, and may read the tensor again and allocate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uipe_merge.bits import BitScanner, NonFinite, combine
from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import ZERO
from uipe_merge.cutting import ranges
from uipe_merge.errors import NumericError
from uipe_merge.plan import BLOCK, Plan, Step
from uipe_merge.reader import BlockReader, Pair, shown, widest_input

if TYPE_CHECKING:
    from uipe_merge.checkpoint.dtypes import DType
    from uipe_merge.checkpoint.header import TensorSpec
    from uipe_merge.kernels import Kernels


_WIDEST = max(dtype.bits for dtype in DTYPES.values()) // 8


class Guard:
    """The numeric guard of one thread."""

    def __init__(self, plan: Plan, pair: Pair) -> None:
        """Remember where to look; nothing is read yet."""
        self._plan = plan
        self._pair = pair
        self._scanner = BitScanner()
        self._cleared = self._finite_inputs = ""

    def check_bytes(self, data: memoryview, dtype: DType, spec: TensorSpec, side: int) -> None:
        """Look at the bits of a block of ``spec`` that no arithmetic will see.

        Raises:
            NumericError: A value is NaN or infinite.
        """
        if self._scanner.scan(data, dtype) is not None:
            self._refuse_inputs([(spec, side)])

    def check_cast(self, data: memoryview, step: Step, kernels: Kernels) -> None:
        """Look at the bits of a converted block.

        Raises:
            NumericError: A value does not fit into the output type.
        """
        if self._scanner.scan(data, step.dtype) is not None:
            self._refuse_overflow(step._replace(original=step.source), kernels)

    def explain(self, step: Step, kernels: Kernels) -> None:
        """Find out why moments are not finite: an input, the result, or only their squares.

        Returns in the last case, and then does not read the tensor again for its other cells.

        Raises:
            NumericError: A value of an input, or of the result, is not finite.
        """
        if self._cleared == step.name:
            return
        self.check_inputs(step)
        self._refuse_overflow(step, kernels)
        self._cleared = step.name

    def check_inputs(self, step: Step) -> None:
        """Look at the bits of both inputs of a tensor; once, however often it is called.

        Raises:
            NumericError: A value is NaN or infinite.
        """
        assert step.original is not None  # noqa: S101 - the plan gives it to what has moments
        if self._finite_inputs != step.name:
            stored = [each for each in step.operands if each.spec.home != ZERO or each.spec.factors]
            tensors = [(spec, side) for side, spec, _ in stored]
            for spec, side in list(tensors):
                parts = [part for factor in spec.factors for part in factor.tensors]
                tensors += [(part, side) for part in parts]
                tensors += [(spec.scales.values, side)] if spec.scales is not None else []
            self._refuse_inputs(tensors)
            self._finite_inputs = step.name

    def _refuse_overflow(self, step: Step, kernels: Kernels) -> None:
        """Go over the whole tensor again; refuse it if the output type cannot hold it."""
        assert step.original is not None  # noqa: S101 - given by the plan, or by check_cast
        side = 0 if step.from_original else 1
        from uipe_merge.deltas import Deltas, Growths  # imports torch

        count, largest = 0, 0.0
        reader = BlockReader(self._pair, widest_input(self._plan), BLOCK)
        deltas = Deltas(self._pair, Growths())
        try:
            for start, elements in ranges([step], BLOCK):
                here = step.at(start, elements)
                reader.begin()
                if step.operation == "cast":
                    operands = [reader.shared(here.source, side, elements)] * 2
                else:
                    operands = reader.operands(here, elements)
                cells = deltas.at(step, start)
                over, most = kernels.overflow(here, operands, cells)
                count, largest = count + over, max(largest, most)
        finally:
            reader.close()
            deltas.close()
        if count:
            raise _overflow(shown(self._pair, step.source, side), step, count, largest)

    def _refuse_inputs(self, tensors: list[tuple[TensorSpec, int]]) -> None:
        # Factors and scales may be wider than any tensor.
        reader = BlockReader(self._pair, _WIDEST, BLOCK)
        try:
            for spec, side in tensors:
                before = 0
                for piece in spec.pieces or (spec,):
                    found = combine(
                        (start, self._scanner.scan(data, dtype))
                        for start, dtype, data in reader.blocks(piece, side)
                    )
                    if found is not None:
                        # Rows of the tensor itself count from its beginning, an expert's from its own.
                        own = before if piece.name == spec.name else 0
                        found = found._replace(first=found.first + own)
                        raise _not_finite(shown(self._pair, piece, side), piece, found)
                    before += piece.elements
        finally:
            reader.close()


def _not_finite(file: str, spec: TensorSpec, found: NonFinite) -> NumericError:
    return NumericError(
        f"holds {found.total} values that are NaN or infinite, the first at index {found.first}",
        file=file,
        tensor=spec.name,
        remedy="this checkpoint is broken: a training run that diverged, or a bad save",
    )


def _overflow(file: str, step: Step, count: int, largest: float) -> NumericError:
    amplified = step.operation == "extrapolate" and step.alpha not in (0, -1)
    remedies = ["choose a smaller alpha"] if amplified else []
    if step.dtype == DTYPES["F16"]:
        remedies.append("write with --dtype bfloat16 or float32")
    elif step.dtype != step.source.kept_dtype:
        remedies.append("keep the stored type with --dtype auto")
    return NumericError(
        f"{count} values do not fit into {step.dtype.name} at alpha {step.alpha:g}, the largest "
        f"at {largest:g}",
        file=file,
        tensor=step.name,
        remedy=", or ".join(remedies) or None,
    )
