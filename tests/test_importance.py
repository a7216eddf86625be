"""Scores against their formulas, and what each of them may and may not depend on."""

from dataclasses import replace

import pytest
import torch

from compressor.importance import SCORES, Channels, scores

K, N, H = 12, 6, 8


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(200, K, generator=generator) * torch.rand(K, generator=generator) + 0.3
    down = torch.randn(N, K, generator=generator)
    gate, up = torch.randn(K, H, generator=generator), torch.randn(K, H, generator=generator)
    own = torch.arange(K)
    return Channels(down, a.T @ a / 200, a.mean(0), ((gate, own), (up, own)))


def score(kind, of, seed=0):
    return scores(kind, of, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [k for k in SCORES if k != "random"])
def test_a_permutation_of_the_channels_is_one_of_the_scores(kind):
    of = case()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    gate, up = (w for w, _ in of.producers)
    own = torch.arange(K)
    moved = Channels(
        of.down[:, order], of.gram[order][:, order], of.mean[order], ((gate[order], own), (up[order], own))
    )
    torch.testing.assert_close(score(kind, moved), score(kind, of)[order], rtol=1e-4, atol=1e-6)


def test_formulas():
    of = case()
    rms = of.gram.diagonal().sqrt()
    torch.testing.assert_close(score("out_energy", of), of.down.norm(dim=0) * rms)
    torch.testing.assert_close(score("wanda_sp", of), of.down.abs().mean(0) * rms)
    torch.testing.assert_close(
        score("flap", of), (of.gram.diagonal() - of.mean**2) * of.down.square().sum(0), rtol=1e-4, atol=1e-6
    )
    (gate, _), (up, _) = of.producers
    terms = (of.down.abs() * rms, gate.T.abs(), up.T.abs())
    expected = rms * sum((m / m.sum(1, keepdim=True)).sum(0) for m in terms)
    torch.testing.assert_close(score("cfsp_rel", of), expected)


def test_the_released_score_ranks_activations_alone():
    of = case()
    assert torch.equal(score("cfsp_code", of).argsort(), of.gram.diagonal().argsort())
    assert not torch.equal(score("out_energy", of).argsort(), of.gram.diagonal().argsort())


def test_obs_sees_that_one_channel_can_stand_for_another():
    of = case()
    a = torch.randn(300, K, generator=torch.Generator().manual_seed(1))
    a[:, 4] = a[:, 7]
    twins = Channels(of.down, a.T @ a / 300, a.mean(0))
    ranked = score("obs", twins).argsort().tolist()
    assert ranked[0] in (4, 7)  # either stands for the other, which then stays
    assert ranked.index(11 - ranked[0]) > 5


def test_obs_leaves_alone_what_stays_anyway():
    of = case()
    limited = score("obs", replace(of, least=8))
    assert (limited == K).sum() == 8 and limited.unique().numel() == 5


def test_a_fused_producer_counts_all_rows_of_a_channel():
    of = case()
    (gate, own), (up, _) = of.producers
    fused = Channels(of.down, of.gram, of.mean, ((torch.cat((gate, up)), torch.cat((own, own))),))
    torch.testing.assert_close(score("magnitude", fused), score("magnitude", of))


def test_random_is_the_generators():
    assert torch.equal(score("random", case(), 5), score("random", case(1), 5))
    assert not torch.equal(score("random", case(), 5), score("random", case(), 6))
