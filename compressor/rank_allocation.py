"""How many ranks each linear gets, so that all together keep a number of weights. Pure.

    uniform    every layer keeps the same share of its weights
    svd_llm2   within a kind of layer (all q_proj, …) layer i gives up a share ~ 1 / log(e · L_i / min L), L_i what it
               loses at the uniform share                                        Wang et al., NAACL 2025, algorithm 1
    relative   least Σ of each layer's lost share of its own output
    kl         least Σ of each layer's estimated increase of KL (sensitivity.py)

The last two are the integer program of allocation.py, over ranks between `floor` times the uniform one and dense: the
pivoted form makes weights cheaper the more ranks a layer has, so that popping the best rank is no longer optimal.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compressor.allocation import Choice, allocate
from compressor.errors import RecipeError
from compressor.lowrank import rank_for, weights

MOST = 0.95  # of a layer's weights that svd_llm2 removes
LEVELS = 24  # ranks that a layer can choose from, at most: the program has a variable for each


@dataclass(frozen=True)
class Layer:
    """One linear [N, K]; `losses` [S + 1] float64: what is lost at rank 0, 1, …, S = min(N, K).

    overhead   what a factored layer costs beside its weights, in weights
    """

    out_features: int
    in_features: int
    losses: Tensor | None = None
    overhead: int = 0

    @property
    def dense(self) -> int:
        return self.out_features * self.in_features

    def weights(self, rank: int | None, pivoted: bool) -> int:
        """What a rank costs, None for the dense layer."""
        if rank is None:
            return self.dense
        return weights(self.out_features, self.in_features, rank, pivoted) + self.overhead

    def rank(self, share: float, pivoted: bool) -> float:
        """The rank, not rounded, that keeps a share of the weights."""
        return rank_for(self.out_features, self.in_features, share * self.dense - self.overhead, pivoted)

    def lost(self, rank: int | None) -> float:
        assert self.losses is not None
        return 0.0 if rank is None else self.losses[rank].item()

    def ranks(self, multiple: int, pivoted: bool) -> list[int]:
        """Every multiple that costs fewer weights than the dense layer."""
        top = min(self.out_features, self.in_features)
        return [r for r in range(multiple, top, multiple) if self.weights(r, pivoted) < self.dense]


Ranks = dict[str, int | None]  # None: the layer stays dense


@dataclass(frozen=True)
class Decisions:
    """Of all layers of a step: R, the metric of the outputs (weighted_svd.py), where the step has one, and ranks."""

    outputs: Mapping[str, Tensor]
    ranks: Mapping[str, int | None]


def check_multiple(rank_multiple: int) -> None:
    """Raises ValueError for what no rank is a multiple of."""
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple {rank_multiple} must be 1 or more; 16 is usual")


def uniform(layers: Mapping[str, Layer], budget: int, pivoted: bool, multiple: int) -> Ranks:
    """The same share for all, to within one `multiple` of ranks; together `budget` weights or less."""
    return _by_share(layers, dict.fromkeys(layers, _share(layers, budget)), budget, pivoted, multiple)


def _share(layers: Mapping[str, Layer], budget: int) -> float:
    return budget / max(1, sum(layer.dense for layer in layers.values()))


def _by_share(
    layers: Mapping[str, Layer], shares: Mapping[str, float], budget: int, pivoted: bool, multiple: int
) -> Ranks:
    """Layer by layer the rank below its share; what is left of the budget goes to the largest remainders.

    Raises RecipeError where the least rank of a layer, or what stays dense because no rank is smaller, is too much.
    """
    chosen: Ranks = {}
    remainders: list[tuple[float, str, int | None]] = []
    for name, layer in layers.items():
        exact = layer.rank(shares[name], pivoted) / multiple
        steps: list[int | None] = [*layer.ranks(multiple, pivoted), None]
        place = min(max(int(exact) - 1, 0), len(steps) - 1)
        chosen[name] = steps[place]
        if place + 1 < len(steps):
            remainders.append((place + 1 - exact, name, steps[place + 1]))
    used = sum(layers[name].weights(rank, pivoted) for name, rank in chosen.items())
    if used > budget:
        raise RecipeError(
            f"svd: the budget is {budget} weights, and ranks of {multiple} or more take {used} of these "
            f"{sum(layer.dense for layer in layers.values())}; raise the budget or lower rank_multiple."
        )
    for _, name, rank in sorted(remainders, key=lambda r: r[:2]):
        more = layers[name].weights(rank, pivoted) - layers[name].weights(chosen[name], pivoted)
        if used + more <= budget:
            chosen[name], used = rank, used + more
    return chosen


def svd_llm2(layers: Mapping[str, Layer], budget: int, pivoted: bool, multiple: int) -> Ranks:
    """Shares within each kind of layer by the logarithm of what they lose; `losses` are needed."""
    base, keep = uniform(layers, budget, pivoted, multiple), _share(layers, budget)
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    shares: dict[str, float] = {}
    for names in kinds.values():
        lost = {n: layers[n].lost(base[n]) for n in names}
        least = min((v for v in lost.values() if v > 0), default=1.0)
        scores = {n: 1 / math.log(math.e * max(lost[n], least) / least) for n in names}
        shares |= {n: 1 - removed for n, removed in _shared_out(scores, len(names) * (1 - keep)).items()}
    return _by_share(layers, shares, budget, pivoted, multiple)


def _shared_out(scores: Mapping[str, float], total: float) -> dict[str, float]:
    """`total` in proportion to the scores; who would get more than MOST gets that, and the others the rest."""
    full: set[str] = set()
    while True:
        rest = {name: score for name, score in scores.items() if name not in full}
        each = (total - MOST * len(full)) / sum(rest.values()) if rest else 0.0
        over = {name for name, score in rest.items() if each * score > MOST}
        if not over:
            return dict.fromkeys(full, MOST) | {name: each * score for name, score in rest.items()}
        full |= over


def cheapest(layers: Mapping[str, Layer], budget: int, pivoted: bool, multiple: int, floor: float) -> Ranks:
    """Least sum of `losses` within the budget; no layer gets less than `floor` times its uniform rank."""
    base = uniform(layers, budget, pivoted, multiple)
    groups = {}
    for name, layer in layers.items():
        own = base[name]
        least = floor * (min(layer.out_features, layer.in_features) if own is None else own)
        ranks = [r for r in layer.ranks(multiple, pivoted) if r >= least or r == own]
        every = -(-len(ranks) // LEVELS) if ranks else 1
        kept: list[int | None] = [r for i, r in enumerate(ranks) if i % every == 0 or r == own]
        groups[name] = [Choice(str(r), layer.weights(r, pivoted), layer.lost(r)) for r in [*kept, None]]
    found = allocate(groups, budget).choices
    return {name: None if found[name] == "None" else int(found[name]) for name in layers}


def share_ranks(
    shapes: Mapping[str, tuple[int, int]], losses: Mapping[str, Tensor] | None, budget: float, multiple: int
) -> dict[str, int]:
    """Ranks, from 0, of pairs beside layers [N, K], so that all take at most `budget` weights.

    losses   [S + 1] by rank: their sum is made small, always the rank that saves most a weight next, which is the best
             there is up to one rank because losses fall ever slower. None: the same share for every layer
    """
    ranks = dict.fromkeys(shapes, 0)
    left = budget
    total = sum(n * k for n, k in shapes.values())
    if losses is None:
        exact = {name: budget * n * k / total / (n + k) / multiple for name, (n, k) in shapes.items()}
        ranks = {name: multiple * int(one) for name, one in exact.items()}
        left -= sum(rank * sum(shapes[name]) for name, rank in ranks.items())
        for name in sorted(exact, key=lambda n: (int(exact[n]) - exact[n], n)):
            if (more := multiple * sum(shapes[name])) <= left and ranks[name] + multiple <= min(shapes[name]):
                ranks[name], left = ranks[name] + multiple, left - more
        return ranks
    heap = [_gain(losses[name], 0, multiple, shape, name) for name, shape in shapes.items()]
    heapq.heapify(heap)
    while heap:
        gain, name = heapq.heappop(heap)
        if (more := multiple * sum(shapes[name])) > left or not gain:
            continue
        ranks[name], left = ranks[name] + multiple, left - more
        heapq.heappush(heap, _gain(losses[name], ranks[name], multiple, shapes[name], name))
    return ranks


def _gain(losses: Tensor, rank: int, multiple: int, shape: tuple[int, int], name: str) -> tuple[float, str]:
    """What the next ranks of a pair save a weight, negative; 0 where there are no more."""
    if rank + multiple >= len(losses):
        return 0.0, name
    return (losses[rank + multiple] - losses[rank]).item() / (multiple * sum(shape)), name
