"""compressor::lowrank_attention — softmax(q kᵀ · scale + mask) v, where any of q, k, v may come in rank space.

Contract, all on one device; B rows, S queries, P keys, H heads, G key-value heads (G divides H), E head size, R ranks:
    query    [B, S, Rq] with query_up [H E, Rq], query_bias [H E]; [B, S, H E] without
    key      [B, P, Rk] with key_up   [G E, Rk], key_bias   [G E]; [B, P, G E] without
    value    [B, P, Rv] with value_up [G E, Rv], value_bias [G E]; [B, P, G E] without
    mask     bool (True: attend) or float (added) that expands to [B, H, S, P]; optional
    causal   query s sees keys up to s + P - S
    Where a mask of yes and no, causal or not, leaves a query nothing to see, y is 0, as it is in torch.
    y        [B, S, H E] in the dtype of query
What stands between lifting and scores (rotary embeddings, norms of queries and keys) is done by the caller, who then
gives that one lifted. `reference` is the specification and lifts everything; `chunked` lifts a few rows and heads at a
time for torch's fused attention; for a few queries it does not lift values where that is less work, (p v) upᵀ being
p (v upᵀ).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

# What of q, k and v is lifted at a time; on a GPU, where pieces are launches, the least is never parted.
LIFTED_BYTES, LEAST_LIFTED_BYTES, CPU_LIFTED_BYTES = 64 << 20, 16 << 20, 4 << 20
FEW_QUERIES = 16  # whose scores may be held
Given = tuple[Tensor, Tensor | None, Tensor | None]  # a tensor, and how it is lifted


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_up: Tensor | None,
    key_up: Tensor | None,
    value_up: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    q = _heads(_lifted((query, query_up, query_bias)), heads)
    k, v = (
        _heads(_lifted(given), kv_heads).repeat_interleave(heads // kv_heads, 1)
        for given in ((key, key_up, key_bias), (value, value_up, value_bias))
    )
    out = _weights(q @ k.mT * scale, _seen(mask, causal, q.shape[2], k.shape[2], q)) @ v
    return out.transpose(1, 2).flatten(2)


def _lifted(given: Given, rows: slice | None = None) -> Tensor:
    """[B, P, R] -> features `rows` (None: all) of [B, P, heads * E]; what is not in rank space as it is."""
    x, up, bias = given
    if rows is not None:
        x, up, bias = (x[..., rows], None, None) if up is None else (x, up[rows], None if bias is None else bias[rows])
    if up is None:
        return x
    lifted = F.linear(x.flatten(0, 1), up.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return lifted.view(*x.shape[:2], -1)  # as a matrix x may be columns of a wider one, without a copy


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _seen(mask: Tensor | None, causal: bool, queries: int, keys: int, like: Tensor) -> Tensor | None:
    """Mask and triangle as one: bool, or numbers where the mask is of numbers."""
    if not causal:
        return mask
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    if mask is None or mask.dtype == torch.bool:
        return triangle if mask is None else mask & triangle
    return mask.masked_fill(~triangle, torch.finfo(mask.dtype).min)


def _weights(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax of what is seen, in float32 at least."""
    wide = scores.float() if scores.dtype.itemsize == 2 else scores
    if seen is not None and seen.dtype == torch.bool:
        p = wide.masked_fill(~seen, torch.finfo(wide.dtype).min).softmax(-1)
        return p.masked_fill(~seen.any(-1, keepdim=True), 0).to(scores.dtype)
    return (wide if seen is None else wide + seen).softmax(-1).to(scores.dtype)


def pieces(rows: int, lifted_bytes: int, gpu: bool, narrow: bool = False) -> list[slice]:
    """Rows to take together where a row's lifted q, k and v take so many bytes; at least one piece.

    On a GPU in three, which hold as much as the context does, or in two where the whole context is not held (`narrow`),
    unless the bytes ask for more or fewer.
    """
    total = rows * lifted_bytes
    if gpu:
        count = max(-(-total // LIFTED_BYTES), min(2 if narrow else 3, total // LEAST_LIFTED_BYTES))
    else:
        count = -(-total // CPU_LIFTED_BYTES)
    step = max(-(-rows // max(count, 1)), 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


@torch.no_grad()
def chunked(
    query: Given,
    key: Given,
    value: Given,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    lifted_bytes: int | None = None,
) -> Tensor:
    """`reference`, with at most about `lifted_bytes` of lifted q, k and v at a time; without gradients."""
    q = query[0]
    rows, queries, keys = q.shape[0], q.shape[1], key[0].shape[1]
    size = (q if query[1] is None else query[1]).shape[-1 if query[1] is None else 0] // heads
    shared = heads // kv_heads
    if _absorbs(value, queries, keys, heads, kv_heads, size):
        return _absorbed(query, key, value, mask, heads, kv_heads, scale, causal)
    limit = lifted_bytes or (CPU_LIFTED_BYTES if q.device.type == "cpu" else LIFTED_BYTES)
    a_head = size * (shared * queries + 2 * keys) * q.element_size()  # of one key-value head and its queries, one row
    groups = next((g for g in range(kv_heads, 1, -1) if kv_heads % g == 0 and g * a_head <= limit), 1)
    batch = max(1, limit // (groups * a_head))
    if groups == kv_heads and batch >= rows:
        found = _attention(
            _heads(_lifted(query), heads), _heads(_lifted(key), kv_heads), _heads(_lifted(value), kv_heads),
            mask, scale, causal,
        )  # fmt: skip
        return found.transpose(1, 2).flatten(2)
    y = q.new_empty((rows, queries, heads * size))
    for row in range(0, rows, batch):
        some = slice(row, row + batch)
        part = mask if mask is None or mask.dim() < 4 or mask.shape[0] == 1 else mask[some]
        for group in range(0, kv_heads, groups):
            wide = slice(group * shared * size, (group + groups) * shared * size)
            narrow = slice(group * size, (group + groups) * size)
            q_part = _heads(_lifted((query[0][some], *query[1:]), wide), groups * shared)
            k_part = _heads(_lifted((key[0][some], *key[1:]), narrow), groups)
            v_part = _heads(_lifted((value[0][some], *value[1:]), narrow), groups)
            heads_of = slice(group * shared, (group + groups) * shared)
            own = part[:, heads_of] if part is not None and part.dim() == 4 and part.shape[1] > 1 else part
            out = _attention(q_part, k_part, v_part, own, scale, causal)
            y[some, :, wide].unflatten(-1, (-1, size)).copy_(out.transpose(1, 2))
    return y


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """torch's fused attention; q [B, H, S, E], k and v with G heads."""
    if causal and (mask is not None or q.shape[2] != k.shape[2]):  # torch's triangle starts at the first key
        mask, causal = _seen(mask, True, q.shape[2], k.shape[2], q), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None:  # of which torch has no fused kernel on GPUs
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _absorbs(value: Given, queries: int, keys: int, heads: int, kv_heads: int, size: int) -> bool:
    """Whether weighing values in rank space, and lifting the result, takes fewer products than lifting them first."""
    if value[1] is None or queries > FEW_QUERIES:
        return False
    rank = value[1].shape[1]
    weighed = queries * heads * rank * (keys + size)
    return weighed < keys * kv_heads * size * rank + queries * heads * keys * size


def _absorbed(query, key, value, mask, heads, kv_heads, scale, causal) -> Tensor:
    """Scores as ever; then p · value, which all heads share, and one lift a query instead of one a key."""
    q, k = _heads(_lifted(query), heads), _heads(_lifted(key), kv_heads)
    values, up, bias = value
    shared = heads // kv_heads
    scores = torch.einsum("bgnse,bgpe->bgnsp", q.unflatten(1, (kv_heads, shared)), k).flatten(1, 2) * scale
    p = _weights(scores, _seen(mask, causal, q.shape[2], k.shape[2], q))
    weighed = (p.flatten(1, 2) @ values).unflatten(1, (heads, -1))  # [B, H, S, Rv]
    up = up.to(q.dtype).unflatten(0, (kv_heads, -1)).repeat_interleave(shared, 0)  # [H, E, Rv]
    y = weighed @ up.mT
    if bias is not None:  # times the sum of p, which is 1, or 0 where nothing is seen
        wide = bias.to(q.dtype).unflatten(0, (kv_heads, -1)).repeat_interleave(shared, 0)  # [H, E]
        y += p.sum(-1, keepdim=True) * wide[:, None]
    return y.transpose(1, 2).flatten(2)


@functools.wraps(reference)  # for its signature
def _default(*given):
    q, k, v = ((given[i], given[i + 3], given[i + 6]) for i in range(3))
    return chunked(q, k, v, *given[9:])


lowrank_attention = torch.library.custom_op("compressor::lowrank_attention", _default, mutates_args=())


@lowrank_attention.register_fake
def _(query, key, value, query_up, key_up, value_up, query_bias, key_bias, value_bias, mask, heads, *_):
    return query.new_empty((*query.shape[:-1], (query.shape[-1] if query_up is None else query_up.shape[0])))
