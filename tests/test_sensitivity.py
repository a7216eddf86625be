"""The second-order estimate against the KL that is measured, and what a pass leaves behind."""

import dataclasses

import pytest
import torch
from torch import nn

from compressor.calibrate import calibrate
from compressor.errors import DataError, ModelError, NumericsError
from compressor.layers import build
from compressor.methods.quantize import Quantize
from compressor.model import as_loaded, linears
from compressor.sensitivity import _projection, costs, output_fisher
from compressor.statistics import ChannelSquare

METHODS = {"nvfp4": Quantize("nvfp4"), "int4": Quantize("int4", group_size=32)}


def windows_of(count=8, length=64):
    return torch.randint(4, 288, (count, length), generator=torch.Generator().manual_seed(1))


def generator():
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def outputs(model, windows):
    out = model(input_ids=windows)
    return out.logits.double().log_softmax(-1) if hasattr(out, "logits") else out.last_hidden_state.double()


def measured(model, windows, name, weight, before):
    """Mean KL a token, or 1 − cosine of an encoder, with one linear's weight replaced."""
    layer = model.get_submodule(name)
    original, layer.weight = layer.weight, nn.Parameter(weight)
    after = outputs(model, windows)
    layer.weight = original
    if hasattr(model, "lm_head"):
        return (before.exp() * (before - after)).sum(-1).mean().item()
    return (1 - torch.cosine_similarity(before, after, dim=-1)).mean().item()


def compared(model, windows):
    """{(linear, format): (predicted, measured)}"""
    layers = linears(model)
    fisher = output_fisher(model, windows, list(layers), generator()).weights
    calibration = calibrate(model, windows, {ChannelSquare})
    before, found = outputs(model, windows), {}
    for name, layer in layers.items():
        h = calibration.value(name, ChannelSquare)
        decoded = {}
        for choice, method in METHODS.items():
            plan = dataclasses.replace(method.plan({name: layer}, None)[name], importance=h)
            decoded[choice] = build(method.apply(layer, plan)).dequantize()
        predicted = costs(layer.weight, decoded, h, fisher[name])
        for choice, weight in decoded.items():
            found[name, choice] = predicted[choice], measured(model, windows, name, weight, before)
    return found


def rank_correlation(pairs):
    ranks = torch.tensor(pairs, dtype=torch.float64).T.argsort(-1).argsort(-1).double()
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_predicted_kl_is_the_measured_kl_within_a_factor_two(tiny, architecture):
    """Every linear alone. The mean of the squared output gradient, without the sum over tokens, is 0.05 at v_proj."""
    found = compared(as_loaded(tiny(architecture)).model, windows_of())
    ratios = {key: predicted / real for key, (predicted, real) in found.items()}
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
    typical = torch.tensor(list(ratios.values())).log().mean().exp()
    assert 0.8 < typical < 1.25  # one half left out, or a mean over the wrong tokens, is not noise
    assert rank_correlation(list(found.values())) > 0.9


def test_experts_count_how_often_they_are_chosen(tiny):
    model = as_loaded(tiny("mixtral")).model
    experts = [n for n in linears(model) if ".experts." in n and n.startswith("model.layers.1.")]
    windows = windows_of()
    fisher = output_fisher(model, windows, experts, generator()).weights
    calibration = calibrate(model, windows, {ChannelSquare}, experts)
    before = outputs(model, windows)
    predicted, real = 0.0, 0.0
    noise = torch.Generator().manual_seed(2)
    for name in experts:
        weight = model.get_submodule(name).weight.detach()
        changed = weight + 1e-3 * torch.randn(weight.shape, generator=noise)
        predicted += costs(weight, {"q": changed}, calibration.value(name, ChannelSquare), fisher[name])["q"]
        real += measured(model, windows, name, changed, before)
    assert 0.7 < predicted / real < 1.4  # a mean over the expert's own tokens is about twice as much


def test_the_figure_is_that_of_the_definition(tiny):
    """Against autograd's own weight gradient, drawn with the same generator."""
    model, windows, name = tiny("llama"), windows_of(2, 16), "model.layers.0.mlp.down_proj"
    fisher = output_fisher(model, windows, [name], generator(), pairs=True)
    found, pairs = fisher.weights[name], fisher.pairs[name]
    layer, draw, inputs = model.get_submodule(name), generator(), []
    handle = layer.register_forward_hook(lambda _module, args, _out: inputs.append(args[0].detach()))
    expected = torch.zeros(layer.out_features, layer.out_features)
    for window in windows:
        scores = model(input_ids=window[None]).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        (gradient,) = torch.autograd.grad(scores.gather(-1, drawn).sum(), layer.weight)
        expected += gradient @ gradient.T
    handle.remove()
    assert found.dtype == torch.float32 and found.shape == (64,)
    expected /= torch.cat(inputs).square().sum()
    assert pairs.dtype == torch.float32
    torch.testing.assert_close(found, expected.diagonal(), rtol=1e-4, atol=0)
    torch.testing.assert_close(pairs, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny, fails, monkeypatch):
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    names = list(linears(model))
    if fails:
        monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output_fisher(model, windows_of(1, 8), names, generator())
    else:
        output_fisher(model, windows_of(1, 8), names, generator())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_the_same_generator_gives_the_same_figures(tiny):
    model, name = tiny("llama"), "model.layers.1.self_attn.v_proj"
    first, again = (output_fisher(model, windows_of(2, 16), [name], generator()).weights[name] for _ in range(2))
    other = output_fisher(model, windows_of(2, 16), [name], torch.Generator().manual_seed(9)).weights[name]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_costs_are_the_equations():
    weight, q = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [5.0, 4.0]])
    h, fisher = torch.tensor([10.0, 1.0]), torch.tensor([6.0, 2.0])
    assert costs(weight, {"q": q, "w": weight}, h, fisher) == {"q": 0.5 * (6 * 1 + 2 * 40), "w": 0.0}
    assert costs(weight, {"q": q}, h, None)["q"] == pytest.approx(41 / (10 + 4 + 90 + 16))
    assert costs(weight, {"q": q}, None, None)["q"] == pytest.approx(5 / 30)
    assert costs(weight * 0, {"q": weight * 0}, h, None) == {"q": 0.0}


def test_a_weight_of_many_rows_is_summed_in_chunks(monkeypatch):
    weight, fisher = torch.randn(37, 8, generator=generator()), torch.rand(37, generator=generator())
    whole = costs(weight, {"q": weight.round()}, None, fisher)
    monkeypatch.setattr("compressor.sensitivity.CHUNK_ELEMENTS", 40)
    assert costs(weight, {"q": weight.round()}, None, fisher) == pytest.approx(whole, rel=1e-6)


def test_damage_is_named(tiny):
    model = tiny("llama")
    with pytest.raises(DataError, match="S, L >= 1"):
        output_fisher(model, torch.zeros(0, 4, dtype=torch.int64), [], generator())
    model.lm_head.weight.data.zero_()
    with pytest.raises(ModelError, match="no gradient reaches"):
        output_fisher(model, windows_of(1, 8), ["model.layers.0.mlp.up_proj"], generator())
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj.weight.data[3] = float("nan")
    with pytest.raises(NumericsError, match="output for calibration text is NaN"):
        output_fisher(model, windows_of(1, 8), ["model.layers.1.mlp.up_proj"], generator())
    model = tiny("llama")
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).register_full_backward_pre_hook(lambda _module, grads: (grads[0] * float("inf"),))
    with pytest.raises(NumericsError, match=f"{name}: NaN or Inf in its input or its gradient"):
        output_fisher(model, windows_of(1, 8), [name], generator())


def test_an_encoders_objective_has_the_hessian_of_its_cosine():
    """The covariance of the gradient over draws is that of 1 − cosine at equality, which ignores the length."""
    o = torch.tensor([[3.0, 0.0, 4.0]]).expand(20_000, 3).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_projection(o, generator()), o)
    fixed = o.detach()[0]
    hessian = torch.func.hessian(lambda x: 1 - torch.cosine_similarity(x, fixed, dim=0))(fixed.clone())
    torch.testing.assert_close(gradient.T @ gradient / len(o), hessian, atol=1e-3, rtol=0)
