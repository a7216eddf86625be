"""Budgets are met exactly, by ratios and by measured costs."""

import itertools

import pytest
import torch

from compressor.widths import alignment, apportion, cheapest, keep_ratios

OMEGA = torch.tensor([0.28, 0.11, 0.09, 0.08, 0.07, 0.09, 0.12, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("pruned", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("kappa", [0.0, 13.1072, 100.0])
def test_ratios_have_the_mean_that_is_asked_for_and_stay_in_bounds(pruned, kappa):
    ratios = keep_ratios(OMEGA, pruned, kappa, floor=0.1)
    assert ratios.mean().item() == pytest.approx(1 - pruned)
    assert ratios.max() <= 1 and ratios.min() >= 0.1 - 1e-12


def test_ratios_against_the_formula():
    y = 1 / (1 + torch.exp(-13.1072 * (OMEGA - OMEGA.mean())))
    torch.testing.assert_close(keep_ratios(OMEGA, 0.5), 0.5 * y / y.mean())


def test_a_block_that_turns_more_keeps_more():
    ratios = keep_ratios(OMEGA, 0.3)
    assert torch.equal(ratios.argsort(stable=True), OMEGA.argsort(stable=True))


def test_the_largest_ratio_is_short_of_everything_by_the_published_factor():
    assert keep_ratios(OMEGA, 0.2, kappa=100).max().item() == pytest.approx(0.8 * (1 + (1 / 0.8 - 1) / 1.05))


@pytest.mark.parametrize("total", [8, 20, 37, 90, 96])
def test_apportioned_exactly_within_bounds(total):
    quotas = [total * r / 8 for r in (3.0, 0.01, 0.5, 0.5, 1.2, 0.9, 0.9, 0.99)]
    kept = apportion(quotas, [12] * 8, total)
    assert sum(kept) == total and all(1 <= k <= 12 for k in kept)


def test_largest_remainder_is_within_one_of_every_quota():
    assert apportion([2.5, 3.4, 1.1], [12] * 3, 7) == [3, 3, 1]


def test_no_room_is_said():
    with pytest.raises(ValueError, match="allowed are 2 to 8"):
        apportion([1, 1], [4, 4], 9)
    with pytest.raises(ValueError, match="there are 4"):
        cheapest([torch.zeros(5)], 5)


def test_cheapest_is_the_least_of_all_removals_for_convex_costs():
    generator = torch.Generator().manual_seed(0)
    costs = [torch.cat((torch.zeros(1), torch.rand(4, generator=generator).sort().values.cumsum(0))) for _ in range(3)]
    for total in range(13):
        found = cheapest(costs, total)
        best = min(
            sum(c[r].item() for c, r in zip(costs, removed, strict=True))
            for removed in itertools.product(range(5), repeat=3)
            if sum(removed) == total
        )
        assert sum(found) == total
        assert sum(c[r].item() for c, r in zip(costs, found, strict=True)) == pytest.approx(best)


def test_costs_that_fall_after_a_rise_are_seen():
    assert cheapest([torch.tensor([0.0, 5.0, 1.0]), torch.tensor([0.0, 2.0, 4.0])], 2) == [2, 0]


def test_alignment():
    assert alignment(1536, None) == 128
    assert alignment(14336, None) == 128
    assert alignment(96, None) == 8
    assert alignment(97, None) == 1
    assert alignment(96, 32) == 32
    with pytest.raises(ValueError, match="align 64 does not divide its width 96; use one of 32, 16"):
        alignment(96, 64)
