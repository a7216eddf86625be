"""GPTQ's inner loop on a GPU: the columns of one block rounded one after another, in registers.

The slow twin, and the specification, is `round_block` of methods/gptq.py: some fifteen launches a column there, one
for a block of 128 columns here. Rows never see each other, so a program holds ROWS rows of all the block's columns;
"take column k" is a masked sum, which costs WIDTH times the operations and next to no time.

Left out: which step a column has, and the columns behind the block (one matrix product, methods/gptq.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH, ROWS = 128, 4


@triton.jit
def _columns(
    weight, step, u, codes, errors, n, weight_stride, step_stride, u_stride,
    low, high, binade, unit, C: tl.constexpr, FLOAT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (columns < C)[None, :]
    w = tl.load(weight + rows[:, None] * weight_stride + columns[None, :], inside, 0.0)
    s = tl.load(step + rows[:, None] * step_stride + columns[None, :], inside, 1.0)
    q_all = tl.zeros((ROWS, WIDTH), tl.float32)
    e_all = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(C):
        here = (columns == k)[None, :]
        w_k = tl.sum(tl.where(here, w, 0.0), 1)
        s_k = tl.sum(tl.where(here, s, 0.0), 1)
        x = tl.minimum(tl.maximum(tl.div_rn(w_k, s_k), low), high)
        grain = x * 0.0 + 1.0
        if FLOAT:  # the spacing of the element grid: the power of two at or below |x|, which its exponent bits spell
            power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            grain = tl.maximum(power, binade) * unit
        # Adding and taking away 1.5 · 2²³ rounds to the nearest integer, ties to even.
        q = ((x / grain + 12582912.0) - 12582912.0) * grain
        e = tl.div_rn(w_k - q * s_k, tl.load(u + k * u_stride + k) + tl.zeros((ROWS,), tl.float32))
        u_k = tl.load(u + k * u_stride + columns, (columns >= k) & (columns < C), 0.0)
        w -= e[:, None] * u_k[None, :]
        q_all = tl.where(here, q[:, None], q_all)
        e_all = tl.where(here, e[:, None], e_all)
    tl.store(codes + rows[:, None] * C + columns[None, :], q_all, inside)
    tl.store(errors + rows[:, None] * C + columns[None, :], e_all, inside)


def round_block(
    weight: Tensor, step: Tensor, u: Tensor, limits: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """(codes, errors), each [N, C] float32, of a block of C <= 128 columns; `weight` is only read.

    weight, step  [N, C] float32 on a GPU
    u             [C, C] float32, upper triangular: the block's part of GPTQ's factor
    limits        of the element grid: lowest and highest code, smallest binade (0: integers), spacing over binade
    """
    n, c = weight.shape
    if c > WIDTH:
        raise ValueError(f"a block has at most {WIDTH} columns, got {c}.")
    weight, step, u = (t if t.stride(1) == 1 else t.contiguous() for t in (weight, step, u))
    codes, errors = (torch.empty(n, c, device=weight.device) for _ in range(2))
    low, high, binade, unit = limits
    _columns[(triton.cdiv(n, ROWS),)](
        weight, step, u, codes, errors, n, weight.stride(0), step.stride(0), u.stride(0),
        low, high, binade, unit, C=c, FLOAT=binade > 0, ROWS=ROWS, WIDTH=WIDTH, num_warps=1,
    )  # fmt: skip
    return codes, errors
