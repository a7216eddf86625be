"""Smooth: scales as the papers give them, an unchanged model, and less error once the model is quantized."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from compressor.calibrate import calibrate
from compressor.layers import build
from compressor.methods.quantize import Quantize
from compressor.methods.smooth import Smooth
from compressor.model import as_loaded, linears
from compressor.statistics import ChannelAbsMax, ChannelAbsMean

ROUNDED = 2.0**-8  # how far a scale moves so that its norm is a bf16 value


def tokens(seed: int = 1, count: int = 4) -> torch.Tensor:
    return torch.randint(4, 256, (count, 24), generator=torch.Generator().manual_seed(seed))


def working_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def run(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=windows)[0]


def with_outliers(model: nn.Module) -> nn.Module:
    """What large models have: a few channels after each norm are 30 times the others."""
    for name, module in model.named_modules():
        if "layernorm" in name:
            weight = module.weight.detach().clone()
            weight[[5, 40]] *= 30
            module.weight = nn.Parameter(weight)
    return model


def folded(model: nn.Module, method: Smooth) -> tuple[nn.Module, dict[str, Any]]:
    changed = working_copy(model)
    return changed, method.fold(changed, calibrate(changed, tokens(), method.fold_needs()))


def quantized(model: nn.Module, quantize: Quantize) -> nn.Module:
    changed = working_copy(model)
    layers = linears(changed)
    plans = quantize.plan(layers, calibrate(changed, tokens(), quantize.needs()))
    for name, layer in layers.items():
        changed.set_submodule(name, build(quantize.apply(layer, plans[name])))
    return changed


def error(model: nn.Module, original: nn.Module, seed: int = 9) -> float:
    """Relative, on tokens that calibration did not see."""
    expected = run(original, tokens(seed))
    return ((run(model, tokens(seed)) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rule", ["smoothquant", "awq"])
def test_the_model_computes_what_it_did(tiny, family, rule):
    model = as_loaded(tiny(family)).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    changed, report = folded(model, Smooth(rule=rule, weights="int4", group_size=16))
    expected = run(model, tokens(3))
    assert (run(changed, tokens(3)) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items()), "the original is untouched"
    assert {n for site in report.values() for n in site["linears"]} == set(linears(model)), "every linear is reported"
    done = [site for site in report.values() if site["kind"] != "none"]
    assert done and json.loads(json.dumps(report)) == report
    scaled = [site["linears"][0] for site in done if site["scale_max"] > site["scale_min"]]
    assert scaled
    assert not any(torch.equal(changed.get_submodule(n).weight, before[f"{n}.weight"]) for n in scaled)


def test_smoothquant_is_the_equation(tiny):
    model = as_loaded(with_outliers(tiny("llama"))).model
    x = calibrate(model, tokens(), {ChannelAbsMax}).value("model.layers.0.mlp.up_proj", ChannelAbsMax)
    layer = model.get_submodule("model.layers.0.mlp")
    w = torch.maximum(layer.gate_proj.weight.abs().amax(0), layer.up_proj.weight.abs().amax(0))
    for alpha in (0.0, 0.5, 0.8, 1.0):
        expected = x**alpha / w ** (1 - alpha)
        expected = expected / (expected.max() * expected.min()).sqrt()
        changed, report = folded(model, Smooth(alpha=alpha))
        scale = (changed.get_submodule("model.layers.0.mlp").gate_proj.weight / layer.gate_proj.weight)[0]
        torch.testing.assert_close(scale, expected.detach(), rtol=ROUNDED, atol=0)
        norm = changed.get_submodule("model.layers.0.post_attention_layernorm").weight
        torch.testing.assert_close(
            norm, model.get_submodule("model.layers.0.post_attention_layernorm").weight / expected, rtol=ROUNDED, atol=0
        )
    assert report["model.layers.0.mlp.gate_proj"]["spread_after"] == pytest.approx(1, abs=ROUNDED), "alpha 1 levels x"
    assert report["model.layers.0.mlp.gate_proj"]["spread_before"] > 10


def test_awq_is_the_equation(tiny):
    model = as_loaded(with_outliers(tiny("llama"))).model
    name = "model.layers.0.mlp.gate_proj"
    mean = calibrate(model, tokens(), {ChannelAbsMean}).value(name, ChannelAbsMean)
    changed, report = folded(model, Smooth(rule="awq", weights="int4", group_size=16))
    alpha = report[name]["alpha"]
    assert 0 < alpha < 1, "with outliers some scaling helps"
    expected = mean**alpha
    expected = expected / (expected.max() * expected.min()).sqrt()
    scale = (changed.get_submodule(name).weight / model.get_submodule(name).weight)[0]
    torch.testing.assert_close(scale, expected, rtol=ROUNDED, atol=0)


@pytest.mark.parametrize(
    ("weights", "activations", "group"),
    [("int4", "none", 16), ("int4", "none", None), ("int8", "int8", None), ("nvfp4", "nvfp4", None),
     ("mxfp4", "mxfp4", None), ("fp8", "fp8", None)],
)  # fmt: skip
def test_awq_is_never_worse_on_its_objective(tiny, weights, activations, group):
    model = as_loaded(with_outliers(tiny("llama"))).model
    _, report = folded(model, Smooth("awq", weights=weights, activations=activations, group_size=group))
    sites = list(report.values())
    assert all(0 < s["error_after"] <= s["error_before"] < 1 for s in sites)
    assert all((s["error_after"] == s["error_before"]) == (s["alpha"] == 0) for s in sites)


def test_awq_leaves_alone_what_rounds_to_itself(tiny):
    """Weights that lie on the grid have no error to lower: alpha 0 is in the grid, and wins ties."""
    model = as_loaded(with_outliers(tiny("llama"))).model
    target = Quantize(weights="mxfp4", scales="absmax")
    for layer in linears(model).values():
        packed = target.apply(layer, target.plan({"layer": layer}, None)["layer"])
        layer.weight = nn.Parameter(build(packed).dequantize())
    changed, report = folded(model, Smooth("awq", weights="mxfp4"))
    assert all(s["alpha"] == s["error_before"] == s["error_after"] == 0 for s in report.values())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in changed.state_dict().items())
    assert folded(model, Smooth("awq", weights="int4"))[1]["model.layers.0.mlp.gate_proj"]["alpha"] > 0


@pytest.mark.parametrize(("weights", "activations"), [("int4", "none"), ("int8", "int8"), ("nvfp4", "nvfp4")])
def test_the_objective_is_the_output_error(tiny, weights, activations):
    """The estimate from channel squares and drawn tokens, against the quantized linear on the real tokens."""
    model = as_loaded(with_outliers(tiny("llama"))).model
    _, report = folded(model, Smooth("awq", weights=weights, activations=activations))
    quantize = Quantize(weights=weights, activations=activations, scales="absmax")
    for name, layer in linears(model).items():
        if name not in report or len(report[name]["linears"]) > 1:
            continue
        plan = quantize.plan({name: layer}, calibrate(model, tokens(), quantize.needs(), {name}))[name]
        x: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
        run(model, tokens())
        hook.remove()
        expected = layer(x[0]).detach()
        found = ((build(quantize.apply(layer, plan))(x[0]) - expected).norm() / expected.norm()).item()
        assert 0.6 < report[name]["error_before"] / found < 1.6


def test_smoothquant_helps_w8a8(tiny):
    model = as_loaded(with_outliers(tiny("llama"))).model
    quantize = Quantize(weights="int8", activations="int8")
    plain = error(quantized(model, quantize), model)
    smooth, _ = folded(model, Smooth(alpha=0.5))
    assert error(quantized(smooth, quantize), model) < 0.6 * plain


@pytest.mark.parametrize(("weights", "activations", "group"), [("int4", "none", 32), ("int8", "int8", None)])
def test_awq_helps(tiny, weights, activations, group):
    model = as_loaded(with_outliers(tiny("llama"))).model
    quantize = Quantize(weights=weights, activations=activations, group_size=group)
    plain = error(quantized(model, quantize), model)
    smooth, _ = folded(model, Smooth("awq", weights=weights, activations=activations, group_size=group))
    assert error(quantized(smooth, quantize), model) < 0.9 * plain


@pytest.mark.parametrize("rule", ["smoothquant", "awq"])
def test_powers_of_two_change_no_bit_of_the_logits(tiny, rule):
    model = as_loaded(with_outliers(tiny("llama"))).model
    changed, report = folded(model, Smooth(rule, power_of_two=True, group_size=16))
    assert torch.equal(run(changed, tokens(3)), run(model, tokens(3)))
    ends = [site[end] for site in report.values() for end in ("scale_min", "scale_max")]
    assert all(torch.tensor(v).log2().frac() == 0 for v in ends) and max(ends) > 1


def test_a_tie_is_alpha_zero(tiny):
    """Powers of two near 1 round to 1, so that the first alphas of the grid are one scale: none is claimed."""
    _, report = folded(as_loaded(tiny("llama")).model, Smooth("awq", power_of_two=True))
    idle = [site for site in report.values() if site["scale_min"] == site["scale_max"] == 1]
    assert idle and all(site["alpha"] == 0 for site in idle)


def test_dead_channels_keep_a_scale_of_one(tiny):
    model = as_loaded(with_outliers(tiny("llama"))).model
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight = nn.Parameter(norm.weight.detach().index_fill(0, torch.tensor([3]), 0.0))
    for rule in ("smoothquant", "awq"):
        changed, _ = folded(model, Smooth(rule, group_size=16))
        gate, before = (m.get_submodule("model.layers.0.mlp.gate_proj").weight for m in (changed, model))
        assert torch.equal(gate[:, 3], before[:, 3]) and not torch.equal(gate, before)
        assert all(p.isfinite().all() for p in changed.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.5}, "alpha 1.5 must be from 0 to 1"), ({"weights": "int4", "activations": "int8"}, "do not go with")],
)
def test_refuses_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Smooth(**options)


@pytest.mark.parametrize("chosen", ["llama", "gemma", "opt"])
def test_smoothed_norms_stay_in_bf16(tiny, chosen):
    changed, report = folded(as_loaded(tiny(chosen)).model, Smooth(alpha=0.7))
    norms = {entry["producer"] for entry in report.values() if entry["kind"] == "norm"}
    assert len(norms) == 4
    for name in norms:
        weight = changed.get_submodule(name).weight.detach()
        assert torch.allclose(weight.bfloat16().float(), weight, rtol=1e-6, atol=1e-6), name
