"""The scales of a few rows of a matrix, one for each element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def scale_slice(
    scales: torch.Tensor, block: Sequence[int], shape: Sequence[int], start: int, count: int
) -> torch.Tensor:
    """Return the scales of elements ``start`` to ``start + count``, flattened row by row.

    Args:
        scales: One number a block, of shape ``(matrices, block rows, block columns)``.
        block: Rows and columns of a block.
        shape: Rows and columns of each matrix.
        start: First element of the flattened matrices.
        count: Number of elements.
    """
    rows, columns = shape
    first, last = start // columns, -(-(start + count) // columns)
    lines = torch.arange(first, last)
    chosen = scales[lines // rows, lines % rows // block[0]]
    spread = chosen.repeat_interleave(min(block[1], columns), dim=1)[:, :columns].reshape(-1)
    offset = start - first * columns
    return spread[offset : offset + count]
