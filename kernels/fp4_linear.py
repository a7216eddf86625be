"""compressor::fp4_linear — y = Q(H x) · dequantize(W)ᵀ + b with FP4 (E2M1) weights in NVFP4 or MXFP4 blocks.

Contract, all on one device:
    x                    [..., K]    any float dtype; y has the same
    weight_packed        [N, K/2]    uint8, even k in the low nibble
    weight_scale         [N, K/16]   float8_e4m3fn (nvfp4)   |   [N, K/32] uint8 E8M0 (mxfp4)
    weight_global_scale  [1]         float32 divisor (nvfp4), None for mxfp4
    input_global_scale   [1]         float32 divisor, only with activations="nvfp4"
    bias                 [N]         float, optional
    format               "nvfp4" | "mxfp4"
    activations          "none" | "nvfp4" | "mxfp4" | "int8_block" (one scale for each block of the weight's size)
                         | "int8" | "fp8" (one scale a token)
    hadamard             block size of H, which rotates x first (activations.rotate); 0: no rotation
`reference` is the specification: float32 arithmetic, weights dequantized in full. On a CPU the op runs the fused
kernel where it was built (kernels/ort), whose sums have another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import activations as act
from compressor.kernels import codec, native


def dequantize(weight_packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor | None) -> Tensor:
    """float32 [N, K]. The block size is K over the scale's columns; E8M0 where there is no global scale."""
    values = codec.e2m1_values(codec.unpack_nibbles(weight_packed))
    if weight_global_scale is None:
        step = codec.e8m0_values(weight_scale)
    else:
        step = weight_scale.float() / weight_global_scale
    block = values.shape[1] // step.shape[1]
    return (codec.blocks_of(values, block) * step.unsqueeze(-1)).flatten(-2)


def reference(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    input_global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    activations: str,
    four_over_six: bool,
    hadamard: int = 0,
) -> Tensor:
    weight = dequantize(weight_packed, weight_scale, weight_global_scale)
    block = codec.FORMATS[format].block
    quantized = act.quantize(x, activations, input_global_scale, four_over_six, hadamard=hadamard, block=block)
    return torch.nn.functional.linear(quantized, weight, None if bias is None else bias.float()).to(x.dtype)


def _fused(
    x, weight_packed, weight_scale, weight_global_scale, input_global_scale, bias, format, activations, four_over_six,
    hadamard=0,
):  # fmt: skip
    attributes = {
        "format": format,
        "activations": activations,
        "four_over_six": int(four_over_six),
        "hadamard": hadamard,
    }
    inputs = [weight_packed, weight_scale, weight_global_scale, input_global_scale, bias]
    return native.linear("FP4Linear", attributes, x, inputs, weight_packed.shape[0])


fp4_linear = native.op("fp4_linear", reference, _fused)


@fp4_linear.register_fake
def _(
    x, weight_packed, weight_scale, weight_global_scale, input_global_scale, bias, format, activations, four_over_six,
    hadamard=0,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))
