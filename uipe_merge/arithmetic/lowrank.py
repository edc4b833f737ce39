"""A few rows of a low-rank product, so that an adapter is never merged as a whole.

Source: LoRA, arXiv 2106.09685: W + c·B·A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def product_slice(
    left: torch.Tensor, right: torch.Tensor, scale: float, start: int, count: int
) -> torch.Tensor:
    """Return elements ``start`` to ``start + count`` of c·L·R, flattened row by row.

    Args:
        left: L, of shape ``(rows, rank)``.
        right: R, of shape ``(rank, columns)``, of the same type.
        scale: c.
        start: First element of the flattened product.
        count: Number of elements.
    """
    columns = right.shape[1]
    first, last = start // columns, -(-(start + count) // columns)
    rows = (left[first:last] @ right).mul_(scale).reshape(-1)
    offset = start - first * columns
    return rows[offset : offset + count]
