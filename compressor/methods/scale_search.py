"""Which scale a block of weights gets: the candidate with the least weighted squared error.

    minimise over s   sum_k h_k (w_k - Q_s(w_k))²        h = diag(XᵀX)/T, or 1 without calibration

The abs-max scale is always the first candidate and only a strictly better one replaces it, so the result is
never worse than abs-max on this objective. Weighting by the diagonal of XᵀX is the layer-output error with
the correlations between channels left out (they are GPTQ's business).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# E4M3 codes stepped around the abs-max code: a code is 6 to 12 % of the scale, so -8..+6 spans about 0.5 to 1.6.
E4M3_STEPS = tuple(range(-8, 7))
E8M0_STEPS = (-1, 1)
# Multiples of the abs-max scale for integer and FP8 formats, whose scales are bf16.
RATIOS = tuple(1.0 - 0.025 * i for i in range(1, 21))

CHUNK_ELEMENTS = 1 << 18  # keeps the working set of one chunk in the cache: 1.5 times as fast as 2 M


def best_scale(
    blocks: Tensor,
    importance: Tensor | None,
    candidates: Iterable[Tensor],
    round_trip: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The best candidate of each block.

    blocks      [N, B, G] float32, importance [B, G] float32 or None
    candidates  scales [N, B] float32, the abs-max one first
    round_trip  (blocks, scale [N, B, 1]) -> the values the runtime will decode, [N, B, G]
    """
    best: Tensor | None = None
    best_error: Tensor | None = None
    for scale in candidates:
        error = (round_trip(blocks, scale.unsqueeze(-1)) - blocks).square_()
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
