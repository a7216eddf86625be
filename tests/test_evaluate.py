"""Figures against their definitions, on logits that are made here."""

import itertools
import math

import pytest
import torch

from compressor.evaluate import KL_WINDOWS, compare, compare_encoders, measure, paired_interval

V, L = 11, 9


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def runner(table):
    """A model whose logits are rows of table [V, V], chosen by the token alone."""
    return lambda ids: table[ids]


def test_by_definition(rng):
    windows = torch.randint(V, (3, L), generator=rng)
    ours, original = torch.randn(V, V, generator=rng), torch.randn(V, V, generator=rng)
    found = compare(runner(ours), windows, runner(original))
    nll = kl = same = 0.0
    for window in windows.tolist():
        for token, target in itertools.pairwise(window):
            q, p = ours[token].double().softmax(-1), original[token].double().softmax(-1)
            nll -= math.log(q[target])
            kl += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            same += p.argmax() == q.argmax()
    count = 3 * (L - 1)
    assert found["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found["kl"] == pytest.approx(kl / count, rel=1e-5)
    assert found["top1"] == pytest.approx(same / count)
    assert found["tokens"] == count and found["ppl_low"] < found["ppl"] < found["ppl_high"]


def test_a_model_against_itself_and_alone(rng):
    windows, table = torch.randint(V, (2, L), generator=rng), torch.randn(V, V, generator=rng)
    found = compare(runner(table), windows, runner(table))
    assert found["kl"] == 0 and found["top1"] == 1 and found["ppl"] == found["base_ppl"]
    alone = compare(runner(table), windows)
    assert (alone["base_ppl"], alone["kl"], alone["top1"]) == (None, None, None)


def test_kl_is_of_the_first_windows_only(rng):
    windows = torch.randint(V, (KL_WINDOWS + 3, L), generator=rng)
    found = measure(runner(torch.randn(V, V, generator=rng)), windows, runner(torch.randn(V, V, generator=rng)))
    assert len(found.kl) == len(found.agreement) == KL_WINDOWS and len(found.losses) == KL_WINDOWS + 3


def test_paired_interval_sees_what_separate_intervals_cannot(rng):
    """Windows differ by 1.0, the models by 0.05: only the difference of the same windows shows it."""
    hard = torch.rand(64, generator=rng, dtype=torch.float64)
    a, b = hard, hard + 0.05 + 0.01 * torch.rand(64, generator=rng, dtype=torch.float64)
    low, high = paired_interval(a, b)
    assert -0.06 < low <= high < -0.05
    low, high = paired_interval(a, a.flip(0))
    assert low < 0 < high


def test_encoders_by_cosine(rng):
    windows = torch.randint(V, (2, L), generator=rng)
    table = torch.randn(V, 6, generator=rng)
    assert compare_encoders(runner(table * 3), windows, runner(table))["cosine"] == pytest.approx(1)
    assert compare_encoders(runner(-table), windows, runner(table))["cosine"] == pytest.approx(-1)
