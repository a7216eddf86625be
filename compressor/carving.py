"""Which channels of a feed-forward layer make an expert, those that act on the same tokens, and a router for them.

    A_tj = 1   where |h_tj| is among the K_a largest of token t; h_tj is what channel j adds to the layer's output
    C = AᵀA    its diagonal n_j says how often channel j is among them
    c_k        the mean of A's columns in group k
    D_jk       = Σ_t |A_tj − c_tk|  =  Σ_t c_tk + n_j − 2 (Aᵀc_k)_j,  which C alone gives

The channels with the largest n_j are shared by all tokens. The rest go to groups of one size at the least Σ D, the
groups get new means, and so on for a few rounds (Pei et al. 2025, "CMoE", arXiv 2502.04416). Integers throughout, so
that the same text gives the same groups.

The router is not CMoE's, one channel of each expert (bench/moeify.py has it beside ours), but the least squares of
log Σ_j h_tj² over an expert's channels on the layer's input x: one solution of H equations, no training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROUNDS = 4
RIDGE = 0.01  # of the mean of the diagonal
LEAST = 1e-20  # an energy below this is none; its logarithm exists


@dataclass(frozen=True)
class Carving:
    """Every channel once: shared [S], experts [E, m], both ascending, int64."""

    shared: Tensor
    experts: Tensor


def markers(size: Tensor, most: int) -> Tensor:
    """size [T, n], |h| -> A, float32 [T, n]: 1 for each token's `most` largest."""
    return torch.zeros_like(size, dtype=torch.float32).scatter_(1, size.topk(most, dim=1).indices, 1.0)


def carve(together: Tensor, experts: int, shared: int) -> Carving:
    """together: C [n, n]; n channels make `experts` parts of one size, `shared` of them one expert for all tokens."""
    together = together.double().round()
    often = together.diagonal()
    size = len(often) // experts
    order = often.argsort(descending=True, stable=True)
    always, rest = order[: shared * size].sort().values, order[shared * size :]
    c, n = together[rest][:, rest], often[rest]  # from the most frequent on
    count = experts - shared
    members = torch.zeros(len(rest), count, dtype=torch.float64, device=c.device)
    members[range(count), range(count)] = 1  # the most frequent are the first means
    place = torch.full((len(rest),), -1)
    for _ in range(ROUNDS):
        far = n @ members + n[:, None] * members.sum(0) - 2 * (c @ members)  # D times the size of each group
        found = balanced(far.round().long().cpu(), size)
        if torch.equal(found, place):
            break
        place = found
        members = torch.nn.functional.one_hot(place, count).to(c)
    groups = [rest.cpu()[place == k].sort().values for k in range(count)]
    return Carving(always.cpu(), torch.stack(groups))


def balanced(cost: Tensor, size: int) -> Tensor:
    """[n] the column of each row, `size` rows to each of the n / size columns, at the least sum of cost, int64 [n, k].

    Every row starts in its cheapest column. As long as a column has too many rows, one row after another moves along
    the path of columns, from one with too many to one with too few, that costs least: successive shortest paths, in a
    graph of k nodes whose edge k -> l is the row of k that moves to l for least. (An assignment solver
    would need every column `size` times over, and n³ steps.)
    """
    costs = cost.numpy()
    columns = costs.shape[1]
    place = costs.argmin(1)
    spare = size - np.bincount(place, minlength=columns)
    far = int(costs.max() - costs.min() + 1) * (columns + 1)  # more than any path costs
    step = np.full((columns, columns), far)
    mover = np.zeros((columns, columns), dtype=np.int64)

    def look(column: int) -> None:
        rows = np.flatnonzero(place == column)
        step[column] = far
        if len(rows):
            moves = costs[rows] - costs[rows, column, None]
            best = moves.argmin(0)
            step[column], mover[column] = moves[best, range(columns)], rows[best]

    for column in range(columns):
        look(column)
    while (spare < 0).any():
        reach, came = np.where(spare < 0, 0, far), np.full(columns, -1)
        for _ in range(columns):
            through = reach[:, None] + step
            best = through.argmin(0)
            shortest = through[best, range(columns)]
            if not (better := shortest < reach).any():
                break
            reach, came = np.where(better, shortest, reach), np.where(better, best, came)
        path = [int(np.where(spare > 0, reach, far + 1).argmin())]
        while (before := int(came[path[-1]])) >= 0:
            place[mover[before, path[-1]]] = path[-1]
            path.append(before)
        spare[path[0]] -= 1
        spare[path[-1]] += 1
        for column in path:
            look(column)
    return torch.from_numpy(place)


class Fit:
    """Least squares of the logarithm of what each expert adds, on the layer's input: sums over tokens, float64."""

    def __init__(self, features: int, experts: int):
        self.tokens = 0
        self.x, self.y = torch.zeros(features, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xy = torch.zeros(features, experts, dtype=torch.float64)

    def add(self, x: Tensor, energy: Tensor) -> None:
        """x [T, H]; energy [T, E], Σ h² over the channels of each expert."""
        x, y = x.double().cpu(), energy.double().cpu().clamp_min(LEAST).log()
        self.tokens += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def value(self) -> tuple[Tensor, Tensor]:
        """Weight float32 [E, H] and bias [E]; the expert with the largest x Wᵀ + b is the one that adds most."""
        x, y = self.x / self.tokens, self.y / self.tokens
        xx = self.xx / self.tokens - torch.outer(x, x)
        xx.diagonal().add_(RIDGE * xx.diagonal().mean().clamp_min(LEAST))
        weight = torch.linalg.solve(xx, self.xy / self.tokens - torch.outer(x, y)).T
        return weight.float().contiguous(), (y - weight @ x).float()


def energies(size: Tensor, carving: Carving) -> Tensor:
    """size [T, n], |h| -> Σ h² of each expert's channels, [T, E]."""
    return size.square()[:, carving.experts.to(size.device)].sum(-1)
