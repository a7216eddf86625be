"""Searches for sparsities: the budget, that they better what they start from, and the recipe's way to them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from compressor import Recipe, compress
from compressor.errors import RecipeError
from compressor.progress import Silent
from compressor.sparse import SparseLinear
from compressor.sparsity import Choices
from compressor.sparsity_search import MOST, evolve, fitted, greedy, trials

SIZES = [64 * 64, 32 * 64, 32 * 64, 64 * 64, 96 * 64, 96 * 64, 64 * 96]  # grouped: k and v are half of q


def share(sparsities, sizes):
    return sum(s * w for s, w in zip(sparsities, sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize("target", [0.0, 0.033, 0.5, 0.87, MOST])
def test_greedy_meets_the_budget_and_takes_the_cheap_layer_first(target):
    slopes = [3.0, 1.0, 1.0, 3.0, 2.0, 2.0, 9.0]
    calls = 0

    def error(s):
        nonlocal calls
        calls += 1
        return sum(c * w * x**2 for c, w, x in zip(slopes, SIZES, s, strict=True))

    found = greedy(SIZES, target, error)
    assert abs(share(found, SIZES) - target) < 1e-12 and max(found) <= MOST + 1e-12 and min(found) >= 0
    assert error(found) <= error([target] * 7)
    if target == 0.5:  # of squares the best is s_i ∝ 1 / slope, below MOST
        assert found[1] > found[4] > found[0] > found[6]
        assert error(found) < 0.75 * error([target] * 7) and calls < 3 * 0.5 / 0.05 * 7


def test_greedy_is_not_worse_than_equal_sparsities_where_steps_mislead():
    """A first step of layer 1 is dear and those behind it are free, so that steps go to layer 0 for too long."""

    def error(s):
        return 0.01 * min(s[0], 0.3) + max(0.0, s[0] - 0.3) + 2 * min(s[1], 0.05)

    assert error([0.6, 0.0]) > error([0.3, 0.3]) and greedy([10, 10], 0.3, error) == [0.3, 0.3]


def test_greedy_counts_costs_by_the_weight():
    found = greedy([100, 1000], 0.4, lambda s: 4 * 100 * s[0] ** 2 + 1000 * s[1] ** 2)
    assert abs(found[0] - found[1] / 4) < 0.051  # the best, to a step


def test_fitted_moves_all_by_one_amount_and_keeps_the_mean():
    weights = torch.tensor([4.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    found = fitted(torch.tensor([0.2, -3.0, 0.5, 2.0], dtype=torch.float64), weights, 0.5)
    assert found[1] == 0 and found[3] == MOST and torch.isclose(found[2] - found[0], torch.tensor(0.3).double())
    assert abs((found * weights).sum() / weights.sum() - 0.5) < 1e-12


def evolution(start, cost, seed=0, alphas=False, population=12, generations=8, groups=()):
    sizes = {name: 100 * (i + 1) for i, name in enumerate(start)}
    generator = torch.Generator().manual_seed(seed)
    return sizes, evolve(start, sizes, cost, generator, population, generations, alphas, groups)


def test_evolution_betters_its_start_within_the_budget_the_same_way_each_time():
    start = {str(i): Choices(1.0, 0.5) for i in range(6)}
    calls = 0

    def cost(choices):
        nonlocal calls
        calls += 1
        return sum((i + 1) ** 2 * c.sparsity**2 for i, c in enumerate(choices.values()))

    sizes, (found, history) = evolution(start, cost)
    assert calls <= trials(12, 8)
    assert cost(found) == history[-1] < 0.97 * history[0] and history == sorted(history, reverse=True)
    assert abs(share([c.sparsity for c in found.values()], sizes.values()) - 0.5) < 1e-12
    assert {c.alpha for c in found.values()} == {1.0}
    assert evolution(start, cost)[1] == (found, history) != evolution(start, cost, seed=1)[1]
    mixed = {str(i): Choices(0.9, 0.5) for i in range(6)}
    _, (free, _) = evolution(mixed, lambda c: sum(one.alpha for one in c.values()), alphas=True)
    assert sum(c.alpha for c in free.values()) < 5.2 and min(c.alpha for c in free.values()) >= 0


def test_groups_move_together():
    """Half of 40 layers should have less, half more, which single genes find slowly."""
    start = {str(i): Choices(1.0, 0.5) for i in range(40)}
    groups = [[str(i) for i in range(40) if i % 2 == odd] for odd in (0, 1)]

    def cost(choices):
        return sum((c.sparsity - (0.3 if i % 2 else 0.7)) ** 2 for i, c in enumerate(choices.values()))

    ends = [evolution(start, cost, groups=g)[1][1][-1] for g in ((), groups)]
    assert ends[1] < 0.5 * ends[0]


def test_evolution_gives_back_a_start_that_nothing_beats():
    start = {"a": Choices(1.0, 0.3), "b": Choices(1.0, 0.6)}
    found = evolution(start, lambda c: 0.0 if c == start else 1.0)[1]
    assert found == (start, [0.0, 0.0, 0.0, 0.0])


class Notes(Silent):
    def __init__(self):
        self.said, self.units, self.total = "", 0, None

    def stage(self, name, total=None):
        if name == "search":
            self.total = total

    def advance(self, n=1):
        self.units += n if self.total is not None else 0

    def note(self, message):
        self.said += message


def made(tiny, tokenizer, text, **options):
    steps = [{"r_sparse": {"sparsity": 0.5, **options}}]
    chosen = Recipe.from_dict(
        {"calibration": {"windows": 3, "length": 64}, "steps": steps, "exports": ["safetensors"], "seed": 3}
    )
    notes = Notes()
    artifact = compress(tiny("llama"), chosen, tokenizer=tokenizer, data=text, measure=False, progress=notes)
    return artifact, artifact.record["steps"]["1 r_sparse"], notes


def read(report, model):
    sizes = {n: m.in_features * m.out_features for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    return share([report[n]["sparsity"] for n in sizes], sizes.values())


@pytest.mark.parametrize("start", ["uniform", "kl"])
def test_greedy_blocks_lose_less_than_equal_sparsities(tiny, tiny_tokenizer, text, start):
    artifact, report, notes = made(tiny, tiny_tokenizer, text, allocation="greedy", start=start)
    ratio = float(notes.said.split("outputs is ")[1].split(" of")[0])
    assert ratio < 0.97
    model = artifact.model()
    assert abs(read(report, model) - 0.5) < (1e-9 if start == "uniform" else 1e-3)  # kl chooses among levels
    blocks = [
        share(*zip(*[(report[n]["sparsity"], m.weight.numel()) for n, m in tiny("llama").named_modules()
                     if isinstance(m, nn.Linear) and f"layers.{i}." in n], strict=True))
        for i in range(2)
    ]  # fmt: skip
    assert (max(blocks) - min(blocks) < 1e-9) == (start == "uniform")


@pytest.mark.parametrize("options", [{}, {"alpha": None}, {"start": "uniform", "alpha": 0.9}])
def test_an_evolved_model_is_not_further_than_its_start(tiny, tiny_tokenizer, text, options):
    search = {"allocation": "evolutionary", "population": 6, "generations": 3} | options
    artifact, report, notes = made(tiny, tiny_tokenizer, text, **search)
    before, after = map(float, re.findall(r"0\.\d+", notes.said))
    assert after <= before and notes.total == 2 * trials(6, 3)
    assert abs(read(report, artifact.model()) - 0.5) < 1e-3
    assert made(tiny, tiny_tokenizer, text, **search)[1] == report


def test_errors():
    for options, message in (
        ({"allocation": "evolutionary", "start": "uniform", "alpha": None}, "set start: kl, or give a number"),
        ({"search_windows": 0}, "search_windows 0 must be 1 or more"),
        ({"population": 0}, "population 0 must be 1 or more"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.from_dict({"steps": [{"r_sparse": options}]})
