"""PMQ: the program against brute force and dynamic programming, what an expert costs, whole runs on tiny models."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from compressor import Recipe, compress
from compressor.allocation import Choice, allocate
from compressor.calibrate import calibrate
from compressor.errors import RecipeError
from compressor.folder import load
from compressor.knapsack import exact
from compressor.layers import build
from compressor.methods.pmq import PMQ
from compressor.mixtures import mixtures
from compressor.model import as_loaded, linears
from compressor.sensitivity import output_fisher
from compressor.statistics import ChannelSquare, TokenSample

IDS = torch.randint(5, 288, (4, 48), generator=torch.Generator().manual_seed(1))


def program(seed, experts, widths=(1, 2, 3), weights=(12288,)):
    r = random.Random(seed)
    groups = {}
    for e in range(experts):
        size, cost = r.choice(weights), 10 ** r.uniform(-4, 0)
        groups[f"e{e}"] = [Choice(str(b), size * b // 8, cost * 4.0**-b * r.uniform(0.8, 1.2)) for b in widths]
    low, high = (sum(end(c.size_bytes for c in g) for g in groups.values()) for end in (min, max))
    return groups, low + int((high - low) * r.uniform(0.1, 0.9))


def total(groups, chosen):
    picked = [next(c for c in groups[n] if c.name == chosen[n]) for n in groups]
    return sum(c.size_bytes for c in picked), math.fsum(c.cost for c in picked)


@pytest.mark.parametrize("seed", range(12))
def test_dynamic_programming_is_brute_force(seed):
    groups, budget = program(seed, 1 + seed % 6, weights=(12288, 4096, 520))
    size, cost = total(groups, exact(groups, budget))
    combinations = itertools.product(*groups.values())
    best = min(math.fsum(c.cost for c in p) for p in combinations if sum(c.size_bytes for c in p) <= budget)
    assert size <= budget and cost == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("widths", [(1, 2, 3), (2, 4), (2, 4, 8)])
def test_the_solver_agrees_for_64_experts(widths):
    groups, budget = program(7, 64, widths)
    size, cost = total(groups, exact(groups, budget))
    found = allocate(groups, budget)
    assert size <= budget and found.size_bytes <= budget
    assert found.cost == pytest.approx(cost, rel=2e-6)


def test_budgets_that_cannot_be_met_or_are_too_large():
    groups, _ = program(1, 4)
    with pytest.raises(ValueError, match="smallest choices take"):
        exact(groups, 10)
    assert exact({f"g{i}": [Choice("a", 1 + i, 1.0), Choice("b", 10**9 + 7 * i, 0.0)] for i in range(9)}, 10**9) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": (2,)}, "two or more"),
        ({"choices": (2, 5)}, "choices has 5; allowed: 1, 2, 3, 4, 8"),
        ({"bits": 1.5, "choices": (2, 3)}, "bits is 1.5; allowed: 2 to 3"),
        ({"group_size": 24}, "power of two"),
        ({"uniform": "layer", "scope": "layer"}, "allowed: scope global"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PMQ(**options)


@pytest.fixture(scope="module")
def surveyed(tiny):
    """The working model, its experts' linears, calibration and gradients."""
    model = as_loaded(tiny("qwen2_moe")).model
    names = [n for n in linears(model) if ".experts." in n]
    calibration = calibrate(model, IDS, {ChannelSquare, TokenSample}, names)
    fisher = output_fisher(model, IDS, names, torch.Generator().manual_seed(0))
    return model, {n: linears(model)[n] for n in names}, calibration, fisher


@pytest.mark.parametrize(
    ("scope", "significance", "count"),
    [("layer", "kl", "codes"), ("global", "kl", "stored"), ("layer", "pmq", "stored"), ("global", "pmq", "codes")],
)
def test_the_budget_is_kept_and_used(surveyed, scope, significance, count):
    _, layers, calibration, fisher = surveyed
    method = PMQ(2.25, (1, 2, 3), count, scope, significance, group_size=32, rounding="nearest")
    found = method.survey(layers, calibration, fisher)
    codes, stored = found.bits_per_weight
    assert 2.25 - 3 / 16 < (codes if count == "codes" else stored) <= 2.25
    assert stored == pytest.approx(codes + 16 / 32)
    assert found.exact and len(found.layers) == 2
    for layer in found.layers.values():
        assert scope == "global" or sum(layer.bits) <= 2.25 * 8
        assert sum(layer.counts) == 2 * IDS.numel()
    assert count == "stored" or found.cost < found.uniform["2 bit"]
    packed = {n: method.place(*m.weight.shape).size_bytes for n, m in layers.items()}
    weights = sum(m.weight.numel() for m in layers.values())
    assert 8 * sum(packed.values()) / weights == pytest.approx(2.25 + (0.5 if count == "codes" else 0), abs=0.01)


def test_one_width_a_layer_for_servers(surveyed):
    """The best of all combinations of layers that fit; free experts are never worse."""
    _, layers, calibration, fisher = surveyed
    free, found = (
        PMQ(2.5, (1, 2, 3, 4), group_size=32, uniform=each).survey(layers, calibration, fisher)
        for each in ("expert", "layer")
    )
    assert all(len({*layer.bits}) == 1 for layer in found.layers.values())
    assert found.bits_per_weight[0] == 2.5 and found.exact and free.cost < found.cost
    assert len({layer.bits[0] for layer in found.layers.values()}) == 2  # two layers, of 2.5 bits together
    costs = [
        PMQ(2.5, (a, b), group_size=32, uniform="layer").survey(layers, calibration, fisher).cost
        for a, b in ((1, 4), (2, 3))
    ]
    assert found.cost == pytest.approx(min(costs))


def test_what_an_expert_costs_is_what_the_layer_loses(surveyed):
    """ε is the layer's output with one expert rounded, over all tokens: here measured by running the layer."""
    model, layers, calibration, _ = surveyed
    use = next(iter(calibration.uses.values()))
    method = PMQ(2.0, (1, 2, 3), significance="pmq", alpha=0, beta=0, group_size=32)
    nearest = {b: replace(m, rounding="nearest") for b, m in method._methods().items()}
    expert = int(use.counts.argmax())
    weighed = method._weigh(expert, use, layers, calibration, None, nearest)
    seen = []
    handle = use.view.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for window in IDS:
            model(input_ids=window[None], use_cache=False)
    handle.remove()
    x = torch.cat(seen)
    own = {n: layers[n] for n in use.view.linears(expert)}
    for b in (1, 3):
        plans = nearest[b].plan(own, calibration)
        held = {n: m.weight for n, m in own.items()}
        with torch.no_grad():
            before = use.view.module(x)
            for n, m in own.items():
                m.weight = torch.nn.Parameter(build(nearest[b].apply(m, plans[n])).dequantize(), False)
            after = use.view.module(x)
        for n, m in own.items():
            m.weight = held[n]
        before, after = (y if isinstance(y, torch.Tensor) else y[0] for y in (before, after))
        lost = (after - before).norm().item()
        assert weighed[b] == pytest.approx(lost, rel=0.15), "tokens are a sample and weights their mean"


def test_random_is_for_comparison(surveyed):
    _, layers, calibration, fisher = surveyed
    found = [
        PMQ(2.5, (2, 3), significance="random", seed=s, group_size=32).survey(layers, calibration, fisher)
        for s in (0, 0, 1)
    ]
    assert found[0].widths == found[1].widths != found[2].widths
    assert all(f.bits_per_weight[0] == 2.5 for f in found)


def test_what_is_no_expert_is_refused(surveyed):
    model, layers, calibration, fisher = surveyed
    everything = layers | {"model.layers.0.self_attn.q_proj": linears(model)["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(RecipeError, match=r'q_proj is no linear of an expert.*\["\*\.experts\.\*"\]'):
        PMQ(2.0, group_size=32).survey(everything, calibration, fisher)


def test_a_whole_run(tiny, tiny_tokenizer, prose, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(prose)
    step = {"targets": ["*.experts.*"], "bits": 2.0, "choices": [1, 2, 3, 4], "group_size": 32, "scope": "layer"}
    rest = {"targets": ["*"], "ignore": ["*.experts.*"], "weights": "int8"}
    chosen = {
        "calibration": {"windows": 3, "length": 32}, "exports": ["safetensors"],
        "steps": [{"pmq": step}, {"quantize": rest}],
    }  # fmt: skip
    model = tiny("mixtral", num_hidden_layers=1, num_local_experts=6)
    artifact = compress(model, Recipe.from_dict(chosen), tokenizer=tiny_tokenizer, data=text, measure=False)
    report = artifact.record["steps"]["1 pmq"]
    views = mixtures(as_loaded(model).model)
    assert set(report["experts"]) == set(views)
    for layer, view in views.items():
        bits = report["experts"][layer]["bits"]
        assert sum(bits) == 2 * len(view)
        for e, width in enumerate(bits):
            packed = [artifact.packed[n] for n in view.linears(e)]
            assert {p.attributes["bits"] for p in packed} == {width}
            assert all(p.tensors["weight_scale"].abs().max() > 0 for p in packed), "no expert is zeroed"
        idle = [f"{layer}.{e}" for e, n in enumerate(report["experts"][layer]["tokens"]) if not n]
        assert set(idle) <= set(report["unchosen"])
    assert len({w for layer in report["experts"].values() for w in layer["bits"]}) > 1
    assert "bits a weight" in report["summary"] and "with scales" in report["summary"]
    ids = IDS[:1]
    with torch.no_grad():
        rebuilt = load(artifact.save(tmp_path / "out")).model()(input_ids=ids).logits
        assert torch.equal(rebuilt, artifact.model()(input_ids=ids).logits) and rebuilt.isfinite().all()
