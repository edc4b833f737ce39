"""A few rows of a low-rank product, so that an adapter is never merged as a whole.

Source: LoRA, arXiv 2106.09685: W + c·B·A.
"""

from __future__ import annotations

import torch


def product_slice(
    left: torch.Tensor, right: torch.Tensor, scale: float, start: int, count: int
) -> torch.Tensor:
    """Return elements ``start`` to ``start + count`` of a stack of c·L·R, flattened row by row.

    Args:
        left: The L, of shape ``(matrices, rows, rank)``.
        right: The R, of shape ``(matrices, rank, columns)``, of the same type.
        scale: c.
        start: First element of the flattened stack.
        count: Number of elements.
    """
    height, columns = left.shape[1], right.shape[2]
    first, last = start // columns, -(-(start + count) // columns)
    products = []
    for matrix in range(first // height, -(-last // height)):
        top = matrix * height
        rows = left[matrix, max(first - top, 0) : last - top]
        products.append(rows @ right[matrix])
    together = products[0] if len(products) == 1 else torch.cat(products)
    offset = start - first * columns
    return together.mul_(scale).reshape(-1)[offset : offset + count]
