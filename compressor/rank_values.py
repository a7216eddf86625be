"""Values in rank space in the key-value cache: R numbers a token instead of all heads' values (docs/flashsvd.md).

    v_h = z A_h + b_h        softmax(…) v_h = (softmax(…) z) A_hᵀ + b_h

z = x B is what the cache holds, in as many pseudo-heads as it fills; all heads share it. Keys stay as they are: rotary
embeddings turn them after lifting. Works where a model attends through transformers' attention interface; the linear
of the values is found by trying each, and proven as lean.py's parts are. What is left out: caches that quantize or
evict by the number of heads, and exported graphs, whose inputs name the cache's shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from compressor.kernels import lowrank_attention
from compressor.lean_modules import factors
from compressor.lowrank import LowRankLinear

NAME = "compressor_rank_values"
# What an attention function is told besides masks that inference does without, or that the mask says already.
IGNORED = {"dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "past_key_values"}
IGNORED |= {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch", "training"}


class Values(LowRankLinear):
    """Gives z, with zeros up to a multiple of the head size, in the place of the values. `size`: the head size."""

    size: int

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.down(x), (0, -self.rank % self.size))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [B, H, S, E], key [B, G, P, E], value [B, -, P, E] -> [B, S, H, E].

    Modules whose values are not in rank space attend as in `sdpa`.
    """
    linear = next((m for m in module.children() if isinstance(m, Values)), None)
    if linear is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **told)
    if other := [name for name, given in told.items() if name not in IGNORED and given is not None]:
        raise RuntimeError(f"{type(module).__name__}: rank_values does not compute attention with {', '.join(other)}.")
    down_up = factors(linear)
    assert down_up is not None
    heads, queries, size = query.shape[1:]
    q, k, z = (t.transpose(1, 2).flatten(2) for t in (query, key, value))
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    causal = mask is None and queries > 1 and getattr(module, "is_causal", True)
    scale = size**-0.5 if scaling is None else float(scaling)
    values = (z[..., : linear.rank], *down_up[1:])
    y = lowrank_attention.chunked(
        (q, None, None), (k, None, None), values, mask, heads, key.shape[1], scale, causal
    )
    return y.unflatten(-1, (heads, size)), None


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pays(linear: nn.Module, size: int) -> bool:
    """Whether z, filled up to whole heads, is smaller than the values."""
    if not isinstance(linear, LowRankLinear) or factors(linear) is None:
        return False
    return linear.rank + -linear.rank % size < linear.out_features


def register(model: Any) -> None:
    """Let `model` attend through `attend`. Raises ValueError for one without transformers' attention interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Every model that attends through the interface does so through `attend` while this is open."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    functions["sdpa"] = attend
    try:
        yield
    finally:
        del functions["sdpa"]  # what is left is the library's own
