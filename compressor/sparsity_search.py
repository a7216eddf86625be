"""Which share of each layer's weights is left unread, found by trying it out. Pure: what a trial costs is passed in.

    greedy   Liu et al. (TEAL), 2025: within one block, always the layer that loses least with a little less
    evolve   Zhang et al. (R-Sparse), ICLR 2025, algorithm 1: (μ + λ) on (alpha, sparsity) of all layers

Both leave exactly `target` of all weights unread, a layer counting as many as it has: k and v are small under GQA.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.sparsity import LEVELS, Choices

STEP = 0.05  # of a layer's weights, that a trial of `greedy` leaves unread in addition
MOST = LEVELS[-1]
SIGMA, RATE = 0.1, 0.1  # σ of a mutation, share of the layers that mutate where it is not a group
ELITE = 4  # one in so many of the population are parents
STALE = 2  # generations without a better one, after which `evolve` ends


def greedy(sizes: Sequence[int], target: float, error: Callable[[Sequence[float]], float]) -> list[float]:
    """The sparsity of each layer; error(sparsities) >= 0 is of the block. Never worse than `target` for all of them.

    The step that is taken costs least for a weight, so steps may differ: by 0.05 of a layer, less where the budget or
    MOST is near. TEAL's are all of one size instead, which is 0.2 of k where q has four times its weights.
    A layer is tried again only when what it cost last is the least of all: costs rise with what is left out elsewhere,
    so that was a lower bound. This takes two to three runs a step, and not one for every layer.
    """
    left, taken = target * sum(sizes), 0
    now, loss = [0.0] * len(sizes), 0.0
    queue = [(0.0, i, -1, 0.0, 0.0) for i in range(len(sizes))]  # cost a weight, layer, when tried, weights, error
    tiny = 1e-9 * sum(sizes)
    while left > tiny:
        rate, i, tried, weights, after = heapq.heappop(queue)
        if tried == taken:
            now[i], left, loss, taken = now[i] + weights / sizes[i], left - weights, after, taken + 1
            heapq.heappush(queue, (rate, i, -1, 0.0, 0.0))
            continue
        weights = min(STEP * sizes[i], (MOST - now[i]) * sizes[i], left)
        if weights > tiny:
            after = error([*now[:i], now[i] + weights / sizes[i], *now[i + 1 :]])
            heapq.heappush(queue, ((after - loss) / weights, i, taken, weights, after))
    uniform = [target] * len(sizes)
    return now if loss <= error(uniform) else uniform


@dataclass(frozen=True)
class Tried:
    """One of the population: what it costs, sparsity and alpha of each layer [n] float64."""

    cost: float
    sparsities: Tensor
    alphas: Tensor

    def genes(self) -> Tensor:
        """[n, 2]"""
        return torch.stack((self.sparsities, self.alphas), 1)

    def named(self, names: Sequence[str]) -> dict[str, Choices]:
        pairs = zip(self.alphas.tolist(), self.sparsities.tolist(), strict=True)
        return {n: Choices(*genes) for n, genes in zip(names, pairs, strict=True)}


def trials(population: int, generations: int) -> int:
    """How often `evolve` calls `cost` at most."""
    return population + generations * (population - max(1, population // ELITE))


def evolve(
    start: Mapping[str, Choices],
    sizes: Mapping[str, int],
    cost: Callable[[Mapping[str, Choices]], float],
    generator: torch.Generator,
    population: int,
    generations: int,
    alphas: bool,
    groups: Sequence[Collection[str]] = (),
) -> tuple[dict[str, Choices], list[float]]:
    """The best choices found, never worse than `start`, and the least cost: the start's, then after each generation.

    alphas: whether they change too; groups: layers that every other mutation moves together, such as those of a block:
    of hundreds of genes, the errors of a start that was estimated are alike within them.
    The same generator state and costs give the same answer.
    """
    names = list(start)
    weights = torch.tensor([sizes[n] for n in names], dtype=torch.float64)
    first = torch.tensor([[start[n].sparsity, start[n].alpha] for n in names], dtype=torch.float64)
    target = ((first[:, 0] * weights).sum() / weights.sum()).item()

    def tried(genes: Tensor) -> Tried:
        one = Tried(math.nan, fitted(genes[:, 0], weights, target), genes[:, 1].clamp(0, 1))
        return Tried(cost(one.named(names)), one.sparsities, one.alphas)

    def mutated(genes: Tensor) -> Tensor:
        drawn = torch.randn(first.shape, generator=generator, dtype=torch.float64)
        which = torch.rand(len(names), generator=generator) < RATE
        if groups and torch.rand((), generator=generator) < 0.5:
            drawn = drawn[:1].expand_as(drawn)
            group = groups[int(torch.randint(len(groups), (), generator=generator))]
            which = torch.tensor([n in group for n in names])
        return genes + SIGMA * drawn * which[:, None] * torch.tensor([1.0, float(alphas)])

    alive = [Tried(cost(start), first[:, 0], first[:, 1])]
    alive += [tried(mutated(first)) for _ in range(population - 1)]
    history = [alive[0].cost, min(one.cost for one in alive)]
    for _ in range(generations):
        parents = sorted(alive, key=lambda one: one.cost)[: max(1, population // ELITE)]
        alive = list(parents)
        while len(alive) < population:
            a, b = (parents[i].genes() for i in torch.randint(len(parents), (2,), generator=generator).tolist())
            pick = torch.rand((len(names), 1), generator=generator) < 0.5
            alive.append(tried(mutated(torch.where(pick, a, b))))
        history.append(min(one.cost for one in alive))
        if len(history) > STALE + 1 and history[-1] == history[-1 - STALE]:
            break
    best = min(alive, key=lambda one: one.cost)
    return (dict(start) if best.cost == history[0] else best.named(names)), history


def fitted(sparsities: Tensor, weights: Tensor, target: float) -> Tensor:
    """[n] in [0, MOST], all moved by one amount so that their mean weighted by `weights` [n] is `target`."""
    low, high = -1.0 - sparsities.abs().max().item(), 1.0 + sparsities.abs().max().item()
    for _ in range(60):
        middle = (low + high) / 2
        short = ((sparsities + middle).clamp(0, MOST) * weights).sum() < target * weights.sum()
        low, high = (middle, high) if short else (low, middle)
    return (sparsities + high).clamp(0, MOST)
