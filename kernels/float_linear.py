"""compressor::float_linear — y = Q(2^k x) · dequantize(W)ᵀ + b with floats of 4, 6 or 8 bits, in blocks or rows.

Contract, all on one device; formats are those of codec.FLOATS:
    x                    [..., K]      any float dtype; y has the same
    weight_packed        [N, K*b/8]    uint8, codes of `format`, little endian; four of 6 bits share three bytes
    weight_scale         [N, K/G]      float8_e4m3fn (blocks of G)   |   [N, 1] float (rows); multiplies
    weight_global_scale  [1]           float32 divisor (blocks), a power of two; None for rows
    input_scale          [1]           float32, multiplies the codes of 2^k x; None with activations="none"
    input_shift          [K]           k, int8 in [0, 31], optional: x is multiplied by 2^k whatever `activations` says
    bias                 [N]           float, optional
    format               "e2m1" | "e3m0" | "e1m2" | "e3m2" | "e2m3" | "e4m3" | "e5m2"
    activations          "none" | "<format>_static": one scale for all tokens
`reference` is the specification: float32 arithmetic, weights dequantized in full. On a CPU the op runs the fused
kernel where it was built (kernels/ort), whose sums have another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import activations as act
from compressor.kernels import codec, native


def dequantize(weight_packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor | None, format: str) -> Tensor:
    """float32 [N, K]. The block size is K over the scale's columns."""
    element = codec.FLOATS[format]
    values = codec.float_values(codec.unpack_codes(weight_packed, element.bits), element)
    step = weight_scale.float()
    if weight_global_scale is not None:
        step = step / weight_global_scale
    blocks = codec.blocks_of(values, values.shape[1] // step.shape[1])
    return (blocks * step.unsqueeze(-1)).flatten(-2)


def reference(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    bias: Tensor | None,
    format: str,
    activations: str,
) -> Tensor:
    weight = dequantize(weight_packed, weight_scale, weight_global_scale, format)
    quantized = act.quantize(x, activations, input_scale=input_scale, input_shift=input_shift)
    return torch.nn.functional.linear(quantized, weight, None if bias is None else bias.float()).to(x.dtype)


def _fused(x, weight_packed, weight_scale, weight_global_scale, input_scale, input_shift, bias, format, activations):
    block = 0 if weight_global_scale is None else x.shape[-1] // weight_scale.shape[1]
    attributes = {"format": format, "activations": activations, "block_size": block}
    inputs = [weight_packed, weight_scale, weight_global_scale, input_scale, input_shift, bias]
    return native.linear("FloatLinear", attributes, x, inputs, weight_packed.shape[0])


float_linear = native.op("float_linear", reference, _fused)


@float_linear.register_fake
def _(x, weight_packed, weight_scale, weight_global_scale, input_scale, input_shift, bias, format, activations):
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))
