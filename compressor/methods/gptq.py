"""GPTQ: round columns one after another, each time correcting the columns that are still to come.

    minimise  tr((W - Ŵ) H (W - Ŵ)ᵀ),   H = XᵀX / T over the calibration tokens

With U the upper Cholesky factor of (H + λI)⁻¹ (columns in the order of falling H_kk), for k = 1 … K:

    ŵ_k = Q(w_k),   e = (w_k - ŵ_k) / U_kk,   w_j ← w_j - e U_kj  for j > k

Scales are fixed before (grid.py): the grid of a block never moves while its columns are rounded, so any format with
any groups works, and the column order costs nothing in the file. Source: Frantar et al., "GPTQ", ICLR 2023 (sections
3.2, 3.3); the static order is the `actorder: weight` of compressed-tensors.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import NumericsError
from compressor.kernels import native
from compressor.methods.grid import LIMITS, Grid

BLOCK = 128  # columns whose corrections are collected before the rest of the matrix is touched
LEAF = 16  # of those, the columns that correct each other one by one
DAMPINGS = (1, 10, 100)  # times the recipe's damping, until the factorization succeeds


@dataclass(frozen=True)
class Hessian:
    """What GPTQ needs of one site's input; the linears of the site share it.

    order [K] int64, factor [K, K] float32 upper triangular in that order, damping: λ / mean(diag H) that was used.
    """

    order: Tensor
    factor: Tensor
    damping: float


def factorize(gram: Tensor, damping: float, name: str = "") -> Hessian:
    """gram [K, K] float32 -> Hessian. Channels that are always zero keep their nearest codes.

    damping is relative to the mean of the diagonal. Raises NumericsError when a hundred times as much does not make
    the matrix positive definite.
    """
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    back = order.flip(0)
    # With J the reversal of rows and columns, J(H + λI)J = MMᵀ makes (JMJ)⁻¹ the upper Cholesky factor of the inverse,
    # which is then never formed: 0.5 s instead of 8 at K = 1536 on one core. Two matrices of doubles at a time:
    # at K = 14336 each is 1.6 GB.
    h = gram[back[:, None], back].double()
    dead = h.diagonal() <= 0
    h[dead, dead] = 1.0
    mean = h.diagonal().mean()
    used = 0.0
    for times in DAMPINGS:
        h.diagonal().add_((damping * times - used) * mean)
        used = damping * times
        lower, info = torch.linalg.cholesky_ex(h)
        if info.item() == 0:
            upper = lower.flip(0, 1).float()
            eye = torch.eye(len(upper), device=upper.device)
            return Hessian(order, torch.linalg.solve_triangular(upper, eye, upper=True), used)
    raise NumericsError(
        f"{name}: XᵀX of its input is not positive definite even with a damping of {used:g}; use more calibration "
        f"windows, or rounding: nearest."
    )


def round_columns(weight: Tensor, hessian: Hessian, grid: Grid) -> Tensor:
    """Codes [N, K] float32 of weight [N, K] float32."""
    order, u = hessian.order, hessian.factor
    w = weight[:, order].clone()
    step = grid.columns(weight.shape[1])[:, order]
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        codes[:, block], errors = _round(w[:, block], step[:, block], u[block, block], grid)
        w[:, start + BLOCK :].addmm_(errors, u[block, start + BLOCK :], alpha=-1)
    return codes[:, torch.argsort(order)]


def _round(weight: Tensor, step: Tensor, u: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if weight.is_cuda and grid.format in LIMITS and importlib.util.find_spec("triton"):
        from compressor.kernels import gptq_columns

        return gptq_columns.round_block(weight, step, u, LIMITS[grid.format])
    if weight.device.type == "cpu" and native.built() and grid.format in LIMITS:
        return native.gptq_block(weight, step, u, LIMITS[grid.format])
    return round_block(weight, step, u, grid)


def round_block(weight: Tensor, step: Tensor, u: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(codes, errors e), each [N, C], of C columns. Its fast twins are kernels/gptq_columns.py on a GPU and
    kernels/ort/isa_gptq.h on a CPU.

    weight, step [N, C] float32 in the factor's column order;  u [C, C] the factor's part for these columns.
    """
    # A column is a row here, in one piece of memory.
    w, s = weight.T.clone(memory_format=torch.contiguous_format), step.T.contiguous()
    errors = torch.empty_like(w)
    codes: list[Tensor] = []
    pivots = u.diagonal().unsqueeze(1)
    u = u / pivots  # errors are divided once, at the end
    columns = list(zip(w, s, errors, strict=True))

    def round_range(start: int, end: int) -> None:
        """By halves, the right one after what the left one's errors ask of it: what is corrected stays in the cache."""
        if end - start > LEAF:
            middle = (start + end) // 2
            round_range(start, middle)
            w[middle:end].addmm_(u[start:middle, middle:end].T, errors[start:middle], alpha=-1)
            round_range(middle, end)
            return
        for k in range(start, end):
            column, step_k, e = columns[k]
            codes.append(grid.codes(column, step_k))
            torch.addcmul(column, codes[k], step_k, value=-1, out=e)
            w[k + 1 : end].addr_(u[k, k + 1 : end], e, alpha=-1)

    round_range(0, len(w))
    return torch.stack(codes, dim=1), errors.div_(pivots).T


def error(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ): the layer's relative output error on the calibration tokens, a scalar."""
    difference = weight - rounded
    return ((difference @ gram) * difference).sum() / ((weight @ gram) * weight).sum().clamp_min(1e-30)
