"""Static scales of one input: one scale s_k a channel, of which the op is left a single number.

    q = clip(round((x - z) / s))      y = W (s q) + W z + b

When f = s / t is folded into the model (folds.py), s_k / f_k = t for all channels, and the op only divides by t. With a
split alpha < 1, f = s^alpha takes a part of the differences and t is the largest of what is left (SmoothQuant). t is a
power of two, so that multiplying by it is exact, near the geometric mean of s, so that the folded
model computes in the magnitudes it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels import activations as act
from compressor.methods import scale_search

SMALLEST = 0.01  # of the median scale: a channel that was silent in calibration still gets a range, which costs nothing


@dataclass(frozen=True)
class Static:
    """fold [K] what x is divided by before it arrives; scale [1] = t; shift [K] = z in units of x, or None."""

    fold: Tensor
    scale: Tensor
    shift: Tensor | None

    @property
    def offset(self) -> Tensor | None:
        """z in units of what arrives."""
        return None if self.shift is None else self.shift / self.fold


def scales(low: Tensor, high: Tensor, shift: Tensor | None, bits: int) -> Tensor:
    """s [K]: the channel's largest distance from its shift falls on the largest code, so nothing seen is clipped."""
    amax = torch.maximum(-low, high) if shift is None else torch.maximum(shift - low, high - shift)
    s = amax / (2 ** (bits - 1) - 1)
    positive = s[s > 0]
    floor = SMALLEST * float(positive.median()) if len(positive) else 1.0
    return s.clamp_min(floor)


def split(s: Tensor, shift: Tensor | None, alpha: float) -> Static:
    """s [K] as f · t."""
    rest = (s ** (1 - alpha)).amax()
    whole = s**alpha * rest
    t = torch.exp2(torch.log2(whole).mean().round()).reshape(1)
    return Static(whole / t, t, shift)


def spread(s: Tensor) -> float:
    """99th percentile over median."""
    return float(s.quantile(0.99) / s.median())


def static_error(x: Tensor, weights: Sequence[Tensor], given: Static, bits: int) -> float:
    """Relative squared output error of the static rule, weights rounded too. x [M, K] as it is before any fold."""
    centred = x if given.shift is None else x - given.shift
    rounded = act.int_with(centred / given.fold, given.scale, bits)
    return _mean([_error(x, centred, w, rounded, w * given.fold, bits) for w in weights])


def token_error(x: Tensor, weights: Sequence[Tensor], fold: Tensor, bits: int) -> float:
    """The same of one scale a token, on x / fold."""
    rounded = act.int_per_token(x / fold, bits)
    return _mean([_error(x, x, w, rounded, w * fold, bits) for w in weights])


def _error(x: Tensor, centred: Tensor, weight: Tensor, rounded: Tensor, folded: Tensor, bits: int) -> float:
    """Mean over tokens of |y - y'|² / |y|²: a mean of ratios, or the few massive tokens would be all that counts."""
    grid = scale_search.choose(f"int{bits}", folded, None, None, "absmax")
    difference = rounded @ (grid.codes(folded) * grid.step).T - centred @ weight.T
    y = x @ weight.T
    return float((difference.square().sum(-1) / y.square().sum(-1).clamp_min(1e-30)).mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
