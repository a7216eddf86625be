"""compressor::swiglu — silu(gate) · up of the two halves of x, which one linear makes for both.

Contract:
    x    [..., 2F]   any float dtype: F values of the gate, then F of up
    y    [..., F]    in the dtype of x; the arithmetic is float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import native


def reference(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def _fused(x: Tensor) -> Tensor:
    return native.run("SwiGLU", {"name": ""}, [x.float()], (*x.shape[:-1], x.shape[-1] // 2)).to(x.dtype)


swiglu = native.op("swiglu", reference, _fused)


@swiglu.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
