"""Least squares is the least, elimination's costs are the errors that it predicts, bias keeps the mean."""

import pytest
import torch

from compressor.repair import eliminate, least_squares, mean_bias

K, N, T = 24, 10, 400


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(K) + 0.1 * torch.randn(K, K, generator=generator, dtype=torch.float64)
    a = torch.randn(T, K, generator=generator, dtype=torch.float64) @ mix + 0.5
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    return weight, a


def error(weight, a, keep, stored, importance=None):
    rows = (a @ weight.T - a[:, keep] @ stored.double().T).square().mean(0)
    return (rows * (1 if importance is None else importance)).sum().item()


def test_least_squares_is_what_a_solver_finds(case):
    weight, a = case
    keep = torch.arange(0, K, 2)
    expected = torch.linalg.lstsq(a[:, keep], a @ weight.T).solution.T
    found = least_squares(weight, a.T @ a / T, keep, ridge=0)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_keeping_everything_changes_nothing(case):
    weight, a = case
    found = least_squares(weight, a.T @ a / T, torch.arange(K))
    torch.testing.assert_close(found.double(), weight, atol=1e-5, rtol=1e-5)


def test_elimination_predicts_the_error_of_what_is_left(case):
    weight, a = case
    importance = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = a.T @ a / T
    order, cost = eliminate(weight, gram, importance, at_once=1)
    assert order.sort().values.tolist() != order.tolist() and len(order.unique()) == K - 1 and len(cost) == K
    assert (cost.diff() > 0).all()
    for gone in (1, 6, 15):
        keep = torch.tensor(sorted(set(range(K)) - set(order[:gone].tolist())))
        found = error(weight, a, keep, least_squares(weight, gram, keep), importance)
        assert found == pytest.approx(cost[gone].item(), rel=0.02)


def test_elimination_finds_what_is_redundant(case):
    weight, a = case
    a = a.clone()
    a[:, 5] = 2 * a[:, 9] - a[:, 3]  # one of the three is for nothing, however large
    order, cost = eliminate(weight, a.T @ a / T, at_once=1)
    assert order[0].item() in (3, 5, 9) and cost[1] < 0.1 * cost[2]


def test_several_at_once_cost_what_they_cost_together(case):
    weight, a = case
    order, cost = eliminate(weight, a.T @ a / T, at_once=4, least=8)
    assert len(order) == 16 and len(cost) == 17
    keep = torch.tensor(sorted(set(range(K)) - set(order.tolist())))
    assert error(weight, a, keep, least_squares(weight, a.T @ a / T, keep)) == pytest.approx(cost[-1].item(), rel=0.02)


def test_bias_keeps_the_mean_of_the_output(case):
    weight, a = case
    keep = torch.arange(0, K, 3)
    before = (a @ weight.T).mean(0)
    after = (a[:, keep] @ weight[:, keep].T).mean(0) + mean_bias(weight, a.mean(0), keep).double()
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_nothing_to_eliminate(case):
    weight, a = case
    order, cost = eliminate(weight, a.T @ a / T, least=K)
    assert order.tolist() == [] and cost.tolist() == [0.0]


def test_dead_channels_are_no_obstacle():
    gram = torch.zeros(4, 4)
    order, cost = eliminate(torch.ones(2, 4), gram)
    assert len(order) == 3 and cost.isfinite().all()
    assert least_squares(torch.ones(2, 4), gram, torch.tensor([0, 1])).isfinite().all()
