"""Which inputs of a linear are small enough to leave out, and what that costs. Pure.

    keep x_j where |x_j| c_j > t          t the s-quantile of |x_j| c_j over tokens and channels

    magnitude   c_j = 1                        Liu et al. (TEAL), 2025
    columns     c_j = ‖W_:j‖                   Zhang et al. (R-Sparse), ICLR 2025, equation 4
    fisher      c_j = (Σ_n F_n W_nj²)^½        what leaving out x_j alone costs the model's output (sensitivity.py)

Of the weights that a layer reads, 1 - s, a share `alpha` is columns and the rest a pair of rank R = (1 - s)(1 - alpha)
N K / (N + K) of the truncated SVD, which stands for what is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.allocation import Choice, allocate
from compressor.statistics import TokenSample
from compressor.weighted_svd import weighted_svd

LEVELS = tuple(i / 20 for i in range(19))  # sparsities that a layer can choose from
ALPHAS = (1.0, 0.95, 0.9, 0.75, 0.5, 0.0)
MASSIVE = 20.0  # a token whose largest value is so many times the median token's is no measure of the others


class Activations(TokenSample):
    """Tokens enough for quantiles: of 1024 x 576 values, a quantile is within 0.1 % of the whole text's."""

    SIZE = 1024


@dataclass(frozen=True)
class Choices:
    """(alpha, sparsity) of one layer."""

    alpha: float
    sparsity: float

    def __str__(self) -> str:
        return f"{self.alpha:g}/{self.sparsity:g}"


def usual(x: Tensor) -> Tensor:
    """The tokens of x [T, K] that are not massive."""
    top = x.abs().amax(1)
    return x[top <= MASSIVE * top.median()]


def scores(weight: Tensor, rule: str, fisher: Tensor | None) -> Tensor:
    """c [K] float32 of a weight [N, K]."""
    if rule == "magnitude":
        return torch.ones(weight.shape[1], device=weight.device)
    w = weight.double()
    if rule == "columns":
        return w.norm(dim=0).float()
    assert fisher is not None
    return (fisher.to(w)[:, None] * w.square()).sum(0).sqrt().float()


def ranked(x: Tensor, c: Tensor) -> Tensor:
    """|x_j| c_j of all values of x [T, K], ascending."""
    return (x.abs() * c).flatten().sort().values


def thresholds(ranked: Tensor, c: Tensor, dropped: float) -> Tensor:
    """[K] float32: |x_j| above it stays, so that `dropped` of all ranked values go."""
    count = round(dropped * len(ranked))
    if count <= 0:
        return torch.zeros_like(c)
    if count >= len(ranked):
        return torch.full_like(c, torch.inf)
    return torch.where(c > 0, ranked[count - 1] / c, torch.inf)


def rank_of(shape: tuple[int, int], choice: Choices) -> int:
    n, k = shape
    return int((1 - choice.sparsity) * (1 - choice.alpha) * n * k / (n + k))


def pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [N, R], B [R, K]: the truncated SVD."""
    return weighted_svd(weight).factors(rank)


def losses(
    weight: Tensor, x: Tensor, c: Tensor, fisher: Tensor, alphas: tuple[float, ...]
) -> dict[Choices, float]:
    """What each choice costs in nats of KL: half the mean over tokens of Σ_n F_n (error of output n)²."""
    weight, f = weight.float(), fisher.to(weight)
    found = weighted_svd(weight) if min(alphas) < 1 else None
    order = ranked(x, c)
    table: dict[Choices, float] = {}
    for alpha in alphas:
        for level in LEVELS:
            choice = Choices(alpha, level)
            rest = weight
            if found is not None and (rank := rank_of(tuple(weight.shape), choice)):  # type: ignore[arg-type]
                a, b = found.factors(rank)
                rest = weight - (a @ b).float()
            gone = x * (x.abs() <= thresholds(order, c, 1 - (1 - level) * alpha))
            table[choice] = 0.5 * ((gone @ rest.T).square() @ f).mean().item()
    return table


def share_out(
    tables: Mapping[str, Mapping[Choices, float]], shapes: Mapping[str, tuple[int, int]], sparsity: float
) -> dict[str, Choices]:
    """The choice of each layer with the least sum of losses, `sparsity` of all weights left unread."""
    sizes = {name: n * k for name, (n, k) in shapes.items()}
    groups = {}
    for name, table in tables.items():
        best: dict[float, tuple[float, Choices]] = {}
        for choice, loss in table.items():
            if choice.sparsity not in best or loss < best[choice.sparsity][0]:
                best[choice.sparsity] = loss, choice
        groups[name] = [
            Choice(str(choice), int((1 - level) * sizes[name]), loss) for level, (loss, choice) in best.items()
        ]
    found = allocate(groups, int((1 - sparsity) * sum(sizes.values()))).choices
    known = {str(choice): choice for table in tables.values() for choice in table}
    return {name: known[found[name]] for name in tables}
