"""compressor::fp8_linear — y = Q(H x) · dequantize(W)ᵀ + b with FP8 (E4M3) weights, one scale a row.

Contract, all on one device:
    x             [..., K]   any float dtype; y has the same
    weight        [N, K]     float8_e4m3fn
    weight_scale  [N, 1]     float, multiplies
    bias          [N]        float, optional
    activations   "none" | "fp8" (dynamic, one scale a token)
    hadamard      block size of H, which rotates x first (activations.rotate); 0: no rotation
`reference` is the specification: float32 arithmetic, weights dequantized in full. On a CPU the op runs the fused
kernel where it was built (kernels/ort), whose sums have another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import activations as act
from compressor.kernels import native


def dequantize(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """float32 [N, K]."""
    return weight.float() * weight_scale.float()


def reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str, hadamard: int = 0
) -> Tensor:
    rounded = act.quantize(x, activations, hadamard=hadamard)
    return torch.nn.functional.linear(
        rounded, dequantize(weight, weight_scale), None if bias is None else bias.float()
    ).to(x.dtype)


def _fused(x, weight, weight_scale, bias, activations, hadamard=0):
    attributes = {"activations": activations, "hadamard": hadamard}
    return native.linear("FP8Linear", attributes, x, [weight, weight_scale, bias], weight.shape[0])


fp8_linear = native.op("fp8_linear", reference, _fused)


@fp8_linear.register_fake
def _(x, weight, weight_scale, bias, activations, hadamard=0):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
