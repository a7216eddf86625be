"""compressor::lowrank_ffn — y = out(act(in(x))) or out(act(in(x)) * mul(x)): a feed-forward of low-rank linears that
never holds the hidden activations of all tokens.

Contract, all on one device; K in-features, D hidden, N out-features, R ranks (each its own):
    x                            [..., K]   any float dtype; y [..., N] has the same
    in_down, in_up, in_bias      [R, K], [D, R], [D]    the linear under the activation
    mul_down, mul_up, mul_bias   [R, K], [D, R], [D]    of a gated feed-forward, else None
    out_down, out_up, out_bias   [R, D], [N, R], [N]
    activation                   "gelu" (erf) | "gelu_tanh" | "silu" | "relu"
A bias may be None, and an `_up`: then its `_down` is a dense matrix. `reference` is the specification and holds
[T, D]; `chunked` computes the same a few tokens at a time (docs/flashsvd.md). On a CPU the op runs the fused kernel
where it was built (kernels/ort), everywhere else `chunked`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.kernels import native
from compressor.kernels.lowrank_linear import Factors, into_ranks, product, run_native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "silu": torch.ops.aten.silu_,
    "relu": torch.ops.aten.relu_,
}
# What the hidden activations of one chunk may take: on a GPU as much as x, within these.
LEAST_HIDDEN_BYTES, HIDDEN_BYTES, CPU_HIDDEN_BYTES = 16 << 20, 64 << 20, 4 << 20
LEAST_TOKENS = 256  # below which matrix products are too small to be fast


def reference(
    x: Tensor,
    in_down: Tensor,
    in_up: Tensor | None,
    in_bias: Tensor | None,
    mul_down: Tensor | None,
    mul_up: Tensor | None,
    mul_bias: Tensor | None,
    out_down: Tensor,
    out_up: Tensor | None,
    out_bias: Tensor | None,
    activation: str,
) -> Tensor:
    hidden = ACTIVATIONS[activation](product(x, (in_down, in_up, in_bias)))
    if mul_down is not None:
        hidden = hidden * product(x, (mul_down, mul_up, mul_bias))
    return product(hidden, (out_down, out_up, out_bias))


def tokens_at_once(x: Tensor, hidden: int, gated: bool) -> int:
    """How many tokens of x go together through a feed-forward of this hidden width: chunks of about one size."""
    limit = CPU_HIDDEN_BYTES if x.device.type == "cpu" else max(min(HIDDEN_BYTES, x.nbytes), LEAST_HIDDEN_BYTES)
    most = max(limit // (hidden * x.element_size() * (2 if gated else 1)) // 128 * 128, LEAST_TOKENS)
    tokens = x.numel() // x.shape[-1]
    even = -(-tokens // max(-(-tokens // most), 1))
    return max(min(-(-even // 128) * 128, most), 1)


@torch.no_grad()
def chunked(
    x: Tensor, first: Factors, gate: Factors | None, last: Factors, activation: str, tokens: int | None = None
) -> Tensor:
    """`reference` for `tokens` tokens at a time (None: as many as stay in a cache), without gradients.

    first, gate, last: the linear under the activation, the one that multiplies it, the one behind both. Beside x and y
    it holds tokens * D elements, where gated tokens * 2 D, and what the last linear has in rank space for all tokens.
    """
    down, up, bias = (t if t is None else t.to(x.dtype) for t in last)
    assert down is not None
    step = tokens or tokens_at_once(x, down.shape[1], gate is not None)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty((len(flat), len(down)))
    for start in range(0, len(flat), step):
        some = slice(start, start + step)
        entered = into_ranks(flat[some], [first] if gate is None else [first, gate])
        hidden = _activated(*entered[0], activation)
        for other in entered[1:]:
            hidden.mul_(F.linear(*other))
        _into(y[some], hidden, down, bias if up is None else None)
        del hidden, entered  # before the next ones are there
    if up is not None:
        y = F.linear(y, up, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x weightᵀ + bias): in the epilogue of the product where cuBLAS has the activation, else in place.

    cuBLAS has GELU by tanh, on float32 sums. It differs from the exact one by 5e-4 at most, less than what rounding
    the sums to bfloat16 before the exact one costs; so bfloat16 takes it for both.
    """
    gelu = activation == "gelu_tanh" or (activation == "gelu" and x.dtype == torch.bfloat16)
    if x.is_cuda and bias is not None and (gelu or activation == "relu"):
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=gelu)
    return IN_PLACE[activation](F.linear(x, weight, bias))


def _into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x weightᵀ + bias, without a second tensor of that size."""
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


@functools.wraps(reference)  # for its signature
def _default(*given):
    return chunked(given[0], given[1:4], given[4:7] if given[4] is not None else None, given[7:10], given[10])


def _fused(*given):
    if given[0].dtype == torch.float64:
        return _default(*given)
    gate = given[4:7] if given[4] is not None else None
    return run_native("LowRankFFN", {"activation": given[10]}, given[0], [given[1:4], gate, given[7:10]])


lowrank_ffn = native.op("lowrank_ffn", _default, _fused)


@lowrank_ffn.register_fake
def _(x, in_down, in_up, in_bias, mul_down, mul_up, mul_bias, out_down, out_up, out_bias, activation):
    return x.new_empty((*x.shape[:-1], (out_down if out_up is None else out_up).shape[0]))
