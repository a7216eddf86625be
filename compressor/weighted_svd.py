"""The best approximation of low rank in a metric: one primitive for every activation-aware SVD.

    minimise  ‖R^½ (W − A B) L‖_F    over A [N, k], B [k, K]

With C = L Lᵀ and M = R^½ W L, the best is A B = R^-½ U_k U_kᵀ R^½ W, where U_k are the first k left singular vectors of
M (Eckart, Young 1936, applied to M), so A = R^-½ U_k and B = U_kᵀ R^½ W: C is never inverted, and may be singular. The
loss is Σ_{j>k} s_j² exactly, s the singular values of M.

    C = I                plain SVD
    C = diag(m^2α)       ASVD, m the mean |x| of each channel         Yuan et al. 2023
    C = E[x xᵀ]          SVD-LLM, whichever root L is taken           Wang et al., ICLR 2025
    R = diag(F) or E[g gᵀ]     the Fisher information of the outputs: FWSVD (Hsu et al., ICLR 2022), and in Kronecker
                         form with C (K-FAC, Martens, Grosse 2015), where half the loss is the increase of KL to
                         second order
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-12  # of the largest eigenvalue of a metric: below it is rounding noise
TINY = 1e-30


@dataclass(frozen=True)
class Decomposition:
    """Every rank of one matrix at once. float64 on the device of the weight.

    basis      R^-½ U, [N, S], S = min(N, K)
    coordinates  Uᵀ R^½ W, [S, K]
    values     s, [S], falling
    """

    basis: Tensor
    coordinates: Tensor
    values: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [N, rank], B [rank, K]."""
        return self.basis[:, :rank], self.coordinates[:rank]

    def losses(self) -> Tensor:
        """‖R^½ (W − A B) L‖² of the factors of rank 0, 1, …, S: [S + 1]."""
        tails = self.values.square().flip(0).cumsum(0).flip(0)
        return torch.cat((tails, tails.new_zeros(1)))


def weighted_svd(weight: Tensor, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Decomposition:
    """Of weight [N, K]; outputs R: [N, N], or [N] for a diagonal, or None for I; inputs C: [K, K], [K] or None.

    Both metrics are symmetric and not negative; an R that is singular gets a floor, because outputs that no loss looks
    at must still be something.
    """
    w = weight.detach().double()
    left, right = _root(outputs, w, floor=1e-6), _root(inputs, w)
    weighted = w if left is None else _times(left, w)
    m = weighted if right is None else _times(right, weighted.T).T
    if m.shape[0] <= m.shape[1]:
        values, u = torch.linalg.eigh(m @ m.T)
        u = u.flip(1)
    else:  # the smaller Gram matrix; what it gives is orthonormal only after a QR
        values, v = torch.linalg.eigh(m.T @ m)
        u = torch.linalg.qr(m @ v.flip(1)).Q
    values = values.flip(0).clamp_min(0).sqrt()
    basis = u if left is None else _times(_inverse(left), u)
    return Decomposition(basis, u.T @ weighted, values)


def shifted(weight: Tensor, cross: Tensor, own: Tensor, damping: float) -> Tensor:
    """The weight that gives on changed inputs x what `weight` [N, K] gave on x₀, best in the mean of squares.

    W' = W (E[x₀ xᵀ] + λ I) (E[x xᵀ] + λ I)⁻¹, λ = damping times the mean of diag(E[x xᵀ]): W again where nothing
    changed, and near it where x has little power. cross E[x₀ xᵀ] [K, K], own E[x xᵀ] [K, K]; float64 [N, K].
    """
    own, cross = own.double(), cross.to(own.device, torch.float64)
    ridge = damping * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    target = weight.detach().to(own) @ (cross + ridge)
    return torch.linalg.solve(own + ridge, target, left=False)


def _root(metric: Tensor | None, like: Tensor, floor: float = 0.0) -> Tensor | None:
    """The symmetric root [n, n] of a metric, or [n] of a diagonal one."""
    if metric is None:
        return None
    metric = metric.to(like.device, torch.float64)
    if metric.dim() == 1:
        return metric.clamp_min(floor * max(metric.mean().item(), TINY)).sqrt()
    values, vectors = torch.linalg.eigh(metric)
    values = torch.where(values > SMALLEST * values[-1], values, 0).clamp_min(0)
    values = values.clamp_min(floor * max(values.mean().item(), TINY))
    return (vectors * values.sqrt()) @ vectors.T


def _times(root: Tensor, matrix: Tensor) -> Tensor:
    return root @ matrix if root.dim() == 2 else root[:, None] * matrix


def _inverse(root: Tensor) -> Tensor:
    return torch.linalg.inv(root) if root.dim() == 2 else root.reciprocal()


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [N, k] B [k, K] as the same product, column j of A and row j of B of one norm: a size that every dtype holds,
    and that is rounded alike on both sides."""
    size = (a.norm(dim=0).clamp_min(TINY) / b.norm(dim=1).clamp_min(TINY)).sqrt()
    return a / size, b * size[:, None]


def pivoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A [N, k] B [k, K] in its pivoted form, which loses nothing: B' [k, K] = k rows of A B, A' [N - k, k], order [N].

    (A B) x = (z, A' z)[order] with z = B' x. The rows are the first k that Gaussian elimination with row pivoting picks
    of A: then the others are made of them with coefficients that stay small (Zhao et al. 2025, "Pivoting
    factorization", who take them of A B by QR).
    """
    n = len(a)
    rows = _pivots(a)
    rest = torch.ones(n, dtype=torch.bool, device=a.device)
    rest[rows] = False
    others = rest.nonzero()[:, 0]
    top = a[rows]
    below = torch.linalg.solve(top, a[others], left=False)
    order = torch.empty(n, dtype=torch.long, device=a.device)
    order[torch.cat((rows, others))] = torch.arange(n, device=a.device)
    return top @ b, below, order


def _pivots(a: Tensor) -> Tensor:
    """The k rows of A [n, k] that elimination with row pivoting picks."""
    _, pivots = torch.linalg.lu_factor(a)
    order = torch.arange(len(a))
    for i, p in enumerate(pivots.tolist()):  # LAPACK gives swaps, counted from 1
        order[[i, p - 1]] = order[[p - 1, i]]
    return order[: a.shape[1]].to(a.device)
