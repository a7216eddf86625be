"""Statistics are running reductions: any cut and any order of merging give the same value."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressor.statistics import (
    AbsMax,
    BlockNoise,
    ChannelAbsMax,
    ChannelAbsMean,
    ChannelMean,
    ChannelMinMax,
    ChannelSquare,
    Gram,
    Statistic,
    TokenSample,
)

KINDS = [ChannelSquare, AbsMax, ChannelMean, ChannelAbsMean, ChannelMinMax, ChannelAbsMax, BlockNoise]
EXACT = (AbsMax, ChannelMinMax, ChannelAbsMax)
DEFINITION = {
    ChannelSquare: lambda x: x.double().square().mean(0).float(),
    AbsMax: lambda x: x.abs().max(),
    ChannelMean: lambda x: x.double().mean(0).float(),
    ChannelAbsMean: lambda x: x.double().abs().mean(0).float(),
    ChannelMinMax: lambda x: torch.stack((x.min(0).values, x.max(0).values)),
    ChannelAbsMax: lambda x: x.abs().max(0).values,
    BlockNoise: lambda x: torch.stack([rounding_error(row) for row in x]).square().mean(0).float(),
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def rounding_error(block: torch.Tensor) -> torch.Tensor:
    """Of one block of 16 with its largest value on 6, by looking for the nearest of all values."""
    scaled = block.double() / (block.double().abs().max() / 6)
    grid = torch.cat([-E2M1, E2M1])
    nearest = grid[(scaled.unsqueeze(-1) - grid).abs().argmin(-1)]
    return (nearest - scaled) * block.double().abs().max() / 6


def reduce(kind: type[Statistic], *parts: torch.Tensor) -> Statistic:
    statistic = kind.start(parts[0].shape[1])
    for part in parts:
        statistic.add(part)
    return statistic


def inputs(count: int = 130, features: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Scales over six decades, where a naive running mean loses digits.
    return torch.randn(count, features, generator=generator) * torch.logspace(-3, 3, features)


@pytest.mark.parametrize("kind", KINDS)
def test_value_is_the_definition(kind):
    x = inputs()
    torch.testing.assert_close(reduce(kind, x).value(), DEFINITION[kind](x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (63,), (64, 65), (1, 2, 129), (0, 130)])
def test_splitting_changes_nothing(kind, cuts):
    x = inputs()
    whole, split = reduce(kind, x), reduce(kind, *x.tensor_split(cuts))
    assert split.tokens == whole.tokens == 130
    torch.testing.assert_close(split.value(), whole.value(), rtol=0 if kind in EXACT else 2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_associative_and_commutative(kind):
    x = inputs()
    parts = x.tensor_split((1, 40, 100))
    expected = reduce(kind, x).value()
    for order in itertools.permutations(parts):
        left = reduce(kind, order[0])
        for part in order[1:]:
            left.merge(reduce(kind, part))
        a, b = reduce(kind, order[0]), reduce(kind, order[1])
        c, d = reduce(kind, order[2]), reduce(kind, order[3])
        a.merge(b)
        c.merge(d)
        a.merge(c)
        for merged in (left, a):
            torch.testing.assert_close(merged.value(), expected, rtol=0 if kind in EXACT else 2e-7, atol=0)
        torch.testing.assert_close(b.value(), reduce(kind, order[1]).value(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_neutral_element(kind):
    some = reduce(kind, inputs())
    expected = some.value()
    some.merge(kind.start(16))
    assert torch.equal(some.value(), expected)
    fresh = kind.start(16)
    fresh.merge(some)
    assert torch.equal(fresh.value(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_has_no_value(kind):
    with pytest.raises(ValueError, match="no token"):
        reduce(kind, torch.empty(0, 16)).value()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype(kind, dtype):
    x = (inputs() / 1000).to(dtype)
    value = reduce(kind, x).value()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, DEFINITION[kind](x.float()), rtol=1e-6, atol=0)


def test_values_outlive_further_adds():
    s = reduce(AbsMax, torch.tensor([[1.0]]))
    before = s.value()
    s.add(torch.tensor([[-5.0]]))
    assert before == 1 and s.value() == 5


def test_small_squares_survive_many_large_ones():
    """A float32 running sum would stop counting 1e-4² next to 1e4² after the first few thousand tokens."""
    s = ChannelSquare.start(1)
    s.add(torch.full((1, 1), 1e4))
    for _ in range(100):
        s.add(torch.full((1000, 1), 1.0))
    assert s.value().item() == pytest.approx((1e8 + 1e5) / 100_001, rel=1e-7)


def test_gram_is_the_second_moment_however_it_is_cut():
    x = inputs(200) / 100
    expected = (x.double().T @ x.double() / len(x)).float()
    scale = expected.diagonal().sqrt()
    for cuts in ((), (1, 77), (100,)):
        parts = [reduce(Gram, part) for part in x.tensor_split(cuts)]
        first, *others = parts
        for other in others:
            first.merge(other)
        assert ((first.value() - expected) / scale / scale[:, None]).abs().max() < 1e-6
        assert first.tokens == 200
    with pytest.raises(ValueError, match="no token"):
        Gram.start(16).value()


def test_a_sample_of_tokens_depends_on_no_order_and_no_cut():
    x = inputs(700)
    whole = reduce(TokenSample, x).value()
    assert whole.shape == (TokenSample.SIZE, 16)
    left, right = reduce(TokenSample, x[:40]), reduce(TokenSample, x[40:].flip(0))
    right.merge(left)
    assert torch.equal(right.value(), whole)
    rows = {tuple(row) for row in x.bfloat16().float().tolist()}
    assert all(tuple(row) in rows for row in whole.tolist())
    # Not the first ones, nor the largest: about as many from each quarter of the tokens and of their sizes.
    where = torch.cdist(whole.double(), x.bfloat16().double()).argmin(1)
    assert all(16 <= int(((where >= q * 175) & (where < (q + 1) * 175)).sum()) <= 50 for q in range(4))
    sizes = x.norm(dim=1).argsort().argsort()[where]
    assert all(16 <= int(((sizes >= q * 175) & (sizes < (q + 1) * 175)).sum()) <= 50 for q in range(4))


def test_a_sample_of_few_tokens_is_all_of_them():
    x = inputs(5)
    assert sorted(reduce(TokenSample, x).value().tolist()) == sorted(x.bfloat16().float().tolist())
    with pytest.raises(ValueError, match="has seen no token"):
        TokenSample.start(3).value()
