"""Which float formats, which input range and which shifts lose least of a site's output: the search of fp4.py.

    minimise  mean_t |Q_a(2^k x_t) Q_w(2^-k W)ᵀ - x_t Wᵀ|² / |x_t Wᵀ|²     over the formats of both, the maxval m of
                                                                       the input, the scales of W's blocks or rows

    k_j = clip(RNE(log2(m / max_t |x_tj|)), 0, MOST)

One operand is searched while the other is quantized in its current best format, for at most ROUNDS rounds, on sampled
tokens and sampled rows of W. The search starts from abs-max scales in the first formats, and what it returns is never
worse than they are on this sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.kernels import activations as act
from compressor.kernels import codec
from compressor.methods import scale_search

ROUNDS = 3
ROWS = 256  # of all linears of a site together
# The paper stops at 2^E - 1, what fits the exponents of its weights. A shift that is folded needs no bits; this limit
# keeps the model within the range of float16.
MOST = 15
# An input's maxval, in eighths of an octave below its largest value: every fourth, then nearer to the best of them.
COARSE, FINER = tuple(range(0, -25, -4)), (2, 1)

Rule = Literal["joint", "weights", "absmax"]


@dataclass(frozen=True)
class Input:
    """How an input is rounded: to `format` with maxval `top` once channel j is multiplied by 2^shift_j, or not at all.

    shift [K] float32 whole numbers, or None.
    """

    format: str | None = None
    top: float = 0.0
    shift: Tensor | None = field(default=None, repr=False)

    @property
    def step(self) -> float:
        """The `input_scale`."""
        return self.top / codec.FLOATS[self.format].top if self.format else 1.0

    def shifted(self, x: Tensor) -> Tensor:
        """2^k x."""
        return x if self.shift is None else x * power_of_two(self.shift).to(x.device)

    def folded(self, weight: Tensor) -> Tensor:
        """2^-k W."""
        return weight if self.shift is None else weight * power_of_two(-self.shift).to(weight.device)

    def rounded(self, x: Tensor) -> Tensor:
        """Q_a(2^k x)."""
        if self.format is None:
            return self.shifted(x)
        return act.float_with(self.shifted(x), torch.tensor([self.step], device=x.device), codec.FLOATS[self.format])


@dataclass(frozen=True)
class Sample:
    """Tokens x [T, K] of one site, rows [R, K] of each of its linears, and what they give, [T, R]."""

    x: Tensor
    weights: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor]) -> Sample:
        some = tuple(_strided(w, max(1, ROWS // len(weights))) for w in weights)
        return cls(x, some, tuple(x @ w.T for w in some))


@dataclass(frozen=True)
class Found:
    """The input, a weight format for each linear of each sample, and the relative squared errors."""

    input: Input
    formats: tuple[tuple[str, ...], ...]
    error: float
    absmax_error: float


def power_of_two(k: Tensor) -> Tensor:
    """2^k, float32, exact; k whole."""
    return codec.e8m0_values(k.int() + 127)


def shift_of(amax: Tensor, top: float) -> Tensor:
    """k [K] for channel maxima `amax` [K] and maxval `top`; a channel that was silent is not shifted."""
    k = torch.log2(top / amax.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, MOST)
    return torch.where(amax > 0, k, 0.0)


def search(
    samples: Sequence[Sample],
    amax: Tensor,
    formats: Sequence[str],
    activation_formats: Sequence[str],
    block: int | None,
    rule: Rule,
    shift: bool,
) -> Found:
    """The best input and weight formats of the sites that `samples` are of, which share their input's scale and shift.

    amax [K]             the largest |x| of each channel over all tokens, equal where channels must share a shift
    formats              of weights, and
    activation_formats   of inputs to choose from; the first are those of abs-max. None for the input: 16 bits
    rule                 "joint" | "weights" (the input by abs-max) | "absmax" (both)
    """
    most = float(amax.amax()) or 1.0
    start = Input(activation_formats[0], most) if activation_formats else Input()
    current = tuple((formats[0],) * len(s.weights) for s in samples)
    base = _error(samples, start, current, block)
    best = Found(start, current, base, base)
    given = replace(start, shift=shift_of(amax, most)) if activation_formats and shift else start
    if rule == "absmax":
        return Found(given, current, _error(samples, given, current, block), base)
    for _ in range(ROUNDS):
        if rule == "joint" and activation_formats:
            given = _best_input(samples, amax, current, activation_formats, block, shift)
        found = [_best_formats(sample, given, formats, block) for sample in samples]
        error = sum(e for _, e in found) / len(found)
        before, current = current, tuple(f for f, _ in found)
        if error < best.error:
            best = Found(given, current, error, base)
        if current == before:  # the input was searched with these already
            break
    return best


def _best_input(
    samples: Sequence[Sample],
    amax: Tensor,
    formats: Sequence[Sequence[str]],
    activation_formats: Sequence[str],
    block: int | None,
    shift: bool,
) -> Input:
    """Format, maxval and, for each maxval, shift; weights by abs-max in the formats given."""
    most = float(amax.amax()) or 1.0

    def at(format: str, eighths: int) -> tuple[float, Input]:
        top = most * 2.0 ** (eighths / 8)
        given = Input(format, top, shift_of(amax, top) if shift else None)
        return _error(samples, given, formats, block), given

    found = []
    for format in activation_formats:
        tried = {e: at(format, e) for e in COARSE}
        for distance in FINER:
            middle = min(tried, key=lambda e: tried[e][0])
            tried |= {e: at(format, e) for e in (middle - distance, middle + distance) if e not in tried}
        found.append(min(tried.values(), key=lambda t: t[0]))
    return min(found, key=lambda t: t[0])[1]


def _best_formats(
    sample: Sample, given: Input, formats: Sequence[str], block: int | None
) -> tuple[tuple[str, ...], float]:
    """The format of each linear and their mean error; scales weighted with the squares of the rounded input."""
    x = given.rounded(sample.x)
    importance = x.square().mean(0)
    chosen, total = [], 0.0
    for weight, output in zip(sample.weights, sample.outputs, strict=True):
        w = given.folded(weight)
        errors = {f: _relative(x @ _round(w, f, block, importance).T, output) for f in formats}
        chosen.append(min(errors, key=errors.__getitem__))
        total += errors[chosen[-1]]
    return tuple(chosen), total / len(chosen)


def _error(samples: Sequence[Sample], given: Input, formats: Sequence[Sequence[str]], block: int | None) -> float:
    """Mean over the linears, with abs-max scales of the weights."""
    total = 0.0
    for sample, names in zip(samples, formats, strict=True):
        x = given.rounded(sample.x)
        each = zip(sample.weights, sample.outputs, names, strict=True)
        total += sum(_relative(x @ _round(given.folded(w), f, block).T, y) for w, y, f in each) / len(names)
    return total / len(samples)


def _relative(output: Tensor, expected: Tensor) -> float:
    """Mean over tokens of |y' - y|² / |y|², so that the few massive tokens are not all that counts. [T, R]"""
    size = expected.square().sum(-1).clamp_min(1e-30)
    return float(((output - expected).square().sum(-1) / size).mean())


def _round(weight: Tensor, format: str, block: int | None, importance: Tensor | None = None) -> Tensor:
    """weight [R, K] as it will be decoded, its scales by abs-max, or weighted with `importance` [K]."""
    padding = -weight.shape[1] % (block or 1)
    padded = nn.functional.pad(weight, (0, padding))
    divisor = codec.nvfp4_weight_divisor(weight.abs().amax(), codec.FLOATS[format].top) if block else None
    h, rule = None, "absmax"
    if importance is not None:
        h, rule = nn.functional.pad(importance, (0, padding)), "weighted"
    grid = scale_search.choose(format, padded, block, h, rule, divisor)
    return (grid.codes(padded) * grid.columns(padded.shape[1]))[:, : weight.shape[1]]


def _strided(weight: Tensor, rows: int) -> Tensor:
    chosen = torch.linspace(0, len(weight) - 1, min(rows, len(weight))).round().long()
    return weight[chosen.to(weight.device)]
