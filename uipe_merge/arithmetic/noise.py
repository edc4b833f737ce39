"""Noise for stochastic rounding and for random directions.

It is a pure function of a tensor's key and an element's index.

Neither threads nor blocks nor an interruption change it, and any element's bits can be had
alone. The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014) on a counter: one 64-bit word for four elements.
"""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST = 31
_LANES = torch.arange(0, 64, 16)
"""Where in a word the 16 bits of its four elements begin."""


def noise(key: int, first: int, count: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), multiples of 2⁻¹⁶, float64, of shape ``(count,)``.

    Args:
        key: 64 bits, the tensor's.
        first: The element of the tensor that the first of them is for.
        count: How many. Allocates some 40 bytes for each.
    """
    lanes = len(_LANES)
    begin, end = first // lanes, -(-(first + count) // lanes)
    word = torch.arange(begin + 1, end + 1) * _signed(_GAMMA) + _signed(key)
    for shift, factor in _MIX:
        word = (word ^ _shifted(word, shift)) * _signed(factor)
    word ^= _shifted(word, _LAST)
    bits: torch.Tensor = ((word[:, None] >> _LANES) & 0xFFFF).reshape(-1)
    skip = first - begin * lanes
    return bits[skip : skip + count].double().div_(2.0**16)


def random_direction(key: int, first: int, count: int) -> torch.Tensor:
    """Return independent numbers of mean 0, float64, of shape ``(count,)``.

    Each is the sum of four uniform ones: close to Gaussian, and a multiple of 2⁻¹⁶ that float32
    holds, so that no machine and no block rounds it otherwise.

    Args:
        key: 64 bits, the tensor's.
        first: The element of the tensor that the first of them is for.
        count: How many.
    """
    lanes = len(_LANES)
    drawn = noise(key, first * lanes, count * lanes).reshape(count, lanes)
    return drawn.sum(dim=1).sub_(lanes / 2 - lanes * 2.0**-17)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned word; products agree modulo 2⁶⁴."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(word: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right, filling with zeros and not with the sign."""
    return torch.bitwise_and(word >> by, 2 ** (64 - by) - 1)
