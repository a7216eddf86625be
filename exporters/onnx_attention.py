"""Attention and its cache as one node of ours, GroupQueryAttention, whose body is com.microsoft's of that name.

How a model attends it asks of transformers' attention interface; while the graph is traced, that interface hands out
`attend`, and a cache layer that leaves joining past and new keys to the op. So every model that uses the interface is
covered whatever its modules are called, and its own mask (causal, padding on either side, sliding window) goes into
the op as a bias: what the op knows of lengths is only how many positions there are.
What is left out: rotary embeddings and norms (onnx_fusion.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# What an attention function is told that a graph for inference need not know, or that the mask says already.
IGNORED = {"dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "training"}
IGNORED |= {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch", "past_key_values"}

LAYER = "_compressor_cache_layer"  # where new keys carry the layer that they belong to
LOWEST = float(torch.finfo(torch.float32).min)


class NotGroupedError(Exception):
    """The model attends in a way that the node cannot express; the message says which."""


@torch.library.custom_op("compressor::grouped_attention", mutates_args=())
def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, heads: int,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention of new tokens to a cache and to themselves, in plain torch.

    query [B, S, heads * D], key and value [B, S, Hkv * D], past_* [B, Hkv, P, D], mask bool [B, 1, S, P + S] (True:
    attend); softcap 0 means none. -> [B, S, heads * D], the cache with the new tokens [B, Hkv, P + S, D] twice.
    """
    kv_heads, size = past_key.shape[1], past_key.shape[3]
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (query, key, value))
    keys, values = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    scores = q @ k.mT * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    out = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2), keys, values


@grouped_attention.register_fake
def _(query, key, value, past_key, past_value, mask, heads, scale, softcap):
    grown = (*past_key.shape[:2], mask.shape[-1], past_key.shape[3])
    return torch.empty_like(query), past_key.new_empty(grown), past_value.new_empty(grown)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [B, H, S, D], key and value [B, Hkv, S, D] -> [B, S, H, D]."""
    layer = getattr(key, LAYER, None)
    if layer is None or attention_mask is None or attention_mask.dtype != torch.bool:
        raise NotGroupedError("its keys do not come straight from the cache, or its mask is not one of yes and no")
    if key.shape != value.shape:
        raise NotGroupedError("its keys and values differ in size")
    if other := [name for name, given in told.items() if name not in IGNORED and given is not None]:
        raise NotGroupedError(f"its attention takes {', '.join(other)}")
    heads, size = query.shape[1], query.shape[3]
    flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    scale = size**-0.5 if scaling is None else float(scaling)
    out, layer.keys, layer.values = torch.ops.compressor.grouped_attention(
        *flat, layer.keys, layer.values, attention_mask, heads, scale, softcap or 0.0
    )
    layer.attended = True
    return out.unflatten(-1, (heads, size)), None


class Layer:
    """A cache layer whose past has the length that the padding mask says; the tensor that holds it may be longer."""

    def __init__(self, keys: Tensor, values: Tensor, seen: int):
        self.keys, self.values, self.seen, self.attended = keys, values, seen, False
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.is_sliding = self.is_compileable = False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        setattr(keys, LAYER, self)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.seen

    def get_mask_sizes(self, position: Any) -> tuple[int, int]:
        return self.seen + (position if isinstance(position, int) else position.shape[0]), 0

    def get_max_cache_shape(self) -> int:
        return -1


def cache(past: list[tuple[Tensor, Tensor]], seen: int) -> Any:
    """A cache for `attend` whose layers hold `past`, `seen` positions of it."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    layers: list[Any] = [Layer(keys, values, seen) for keys, values in past]
    cache.layers.extend(layers)
    return cache


def require_attended(cache: Any) -> None:
    """Raise NotGroupedError if a layer went round `attend`: it would have seen new keys only."""
    if not all(isinstance(layer, Layer) and layer.attended for layer in cache.layers):
        raise NotGroupedError("it does not attend through transformers' attention interface")


@contextlib.contextmanager
def grouped(model: Any) -> Iterator[None]:
    """The model attends through `attend` while this is open. Raises NotGroupedError where it cannot be asked to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")  # whose masks say yes or no
    except ValueError as error:
        raise NotGroupedError("it does not attend through transformers' attention interface") from error
    functions["sdpa"] = attend
    try:
        yield
    finally:
        del functions["sdpa"]  # what is left is the library's own
        model.set_attn_implementation(before)


def emit(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, mask: Any, heads: int, scale: float,
    softcap: float,
) -> Any:  # fmt: skip
    """The node for `grouped_attention`. Every row has all positions; which of them count, the bias says."""
    import onnx
    from onnxscript import opset21

    from compressor.exporters.onnx_nodes import INT32, emit_node

    op: Any = opset21  # its stubs ask for types that the exporter knows later
    one = onnx.helper.make_tensor("one", INT32, [1], [1])
    total = op.Cast(op.Shape(mask, start=3, end=4), to=INT32)
    last = op.Expand(op.Sub(total, op.Constant(value=one)), op.Shape(mask, start=0, end=1))
    bias = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=LOWEST))
    inputs = (query, key, value, past_key, past_value, last, op.Squeeze(total), None, None, None, bias)
    attributes = {"num_heads": heads, "kv_num_heads": past_key.shape[1], "head_size": past_key.shape[3]}
    attributes |= {"do_rotary": 0, "scale": scale, "softcap": softcap}
    return emit_node("GroupQueryAttention", inputs, attributes, outputs=3)
