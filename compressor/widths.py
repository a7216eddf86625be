"""How many units each part of a model keeps so that all together meet a budget exactly.

    keep_ratios   from how much each block turns the residual stream (CFSP's coarse importance), scale free
    apportion     ratios -> whole multiples of an alignment, by largest remainder, so that the total is met
    cheapest      measured costs of removing 1, 2, … multiples -> the removals with the least cost in total

Counts are in multiples ("steps") of the alignment unless a name says otherwise.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

KAPPA = 13.1072  # a = 1 of CFSP's a (S_l − mean S) / 10⁴ at its T = 131072 tokens: κ = a T / 10⁴
ROOM = 1.05  # CFSP's: the largest ratio stays this factor short of keeping everything
ALIGNMENTS = (128, 64, 32, 16, 8, 4, 2, 1)


def alignment(units: int, wanted: int | None, most: int = 12) -> int:
    """`wanted`, or the largest of 128, 64, … that divides `units` into `most` steps or more.

    Raises ValueError for a wanted alignment that does not divide the width.
    """
    if wanted is not None:
        if units % wanted:
            fitting = ", ".join(str(a) for a in ALIGNMENTS if units % a == 0)
            raise ValueError(f"align {wanted} does not divide its width {units}; use one of {fitting}")
        return wanted
    return next((a for a in ALIGNMENTS if units % a == 0 and units // a >= most), 1)


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
        shrink = min(shrink, mean.item() * (1 - floor / keep) / low)
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


def cheapest(costs: Sequence[Tensor], total: int) -> list[int]:
    """How many steps to remove from each part, `total` in all, so that the sum of costs is least.

    costs   per part [S + 1], the cost of removing 0, 1, … S steps, the first of them 0

    Exact where costs are convex; else on their lower convex hulls, with the one part that the budget cuts inside a hull
    edge. Raises ValueError for more than can be removed.
    """
    if not 0 <= total <= sum(len(c) - 1 for c in costs):
        raise ValueError(f"{total} steps cannot be removed: there are {sum(len(c) - 1 for c in costs)}")
    slopes = [_hull_slopes(c.double()) for c in costs]
    removed = [0] * len(costs)
    heap = [(s[0], i) for i, s in enumerate(slopes) if s]
    heapq.heapify(heap)
    for _ in range(total):
        _, i = heapq.heappop(heap)
        removed[i] += 1
        if removed[i] < len(slopes[i]):
            heapq.heappush(heap, (slopes[i][removed[i]], i))
    return removed


def _hull_slopes(cost: Tensor) -> list[float]:
    """The slope of the lower convex hull over each step, [S]."""
    values = cost.tolist()
    hull = [0]
    for i in range(1, len(values)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - b) < (values[i] - values[b]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    edges = itertools.pairwise(hull)
    return [(values[b] - values[a]) / (b - a) for a, b in edges for _ in range(b - a)]
