"""compressor::lowrank_linear — a linear of rank R in one call: z · upᵀ + b, or (z, z · upᵀ + b)[order], z = x · downᵀ.

Contract, all on one device:
    x           [..., K]              any float dtype; y [..., N] has the same
    down        [R, K]                any float dtype
    up          [N, R] or [N - R, R]  any float dtype; the second is the pivoted form (lowrank.py)
    bias        one a row of `up`     float, optional
    down_bias   [R]                   float, optional; of the outputs that z holds, so pivoted only
    order       [N] int64             pivoted only: the place of each output in (z, z · upᵀ + b)
`reference` is the specification. On a CPU the op runs the fused kernel where it was built (kernels/ort): float32 sums,
bfloat16 factors read as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.kernels import native

Factors = tuple[Tensor, Tensor | None, Tensor | None]  # down, up, bias; without `up`, `down` is a dense [N, K]


def product(x: Tensor, factors: Factors) -> Tensor:
    """The linear of these factors, in the dtype of x."""
    down, up, bias = (t if t is None else t.to(x.dtype) for t in factors)
    assert down is not None
    return F.linear(x, down, bias) if up is None else F.linear(F.linear(x, down), up, bias)


def into_ranks(x: Tensor, linears: Sequence[Factors]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """x [T, K] -> for each linear what is left to do: its input, [T, R] or x itself, its last matrix and its bias.

    Downs that lie `side_by_side` are one product, whose columns the inputs then are.
    """
    typed = [tuple(t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in one) for one in linears]
    downs: list[Tensor] = [down for down, up, _ in typed if down is not None and up is not None]
    if len(downs) > 1 and _adjacent(downs):
        whole = downs[0].as_strided((sum(map(len, downs)), x.shape[1]), (x.shape[1], 1))
        ranked = iter(F.linear(x, whole).split([len(d) for d in downs], 1))
    else:
        ranked = iter([F.linear(x, down) for down in downs])
    return [(x, down, bias) if up is None else (next(ranked), up, bias) for down, up, bias in typed]  # type: ignore


def side_by_side(matrices: Sequence[Tensor]) -> None:
    """Move matrices [., K] of one dtype and device into one storage, in this order, unless they lie so already."""
    if not _adjacent(matrices):
        whole = torch.cat([m.detach() for m in matrices])
        for matrix, piece in zip(matrices, whole.split([len(m) for m in matrices]), strict=True):
            matrix.data = piece


def _adjacent(matrices: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, all in the storage of the first."""
    ends = [m.data_ptr() + m.nbytes for m in matrices]
    storage = matrices[0].untyped_storage()
    return (
        all(m.data_ptr() == end for m, end in zip(matrices[1:], ends, strict=False))
        and ends[-1] <= storage.data_ptr() + storage.nbytes()
        and all(m.is_contiguous() for m in matrices)
    )


def reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down_bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    z = product(x, (down, None, down_bias))
    y = product(z, (up, None, bias))
    return y if order is None else torch.cat((z, y), -1).index_select(-1, order)


def run_native(op: str, attributes: dict[str, str | int], x: Tensor, factors: list[Factors | None]) -> Tensor:
    """y [..., N] of the last factors, in the dtype of x, by a fused kernel; its other inputs are the factors."""
    tensors: list[Tensor | None] = []
    for down, up, bias in (f or (None, None, None) for f in factors):
        tensors += [_readable(down), _readable(up), None if bias is None else bias.float()]
    rows = next(t for t in (tensors[-2], tensors[-3]) if t is not None).shape[0]
    return native.run(op, attributes, [x.float(), *tensors], (*x.shape[:-1], rows)).to(x.dtype)


def _readable(matrix: Tensor | None) -> Tensor | None:
    return matrix if matrix is None or matrix.dtype == torch.bfloat16 else matrix.float()


def _fused(x, down, up, bias, down_bias=None, order=None) -> Tensor:
    if x.dtype == torch.float64:
        return reference(x, down, up, bias, down_bias, order)
    biases = (None if b is None else b.float() for b in (bias, down_bias))
    tensors = [x.float(), _readable(down), _readable(up), *biases, order]
    return native.run("LowRankLinear", {}, tensors, (*x.shape[:-1], _outputs(up, order))).to(x.dtype)


def _outputs(up: Tensor, order: Tensor | None) -> int:
    return up.shape[0] if order is None else order.shape[0]


lowrank_linear = native.op("lowrank_linear", reference, _fused)


@lowrank_linear.register_fake
def _(x, down, up, bias, down_bias=None, order=None):
    return x.new_empty((*x.shape[:-1], _outputs(up, order)))
