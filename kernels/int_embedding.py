"""compressor::int_embedding — rows of a symmetric INT4/INT8 table, dequantized after the gather.

Contract, all on one device:
    ids            [...]                 integer, in [0, V)
    weight_packed  [V, ceil(K*b/32)]     int32 words, offset binary
    weight_scale   [V, ceil(K/group)]    float, multiplies
    y              [..., K]              float32, K = in_features
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import native
from compressor.kernels.int_linear import dequantize


def reference(
    ids: Tensor, weight_packed: Tensor, weight_scale: Tensor, bits: int, group_size: int, in_features: int
) -> Tensor:
    rows = ids.flatten()
    values = dequantize(weight_packed[rows], weight_scale[rows], bits, group_size, in_features)
    return values.unflatten(0, ids.shape) if ids.dim() != 1 else values


def _fused(ids, weight_packed, weight_scale, bits, group_size, in_features):
    attributes = {"bits": bits, "group_size": group_size, "in_features": in_features}
    inputs = [ids, weight_packed, weight_scale.float()]
    return native.run("IntEmbedding", attributes, inputs, (*ids.shape, in_features))


int_embedding = native.op("int_embedding", reference, _fused)


@int_embedding.register_fake
def _(ids, weight_packed, weight_scale, bits, group_size, in_features):
    return weight_scale.new_empty((*ids.shape, in_features), dtype=torch.float32)
