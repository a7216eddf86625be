"""Which float formats, which input scale and which shifts lose least of a site's output: the search of fp4.py.

    minimise  Σ_t |Q_a(2^k x_t) · Q_w(2^-k W)ᵀ - x_t Wᵀ|² / |x_t Wᵀ|²        over the formats of both, the input's maxval m
                                                                          and the scales of W's blocks or rows

    k_j = clip(RNE(log2(m / max|x_j|)), 0, 2^E - 1)      of the activation format with E exponent bits (Liu et al., eq. 12)

One operand is searched while the other is quantized at its current best, for at most ROUNDS rounds. The sum is over
sampled tokens and sampled rows of W. What is found is never worse than abs-max scales in the first formats, on this
sample, because those are where the search starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compressor.kernels import activations as act
from compressor.kernels import codec
from compressor.methods import scale_search
from compressor.methods.scale_search import FLOAT_RATIOS

ROUNDS = 3
# The range of an input in eighths of an octave of its largest value: every fourth, then nearer to the best of them.
COARSE, FINER = tuple(range(0, -25, -4)), (2, 1)
MOST=None
ROWS = 256  # of all linears of a site together


@dataclass(frozen=True)
class Input:
    """How an input is rounded: to `format` with maxval `top` after channel j is multiplied by 2^shift_j, or not at all.

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
        return x if self.shift is None else x * torch.exp2(self.shift).to(x)

    def folded(self, weight: Tensor) -> Tensor:
        """2^-k W."""
        return weight if self.shift is None else weight * torch.exp2(-self.shift).to(weight)

    def rounded(self, x: Tensor) -> Tensor:
        """Q_a(2^k x)."""
        if self.format is None:
            return self.shifted(x)
        step = torch.tensor([self.step], device=x.device)
        return act.float_with(self.shifted(x), step, codec.FLOATS[self.format])


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


def shift_of(amax: Tensor, top: float, format: str) -> Tensor:
    """k [K] for channel maxima `amax` [K] and maxval `top`; a channel that was silent is not shifted."""
    most = MOST if MOST is not None else 2 ** codec.FLOATS[format].exponent - 1
    k = torch.log2(top / amax.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, most)
    return torch.where(amax > 0, k, 0.0)


def round_weight(
    weight: Tensor, format: str, block: int | None, importance: Tensor | None, rule: str
) -> Tensor:
    """[N, K] float32 as it will be decoded."""
    padding = -weight.shape[1] % (block or 1)
    padded = nn.functional.pad(weight, (0, padding))
    h = None if importance is None else nn.functional.pad(importance, (0, padding))
    divisor = codec.nvfp4_weight_divisor(weight.abs().amax(), codec.FLOATS[format].top) if block else None
    grid = scale_search.choose(format, padded, block, h, rule, divisor)
    return (grid.codes(padded) * grid.columns(padded.shape[1]))[:, : weight.shape[1]]


def error(output: Tensor, expected: Tensor) -> float:
    """Mean over tokens of |y' - y|² / |y|², so that the few massive tokens are not all that counts. [T, R]"""
    size = expected.square().sum(-1).clamp_min(1e-30)
    return float(((output - expected).square().sum(-1) / size).mean())


def search(
    samples: Sequence[Sample],
    amax: Tensor,
    formats: Sequence[str],
    activation_formats: Sequence[str],
    block: int | None,
    rule: str,
    shift: bool,
) -> Found:
    """amax [K]: the largest |x| of each channel over all tokens, equal within a group that shares its scale.

    formats, activation_formats  to choose from, the first is what abs-max uses; no activation format: 16 bits
    rule                         "joint" | "weights" (the input by abs-max) | "absmax"
    """
    start = Input()
    if activation_formats:
        start = Input(activation_formats[0], float(amax.amax()) or 1.0)
    first = tuple((formats[0],) * len(s.weights) for s in samples)
    base = _total(samples, start, first, block)
    if activation_formats and shift:
        start = replace(start, shift=shift_of(amax, start.top, activation_formats[0]))
    if rule == "absmax":
        return Found(start, first, _total(samples, start, first, block), base)
    best = Found(start, first, float("inf"), base)
    before = None
    for _ in range(ROUNDS):
        if best.formats == before:
            break
        chosen, before = best.input, best.formats
        if rule == "joint" and activation_formats:
            chosen = _best_input(samples, amax, best.formats, activation_formats, block, shift)
        found = [_best_formats(s, chosen, formats, block) for s in samples]
        now = sum(e for _, e in found) / len(found)
        if now >= best.error:
            break
        best = Found(chosen, tuple(f for f, _ in found), now, base)
    return best


def _best_input(samples, amax, formats, activation_formats, block, shift) -> Input:
    whole = float(amax.amax()) or 1.0
    best, least = Input(), float("inf")
    def at(format: str, eighths: int) -> tuple[float, Input]:
        top = whole * 2.0 ** (eighths / 8)
        given = Input(format, top, shift_of(amax, top, format) if shift else None)
        return _total(samples, given, formats, block), given

    for format in activation_formats:
        tried = {e: at(format, e) for e in COARSE}
        for distance in FINER:
            middle = min(tried, key=lambda e: tried[e][0])
            tried |= {e: at(format, e) for e in (middle - distance, middle + distance)}
        error, given = min(tried.values(), key=lambda t: t[0])
        if error < least:
            best, least = given, error
    return best


def _best_formats(sample: Sample, given: Input, formats: Sequence[str], block: int | None):
    x = given.rounded(sample.x)
    importance = x.square().mean(0)
    chosen, total = [], 0.0
    for w, y in zip(sample.weights, sample.outputs, strict=True):
        folded = given.folded(w)
        errors = {f: error(x @ round_weight(folded, f, block, importance, "weighted").T, y) for f in formats}
        chosen.append(min(errors, key=errors.__getitem__))
        total += errors[chosen[-1]]
    return tuple(chosen), total / len(chosen)


def _total(samples, given: Input, formats, block) -> float:
    """Weights by abs-max."""
    total = 0.0
    for sample, names in zip(samples, formats, strict=True):
        x = given.rounded(sample.x)
        errors = [
            error(x @ round_weight(given.folded(w), f, block, None, "absmax").T, y)
            for w, f, y in zip(sample.weights, names, sample.outputs, strict=True)
        ]
        total += sum(errors) / len(errors)
    return total / len(samples)


def _strided(weight: Tensor, rows: int) -> Tensor:
    return weight[torch.linspace(0, len(weight) - 1, min(rows, len(weight))).round().long().to(weight.device)]
