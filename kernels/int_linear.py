"""compressor::int_linear — y = Q(H x - z) · dequantize(W)ᵀ + b, symmetric weights of 1 to 8 bits, per group or row.

Contract, all on one device:
    x             [..., K]              any float dtype; y has the same
    weight        [N, ceil(K*b/32)]     int32 words, codec.pack_int (weight-only)  |  [N, K] int8 (integer activations)
    weight_scale  [N, ceil(K/group)]    float, multiplies; [N, 1] per row
    bias          [N]                   float, optional
    bits          1 | 2 | 3 | 4 | 6 | 8;   group_size  0 means one group per row
    activations   "none" | "int8" | "int6": a scale for each token | "int8_static" | "int6_static": `input_scale`
    input_scale   [1]                   float32, multiplies the codes of x; a power of two where we choose it
    input_offset  [K]                   z, float32, optional: subtracted from x, whatever `activations` says
    hadamard      block size of H, which rotates x first (activations.rotate); 0: no rotation
`reference` is the specification: float32 arithmetic, weights dequantized in full. On a CPU the op runs the fused
kernel where it was built (kernels/ort), which sums in another order and integers exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import activations as act
from compressor.kernels import codec, native


def dequantize(weight: Tensor, weight_scale: Tensor, bits: int, group_size: int, in_features: int) -> Tensor:
    """float32 [N, K]."""
    values = weight if weight.dtype == torch.int8 else codec.unpack_int(weight, bits, in_features)
    step = weight_scale.float()
    if group_size:
        step = step.repeat_interleave(group_size, dim=1)[:, :in_features]
    return values.float() * step


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activations: str,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    hadamard: int = 0,
) -> Tensor:
    dense = dequantize(weight, weight_scale, bits, group_size, x.shape[-1])
    rounded = act.quantize(x, activations, input_scale=input_scale, input_offset=input_offset, hadamard=hadamard)
    return torch.nn.functional.linear(rounded, dense, None if bias is None else bias.float()).to(x.dtype)


def _fused(
    x, weight, weight_scale, bias, bits, group_size, activations, input_scale=None, input_offset=None, hadamard=0
):
    attributes = {
        "bits": bits,
        "group_size": group_size,
        "activations": activations,
        "packed": int(weight.dtype != torch.int8),
        "in_features": x.shape[-1],
        "hadamard": hadamard,
    }
    inputs = [weight, weight_scale, bias, input_scale, input_offset]
    return native.linear("IntLinear", attributes, x, inputs, weight.shape[0])


int_linear = native.op("int_linear", reference, _fused)


@int_linear.register_fake
def _(x, weight, weight_scale, bias, bits, group_size, activations, input_scale=None, input_offset=None, hadamard=0):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
