"""Which scale a block of weights gets: the candidate with the least squared error.

    minimise over s   sum_k h_k (w_k - Q_s(w_k))²        h = diag(XᵀX)/T (weighted), or 1 (mse, four_over_six)

The abs-max scale is always the first candidate and only a strictly better one replaces it, so the result is
never worse than abs-max on this objective. Weighting by the diagonal of XᵀX is the layer-output error with
the correlations between channels left out (they are GPTQ's business).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from compressor.kernels import codec
from compressor.methods.grid import ELEMENTS, Grid

# E4M3 codes stepped around the abs-max code: a code is 6 to 12 % of the scale, so -8..+6 spans about 0.5 to 1.6.
E4M3_STEPS = tuple(range(-8, 7))
E8M0_STEPS = (-1, 1)
# Multiples of the abs-max scale for integer and FP8 formats, whose scales are bf16.
RATIOS = tuple(1.0 - 0.025 * i for i in range(1, 21))
# Integers whose range is so uneven that its longer end should be where the block's longer tail is: 5 % less error, what
# a zero point would give too.
TURNED = ("int2", "int3")
MEAN_RATIOS = tuple(1.0 + sign * 0.05 * i for i in range(1, 7) for sign in (-1, 1))  # of one bit: around the mean |w|
# The same of floats, whose steps grow with their values: eighths of an octave, the abs-max one first.
FLOAT_RATIOS = (1.0, *(2.0 ** (-i / 8) for i in range(-2, 25) if i))

CHUNK_ELEMENTS = 1 << 18  # keeps the working set of one chunk in the cache: 1.5 times as fast as 2 M


def choose(
    format: str,
    weight: Tensor,
    group_size: int | None,
    importance: Tensor | None,
    rule: str,
    divisor: Tensor | None = None,
) -> Grid:
    """The grid of one weight matrix.

    weight      [N, K] float32;  group_size  divides K, None: one scale a row
    importance  [K] float32 or None, used by rule "weighted"
    rule        "absmax" | "four_over_six" (nvfp4: the largest value of a block on 6 or on 4) | "mse" | "weighted"
    divisor     [1] float32, the global scale of nvfp4 and of floats in blocks
    """
    blocks = codec.blocks_of(weight, group_size or weight.shape[1])
    h = importance.reshape(blocks.shape[1:]) if importance is not None and rule == "weighted" else None
    element = ELEMENTS[format]

    def best(rows: Tensor) -> Tensor:
        return best_scale(rows, h, candidates(format, rows, rule, divisor), lambda b, s: element(b / s).mul_(s))

    return Grid(format, by_rows(blocks, best), divisor)


def candidates(format: str, blocks: Tensor, rule: str, divisor: Tensor | None) -> Iterator[Tensor]:
    """Steps [N, B] that the format can store for blocks [N, B, G], the abs-max one first."""
    amax = blocks.abs().amax(-1)
    searched = rule in ("mse", "weighted")
    if divisor is not None:
        base = codec.nvfp4_block_scale(amax, divisor, codec.FLOATS["e2m1" if format == "nvfp4" else format].top)
        yield base / divisor
        if rule == "four_over_six":
            yield codec.nvfp4_block_scale(amax, divisor, top=4.0) / divisor
        if searched:
            code = codec.to_e4m3(base).view(torch.uint8).int()
            for d in E4M3_STEPS:
                if d:  # 1 is the smallest positive code, 126 is 448
                    yield (code + d).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float() / divisor
    elif format == "mxfp4":
        exponent = codec.mxfp4_block_exponent(amax).int()
        for d in (0, *E8M0_STEPS) if searched else (0,):
            yield codec.e8m0_values((exponent + d).clamp(1, 254))
    elif format in codec.FLOATS:
        base = _positive(amax / codec.FLOATS[format].top)
        for ratio in FLOAT_RATIOS if searched else (1.0,):
            yield (base * ratio).bfloat16().float()
    else:
        # An integer's abs-max scale uses both ends of the two's complement range.
        top = codec.E4M3_MAX if format == "fp8" else (1 << (codec.FORMATS[format].bits - 1)) - 0.5
        base = blocks.abs().mean(-1) if format == "int1" else _positive(amax / top)  # one bit has no zero but this
        around = MEAN_RATIOS if format == "int1" else RATIOS
        for sign in (1, -1) if searched and format in TURNED else (1,):
            for ratio in (1.0, *around) if searched else (1.0,):
                yield _bf16_up(base * ratio) if format == "fp8" else (base * (sign * ratio)).bfloat16().float()


def best_scale(
    blocks: Tensor,
    importance: Tensor | None,
    candidates: Iterable[Tensor],
    round_trip: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The best candidate of each block.

    blocks      [N, B, G] float32, importance [B, G] float32 or None
    candidates  scales [N, B] float32, the abs-max one first
    round_trip  (blocks, scale [N, B, 1]) -> the values the runtime will decode, [N, B, G], memory of its own
    """
    best: Tensor | None = None
    best_error: Tensor | None = None
    for scale in candidates:
        error = round_trip(blocks, scale.unsqueeze(-1)).sub_(blocks).square_()
        if importance is not None:
            error *= importance
        total = error.sum(-1)
        if best is None or best_error is None:
            best, best_error = scale.clone(), total
        else:
            better = total < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, total, best_error)
    assert best is not None
    return best


def by_rows(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function over chunks of rows of weight [N, ...], concatenated."""
    rows = max(1, CHUNK_ELEMENTS // max(1, weight[0].numel()))
    return torch.cat([function(chunk) for chunk in weight.split(rows)])


def _positive(scale: Tensor) -> Tensor:
    """A scale to divide by: rows and blocks that are zero, or below bf16's normal range, get 1."""
    return torch.where(scale < torch.finfo(torch.bfloat16).tiny, 1.0, scale)


def _bf16_up(scale: Tensor) -> Tensor:
    """bf16 values not below `scale`, so that FP8's largest value does not saturate."""
    rounded = scale.bfloat16().float()
    return torch.where(rounded < scale, rounded * (1 + 2.0**-7), rounded).bfloat16().float()
