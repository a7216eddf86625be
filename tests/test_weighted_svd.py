"""The primitive against its theorem, for every metric; the forms of its factors; the update behind changed layers."""

import pytest
import torch

from compressor.weighted_svd import balanced, pivoted, shifted, weighted_svd

METRICS = ["none", "diagonal", "full"]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metric(kind, size, seed):
    """(what weighted_svd is given, the same as a matrix)"""
    x = normal(size, 3 * size, seed=seed) * torch.logspace(-1, 1, size, dtype=torch.float64)[:, None]
    full = x @ x.T / x.shape[1]
    if kind == "none":
        return None, torch.eye(size, dtype=torch.float64)
    return (full, full) if kind == "full" else (full.diagonal(), full.diagonal().diag())


def loss(error, outputs, inputs):
    return torch.trace(error.T @ outputs @ error @ inputs).item()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (31, 31)])
@pytest.mark.parametrize("outputs", METRICS)
@pytest.mark.parametrize("inputs", METRICS)
def test_the_loss_is_the_tail_of_the_spectrum(shape, outputs, inputs):
    weight = normal(*shape)
    (r, full_r), (c, full_c) = metric(outputs, shape[0], 1), metric(inputs, shape[1], 2)
    found = weighted_svd(weight, r, c)
    losses = found.losses()
    assert losses.shape == (min(shape) + 1,) and losses[-1] == 0
    for rank in (0, 1, 5, min(shape) - 1):
        a, b = found.factors(rank)
        assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
        assert loss(weight - a @ b, full_r, full_c) == pytest.approx(losses[rank].item(), rel=1e-4)
    a, b = found.factors(min(shape))
    assert (weight - a @ b).norm() / weight.norm() < 1e-5
    assert all(x >= y for x, y in zip(losses.tolist(), losses.tolist()[1:], strict=False))


def test_the_metric_of_the_inputs_beats_the_others_at_every_rank():
    weight, (gram, _) = normal(32, 48), metric("full", 48, 3)
    known = {"plain": None, "asvd": gram.diagonal().sqrt(), "inputs": gram}
    found = {name: weighted_svd(weight, None, c) for name, c in known.items()}
    for rank in range(1, 32):
        lost = {name: loss(weight - d.factors(rank)[0] @ d.factors(rank)[1], torch.eye(32).double(), gram)
                for name, d in found.items()}  # fmt: skip
        assert lost["inputs"] <= lost["asvd"] * (1 + 1e-9) and lost["inputs"] <= lost["plain"] * (1 + 1e-9)
    assert lost["inputs"] < 0.9 * lost["plain"]


def test_fewer_tokens_than_channels_is_optimal_on_what_was_seen():
    weight, x = normal(24, 40), normal(40, 9, seed=4)
    found = weighted_svd(weight.float(), None, (x @ x.T).float())
    a, b = found.factors(9)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    assert ((weight - a @ b) @ x).norm() / (weight @ x).norm() < 1e-3
    a, b = found.factors(4)
    best = torch.linalg.svdvals(weight @ x)[4:].square().sum()
    assert ((weight - a @ b) @ x).square().sum() == pytest.approx(best.item(), rel=1e-3)


def test_an_output_that_nothing_looks_at_is_still_finite():
    fisher = torch.rand(24, generator=torch.Generator().manual_seed(0))
    fisher[3] = 0
    a, b = weighted_svd(normal(24, 40), fisher, None).factors(10)
    assert torch.isfinite(a @ b).all() and (a @ b)[3].norm() < 1e3


@pytest.mark.parametrize("shape", [(24,), (24, 24)])
def test_a_layer_that_no_loss_looks_at_is_a_plain_one_without_loss(shape):
    """An expert that was never chosen has F = 0."""
    weight = normal(24, 40)
    found, plain = weighted_svd(weight, torch.zeros(shape), None), weighted_svd(weight)
    (a, b), (c, d) = found.factors(10), plain.factors(10)
    assert torch.allclose(a @ b, c @ d) and found.losses()[0] < 1e-20


def test_balanced_factors_are_the_same_product_in_a_range_that_half_precision_holds():
    a, b = normal(24, 6) * 1e9, normal(6, 40) * 1e-9
    up, down = balanced(a, b)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1)) and torch.allclose(up @ down, a @ b)
    assert torch.allclose(up.half().double() @ down.half().double(), a @ b, atol=0.02)


@pytest.mark.parametrize("shape", [(40, 24, 7), (24, 40, 23), (31, 31, 1)])
def test_the_pivoted_form_loses_nothing(shape):
    n, k, rank = shape
    a, b = normal(n, rank) * torch.logspace(0, 4, rank, dtype=torch.float64), normal(rank, k, seed=1)
    down, up, order = pivoted(a, b)
    assert down.shape == (rank, k) and up.shape == (n - rank, rank) and sorted(order.tolist()) == list(range(n))
    x = normal(k, 5, seed=2)
    z = down @ x
    assert torch.allclose(torch.cat((z, up @ z))[order], a @ b @ x, rtol=1e-9, atol=1e-9 * (a @ b @ x).abs().max())
    assert up.abs().max() < 8, "rows that elimination picks make the others with small coefficients"


def test_the_shifted_weight_makes_up_for_changed_inputs():
    weight, x0 = normal(24, 16), normal(16, 400, seed=1)
    mix = torch.eye(16).double() + 0.3 * normal(16, 16, seed=2)
    x = mix @ x0
    own, cross = x @ x.T / 400, x0 @ x.T / 400
    before = (weight @ x0 - weight @ x).norm()
    assert (weight @ x0 - shifted(weight, cross, own, 1e-9) @ x).norm() < 1e-6 * before  # the change can be undone
    assert torch.allclose(shifted(weight, own, own, 0.01), weight)  # nothing changed
    noisy = x0 + normal(16, 400, seed=3)
    own, cross = noisy @ noisy.T / 400, x0 @ noisy.T / 400
    after = (weight @ x0 - shifted(weight, cross, own, 1e-3) @ noisy).norm()
    assert after < 0.8 * (weight @ x0 - weight @ noisy).norm()
