"""θ₀ + Σ (1 + αᵢ)·vᵢ of whole tensors, for a program that has them in memory.

Source of the rule: UIPE, arXiv 2503.04693, and for several updates task arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def extrapolate_whole(
    original: torch.Tensor, models: Sequence[torch.Tensor], alphas: Sequence[float]
) -> torch.Tensor:
    """Return θ₀ + Σ (1 + αᵢ)·(θᵢ − θ₀), formed in float32, and rounded once.

    Of one model it is θᵤ + α·v with the operations of ``blocks.Cell`` in their order, and has its
    bits; α = 0 and −1 give the inputs themselves.

    Args:
        original: θ₀, of any shape and of a floating-point type.
        models: At least one θᵢ, of the same shape and type.
        alphas: αᵢ of each.

    Returns:
        A tensor of the same shape and type; where that is float64, formed in float64.
    """
    (first, *others), (alpha, *further) = models, alphas
    if not others and alpha in (0, -1):
        return original if alpha else first
    work = torch.float64 if original.dtype == torch.float64 else torch.float32
    base, result = original.to(work), first.to(work)
    # The step with its sign turned, so that θᵤ − (+0) keeps a −0: see blocks.
    step = (base - result).mul_(abs(alpha))
    if alpha < 0:
        step.neg_().add_(0.0)
    result = result - step
    for model, beyond in zip(others, further, strict=True):
        result.add_((model.to(work) - base).mul_(1 + beyond))
    return result.to(original.dtype)
