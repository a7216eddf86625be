"""Low-rank ops: what runs, a few tokens or heads at a time, against the references; full rank against dense layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.kernels import lowrank_attention as attention
from compressor.kernels import lowrank_ffn as ffn
from compressor.kernels import lowrank_linear as linear
from compressor.kernels import native

TOKENS = (1, 31, 33, 127, 513)
EXACT = 2e-6  # float32 sums in another order
BF16 = 5e-3  # bfloat16 results against a dense layer's
K, D = 96, 200


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def factors(n: int, k: int, r: int, seed: int, bias: bool = True) -> linear.Factors:
    g = rng(seed)
    down, up = torch.randn(r, k, generator=g) / k**0.5, torch.randn(n, r, generator=g) / r**0.5
    return down, up, torch.randn(n, generator=g) if bias else None


def full_rank(weight: Tensor, bias: Tensor | None) -> linear.Factors:
    """The singular value decomposition with nothing left out, in bfloat16."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    down, up = s.sqrt()[:, None] * v, u * s.sqrt()
    return down.bfloat16(), up.bfloat16(), None if bias is None else bias.bfloat16()


def ffn_inputs(gated: bool, bias: bool = True) -> tuple[Any, Any, Any]:
    return factors(D, K, 30, 1, bias), factors(D, K, 17, 2, bias) if gated else None, factors(K, D, 20, 3, bias)


def flat(first: Any, gate: Any, last: Any) -> list[Tensor | None]:
    return [*first, *(gate or (None, None, None)), *last]


@pytest.mark.parametrize("activation", ffn.ACTIVATIONS)
def test_ffn_in_chunks_is_the_reference(activation: str) -> None:
    for tokens, gated, bias in itertools.product(TOKENS, (False, True), (False, True)):
        given, x = ffn_inputs(gated, bias), torch.randn(tokens, K, generator=rng(tokens))
        expected = ffn.reference(x, *flat(*given), activation)
        assert off(ffn.chunked(x, *given, activation, tokens=32), expected) < EXACT
        assert off(ffn.lowrank_ffn(x, *flat(*given), activation), expected) < EXACT


def test_ffn_takes_dense_matrices_and_any_leading_sizes() -> None:
    first, _, last = ffn_inputs(False)
    dense = torch.randn(D, K, generator=rng(4))
    x = torch.randn(2, 3, 5, K, generator=rng(5))
    hidden = F.silu(F.linear(x, dense))
    expected = F.linear(F.linear(hidden, last[0]), last[1], last[2])
    found = ffn.lowrank_ffn(x, *flat((dense, None, None), None, last), "silu")
    assert found.shape == expected.shape and off(found, expected) < EXACT
    assert ffn.lowrank_ffn(x[:0], *flat(first, None, last), "silu").shape == (0, 3, 5, K)


@pytest.mark.parametrize("tokens", TOKENS)
def test_full_rank_is_the_dense_layer(tokens: int) -> None:
    g = rng(tokens)
    w1, w2, w3 = (torch.randn(shape, generator=g) / 8 for shape in ((D, K), (D, K), (K, D)))
    b = torch.randn(D, generator=g)
    x = torch.randn(tokens, K, generator=g).bfloat16()
    half = [w.bfloat16() for w in (w1, w2, w3)]
    dense = F.linear(F.silu(F.linear(x, half[0], b.bfloat16())) * F.linear(x, half[1]), half[2])
    given = full_rank(w1, b), full_rank(w2, None), full_rank(w3, None)
    x64, *w64 = (t.double() for t in (x, w1, w2, w3))
    exact = F.linear(F.silu(F.linear(x64, w64[0], b.double())) * F.linear(x64, w64[1]), w64[2])
    assert off(ffn.lowrank_ffn(x, *flat(*given), "silu"), exact) < (BF16 if native.built() else 1.5 * off(dense, exact))
    assert off(ffn.chunked(x, *given, "silu", tokens=64), exact) < 1.5 * off(dense, exact)  # bfloat16 between products
    gelu = F.linear(F.gelu(F.linear(x64, w64[0], b.double())), w64[2])
    assert off(ffn.lowrank_ffn(x, *flat(given[0], None, given[2]), "gelu"), gelu) < (BF16 if native.built() else 6e-3)
    y = linear.lowrank_linear(x, *full_rank(w1, b))
    assert off(y, F.linear(x, half[0], b.bfloat16())) < BF16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("features", [3, 384, 768, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_add_norm_is_its_twin(features: int, dtype: torch.dtype) -> None:
    from compressor.kernels.add_norm import add_norm_

    x, residual = (torch.randn(5, 7, features, generator=rng(s)).to("cuda", dtype) for s in (1, 2))
    weight, bias = (torch.randn(features, generator=rng(s)).to("cuda", dtype) for s in (3, 4))
    exact = F.layer_norm(x.double() + residual, weight.shape, weight.double(), bias.double(), 1e-5)
    again = x.clone()
    found = add_norm_(x, residual, weight, bias, 1e-5)
    assert found.dtype == dtype and off(found, exact) < {torch.float32: 1e-6}.get(dtype, 3e-3)
    assert found.data_ptr() == x.data_ptr() and torch.equal(found, add_norm_(again, residual, weight, bias, 1e-5))


def attention_inputs(seed: int, rows: int, queries: int, keys: int, heads: int, groups: int, size: int, ranked: str):
    """q, k, v as (tensor, up, bias), those named in `ranked` in rank space."""
    g, given = rng(seed), []
    for name, length, count, rank in (("q", queries, heads, 12), ("k", keys, groups, 10), ("v", keys, groups, 9)):
        if name in ranked:
            x, up = torch.randn(rows, length, rank, generator=g), torch.randn(count * size, rank, generator=g) / 3
            given.append((x, up, torch.randn(count * size, generator=g)))
        else:
            given.append((torch.randn(rows, length, count * size, generator=g), None, None))
    return given


def masks(rows: int, queries: int, keys: int) -> list[Tensor | None]:
    """None, padding on the left and on the right, a row of nothing else, added numbers."""
    lengths = torch.randint(0, keys + 1, (rows, 1, 1, 1), generator=rng(9))
    place = torch.arange(keys)
    right = (place < lengths).expand(rows, 1, queries, keys)
    left = (place >= keys - lengths).expand(rows, 1, queries, keys)
    return [None, right, left, torch.randn(rows, 1, queries, keys, generator=rng(8))]


@pytest.mark.parametrize("ranked", ("qkv", "v", "kv", ""))
def test_attention_in_chunks_is_the_reference(ranked: str) -> None:
    shapes = [(3, 33, 33, 6, 6, 8), (2, 31, 31, 6, 2, 16), (2, 1, 127, 6, 3, 8), (1, 5, 63, 4, 1, 8)]
    for (rows, queries, keys, heads, groups, size), causal in itertools.product(shapes, (False, True)):
        q, k, v = attention_inputs(1, rows, queries, keys, heads, groups, size, ranked)
        for mask in masks(rows, queries, keys):
            last = (mask, heads, groups, size**-0.5, causal)
            tensors = [t[i] for i in range(3) for t in (q, k, v)]
            expected = attention.reference(*tensors, *last)
            assert off(attention.lowrank_attention(*tensors, *last), expected) < EXACT
            assert off(attention.chunked(q, k, v, *last, lifted_bytes=1 << 12), expected) < EXACT


def test_values_are_absorbed_where_that_is_less_work() -> None:
    one = attention_inputs(1, 1, 1, 513, 6, 2, 16, "v")[2]
    assert attention._absorbs(one, 1, 513, 6, 2, 16) and not attention._absorbs(one, 513, 513, 6, 2, 16)
    assert not attention._absorbs((one[0], None, None), 1, 513, 6, 2, 16)
