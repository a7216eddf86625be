"""How many units each part of a model keeps so that all together meet a budget exactly.

    keep_ratios   from how much each block turns the residual stream (CFSP's coarse importance), scale free
    apportion     ratios -> whole multiples of an alignment, by largest remainder, so that the total is met

Counts are in multiples ("steps") of the alignment unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KAPPA = 13.1072  # a = 1 of CFSP's a (S_l − mean S) / 10⁴ at its T = 131072 tokens: κ = a T / 10⁴
ROOM = 1.05  # CFSP's: the largest ratio stays this factor short of keeping everything
OFF = 0.01  # of a width, that one width for all layers may miss the budget by
ALIGNMENTS = (128, 64, 32, 16, 8, 4, 2, 1)


def alignment(units: Sequence[int], wanted: int | None, least_steps: int = 12) -> int:
    """`wanted`, or the largest of 128, 64, … that divides all widths into `least_steps` or more.

    Raises ValueError for a wanted alignment that does not divide a width.
    """
    if wanted is None:
        return next((a for a in ALIGNMENTS if all(u % a == 0 and u // a >= least_steps for u in units)), 1)
    if misfit := next((u for u in units if u % wanted), None):
        fitting = ", ".join(str(a) for a in ALIGNMENTS if misfit % a == 0)
        raise ValueError(f"align {wanted} does not divide a width of {misfit} channels; use one of {fitting}")
    return wanted


def nearest(units: int, share: float, step: int | None) -> int:
    """The multiple of `step` nearest to a share of a width; None: of the largest of 128, 64, … that is within OFF."""
    steps = ALIGNMENTS if step is None else (step,)
    multiples = [a * min(max(round(units * share / a), 1), units // a) for a in steps if units % a == 0]
    return next((m for m in multiples if abs(m - units * share) <= OFF * units), multiples[-1])


def keep_ratios(omega: Tensor, pruned: float, kappa: float = KAPPA, floor: float = 0.0) -> Tensor:
    """Share of its channels that each block keeps, [L] with mean 1 − pruned, in [floor, 1].

    omega   mean angle between a block's input and output over π, [L]: what does not turn the stream loses more

    y = σ(κ (ω − mean ω)), r = (1 − pruned) y / mean y; where some r would leave [floor, 1], all y shrink towards their
    mean by one factor. κ times a mean and not a sum over tokens: more calibration text changes nothing.
    """
    keep = 1 - pruned
    y = torch.sigmoid(kappa * (omega.double() - omega.double().mean()))
    mean = y.mean()
    high, low = (y.max() - mean).item(), (mean - y.min()).item()
    shrink = 1.0
    if keep * y.max() >= mean and high > 0:
        shrink = min(shrink, mean.item() * (1 / keep - 1) / (high * ROOM))
    if keep * y.min() < floor * mean and low > 0:
        shrink = min(shrink, mean.item() * max(0.0, 1 - floor / keep) / low)
    return (keep * (mean + shrink * (y - mean)) / mean).clamp(max=1.0)


def apportion(quotas: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each in [1, most], as near to the quotas as largest remainder gets.

    Raises ValueError where the bounds leave no room.
    """
    if not len(quotas) <= total <= sum(most):
        raise ValueError(f"{total} steps in all cannot be kept: allowed are {len(quotas)} to {sum(most)}")
    kept = [min(max(int(q), 1), top) for q, top in zip(quotas, most, strict=True)]
    while (left := total - sum(kept)) != 0:
        up = left > 0
        open_ = [i for i, k in enumerate(kept) if (k < most[i] if up else k > 1)]
        # The furthest below (or above) its quota first; the first block of equals.
        i = max(open_, key=lambda i: (quotas[i] - kept[i]) * (1 if up else -1))
        kept[i] += 1 if up else -1
    return kept
