"""layer_norm(x + residual) on a GPU in one pass over memory: what ends each half of a post-norm block (BERT).

The slow twin, and the specification, is F.layer_norm(x + residual, [N], weight, bias, eps): two kernels, which read and
write twice as much. Sum, mean and variance are float32 here, and only the result is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of one program


@triton.jit
def _add_norm(
    x, residual, weight, bias, rows, n, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < n)
    place = row.to(tl.int64) * n + column
    total = tl.load(x + place, inside, 0.0).to(tl.float32) + tl.load(residual + place, inside, 0.0).to(tl.float32)
    mean = tl.sum(total, 1) / n
    centred = tl.where(column < n, total - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / n + eps)
    w = tl.load(weight + column, column < n, 0.0).to(tl.float32)
    b = tl.load(bias + column, column < n, 0.0).to(tl.float32)
    tl.store(x + place, (centred * scale[:, None] * w + b).to(x.dtype.element_ty), inside)


def add_norm_(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual [..., N] of one floating dtype of at most 32 bits, weight, bias [N]; the result takes the place of x.

    A program holds all N features of its rows, so it has read a row when it writes it.
    """
    x, residual, n = x.contiguous(), residual.contiguous(), x.shape[-1]
    width = triton.next_power_of_2(n)
    rows, at_once = x.numel() // n, max(1, TILE // width)
    with torch.cuda.device(x.device):
        _add_norm[(triton.cdiv(rows, at_once),)](
            x, residual, weight, bias, rows, n, eps, ROWS=at_once, WIDTH=width, num_warps=8,
        )  # fmt: skip
    return x
