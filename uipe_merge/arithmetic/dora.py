"""Norms and magnitudes of DoRA, for a few elements of a matrix at a time.

Source: DoRA, arXiv 2402.09353: m ⊙ (W + c·B·A)/‖W + c·B·A‖, one m and one norm per output.
The outputs are the rows of W, or its columns where W is stored transposed. What stands for
them here has the shape ``(rows, 1)`` or ``(1, columns)``.
"""

from __future__ import annotations

import torch


def add_squares(sums: torch.Tensor, values: torch.Tensor, start: int, columns: int) -> None:
    """Add the squares of some elements of a matrix to the sums of its outputs.

    Args:
        sums: One sum per output, in float64; changed in place.
        values: The elements, flattened row by row, in float64.
        start: Position of the first of them in the flattened matrix.
        columns: Columns of the matrix.
    """
    count = values.numel()
    first, last = start // columns, -(-(start + count) // columns)
    rows = torch.zeros((last - first, columns), dtype=sums.dtype)
    offset = start - first * columns
    rows.view(-1)[offset : offset + count] = values
    rows.square_()
    if sums.shape[1] == 1:
        sums[first:last] += rows.sum(1, keepdim=True)
    else:
        sums += rows.sum(0, keepdim=True)


def spread(outputs: torch.Tensor, rows: int, columns: int, start: int, count: int) -> torch.Tensor:
    """Return what belongs to each of ``count`` elements from ``start`` of a matrix."""
    first, last = start // columns, -(-(start + count) // columns)
    offset = start - first * columns
    return outputs.expand(rows, columns)[first:last].reshape(-1)[offset : offset + count]
