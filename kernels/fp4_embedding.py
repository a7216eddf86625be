"""compressor::fp4_embedding — rows of an FP4 (E2M1) table in NVFP4 or MXFP4 blocks, dequantized after the gather.

Contract, all on one device:
    ids                  [...]       integer, in [0, V)
    weight_packed        [V, K/2]    uint8, even k in the low nibble
    weight_scale         [V, K/16]   float8_e4m3fn (nvfp4)   |   [V, K/32] uint8 E8M0 (mxfp4)
    weight_global_scale  [1]         float32 divisor (nvfp4), None for mxfp4
    format               "nvfp4" | "mxfp4"
    y                    [..., K]    float32
A tied head reads the same tensors through compressor::fp4_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import native
from compressor.kernels.fp4_linear import dequantize


def reference(
    ids: Tensor, weight_packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor | None, format: str
) -> Tensor:
    rows = ids.flatten()
    # Rows are gathered as bytes: not every device can index float8.
    scale = weight_scale.view(torch.uint8)[rows].view(weight_scale.dtype)
    values = dequantize(weight_packed[rows], scale, weight_global_scale)
    return values.unflatten(0, ids.shape) if ids.dim() != 1 else values


def _fused(ids, weight_packed, weight_scale, weight_global_scale, format):
    inputs = [ids, weight_packed, weight_scale, weight_global_scale]
    return native.run("FP4Embedding", {"format": format}, inputs, (*ids.shape, weight_packed.shape[1] * 2))


fp4_embedding = native.op("fp4_embedding", reference, _fused)


@fp4_embedding.register_fake
def _(ids, weight_packed, weight_scale, weight_global_scale, format):
    return ids.new_empty((*ids.shape, weight_packed.shape[1] * 2), dtype=torch.float32)
