"""A linear of low rank: two ordinary linears in a row, which later steps treat like any other.

    plain     y = A (B x) + b                      A [N, R], B [R, K]: R (N + K) weights
    pivoted   z = B x, y = (z, A z)[order] + b     A [N - R, R], B [R, K]: R (N + K - R) weights

Any W of rank R has both forms: in the pivoted one, B is R rows of W and A says how the others are made of them, so it
saves R² weights and as many multiply-adds, and its break-even rank is min(N, K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`down` [R, K] then `up` [N, R], or [N - R, R] with `order` [N] int64, the place of each output in (z, up(z)).

    A bias is `up`'s. In the pivoted form it is of both, `down`'s being the bias of the outputs that z holds.
    """

    order: Tensor | None

    def __init__(self, down: nn.Linear, up: nn.Linear, order: Tensor | None = None):
        super().__init__()
        self.down, self.up = down, up
        self.register_buffer("order", order)
        self.in_features: int = down.in_features
        self.rank: int = down.out_features
        self.out_features: int = up.out_features + (0 if order is None else self.rank)

    @classmethod
    def shaped(
        cls, out_features: int, in_features: int, rank: int, *, bias: bool = False, pivoted: bool = False
    ) -> LowRankLinear:
        """One without values, on the meta device."""
        down = nn.Linear(in_features, rank, bias and pivoted, device="meta")
        up = nn.Linear(rank, out_features - (rank if pivoted else 0), bias, device="meta")
        order = torch.empty(out_features, dtype=torch.long, device="meta") if pivoted else None
        return cls(down, up, order)

    @property
    def pivoted(self) -> bool:
        return self.order is not None

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        y = self.up(z)
        return y if self.order is None else torch.cat((z, y), -1).index_select(-1, self.order)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, pivoted={self.pivoted}"


def weights(out_features: int, in_features: int, rank: int, pivoted: bool) -> int:
    """How many weights, and multiply-adds a token, a rank costs; the dense linear has N K."""
    return rank * (out_features + in_features - (rank if pivoted else 0))


def rank_for(out_features: int, in_features: int, budget: float, pivoted: bool) -> float:
    """The rank, not rounded, whose `weights` are `budget`: the inverse of `weights`."""
    total = out_features + in_features
    if not pivoted:
        return budget / total
    return (total - math.sqrt(max(0.0, total * total - 4 * budget))) / 2
