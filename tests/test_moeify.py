"""Dense layers carved into experts: nothing is lost with all of them, little with the right ones, folders reload."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from compressor import Recipe, compress, load
from compressor.carving import Carving, Fit, balanced, carve, energies, markers
from compressor.errors import ModelError, RecipeError
from compressor.methods.moeify import Moeify
from compressor.mixtures import mixtures
from compressor.model import as_loaded, linears, twin
from compressor.plan import plan_of
from compressor.progress import Silent
from compressor.routed import RoutedFFN
from compressor.run import Run
from compressor.structure import as_json, between, from_json, reshape

IDS = torch.randint(5, 288, (2, 20), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(4, 288, (6, 64), generator=torch.Generator().manual_seed(5))
OPTIONS = {"experts": 8, "shared": 2, "top_k": 3, "dense": 0, "markers": 12}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def dense(tiny):
    """A tiny Llama with weights as in a checkpoint, in groups of channels that act together."""

    def make(**changes):
        model = tiny("llama", **changes)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "gate_proj.weight" in name:  # channel i acts as direction i % 6 says
                    p.copy_(torch.randn(6, 64, generator=torch.Generator().manual_seed(3)).repeat(16, 1) * 0.4)
                p.copy_(p.bfloat16())
        return model

    return make


def carved(model, **options):
    """(what the step alone makes of the model, its report)"""
    working = twin(as_loaded(model).model)
    run = Run(WINDOWS, torch.float32, torch.device("cpu"), Silent(), model, lambda _: WINDOWS)
    return working, Moeify(**(OPTIONS | options)).rewrite(working, set(linears(working)), run)


def test_rows_go_where_all_together_cost_least():
    for seed, (n, k) in itertools.product(range(4), ((6, 2), (6, 3))):
        cost = torch.randint(-9, 9, (n, k), generator=torch.Generator().manual_seed(seed))
        found = balanced(cost, n // k)
        assert torch.bincount(found, minlength=k).tolist() == [n // k] * k
        every = (torch.tensor(p) for p in itertools.product(range(k), repeat=n))
        fair = (p for p in every if torch.bincount(p, minlength=k).tolist() == [n // k] * k)
        assert cost[range(n), found].sum() == min(cost[range(n), p].sum() for p in fair)


def test_channels_that_act_together_make_an_expert():
    tokens = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    size = torch.rand(200, 16, generator=torch.Generator().manual_seed(1)) * 0.1
    size[:, [1, 6, 11, 12]] += 2  # always
    groups = [[0, 5, 9, 14], [2, 4, 7, 15], [3, 8, 10, 13]]
    for number, group in enumerate(groups):
        size[:, group] += (tokens == number)[:, None].float()
    acts = markers(size, 8)
    assert (acts.sum(1) == 8).all()
    found = carve(acts.T @ acts, 4, 1)
    assert found.shared.tolist() == [1, 6, 11, 12] and sorted(found.experts.tolist()) == groups


def test_the_router_finds_who_adds_most():
    g = torch.Generator().manual_seed(2)
    x, true = torch.randn(400, 8, generator=g), torch.randn(5, 8, generator=g)
    size = (x @ true.T + 0.3).div(2).exp().repeat_interleave(2, 1) * torch.tensor([1.0, 2.0]).repeat(5)
    carving = Carving(torch.empty(0, dtype=torch.int64), torch.arange(10).view(5, 2))
    fit = Fit(8, 5)
    for part in (slice(300), slice(300, 400)):
        fit.add(x[part], energies(size[part], carving))
    weight, bias = fit.value()
    torch.testing.assert_close(weight, true, atol=0.05, rtol=0.05)
    assert ((x @ weight.T + bias).argmax(1) == energies(size, carving).argmax(1)).float().mean() > 0.98


def test_all_experts_give_what_the_layer_gave(dense):
    model = dense(mlp_bias=True)
    before = logits(model)
    working, _ = carved(model, top_k=6)
    assert torch.equal(logits(model), before)  # the original is as it was
    assert (logits(working) - before).abs().amax() <= 1e-5 * before.abs().amax()
    layers = [m for m in working.modules() if isinstance(m, RoutedFFN)]
    assert len(layers) == 2 and all(len(m.experts) == 6 for m in layers)
    for layer, was in zip(layers, model.model.layers, strict=True):
        assert {e.down_proj.weight.shape for e in layer.experts} == {(64, 12)}
        up = torch.cat([e.up_proj.weight for e in (layer.shared_expert, *layer.experts)])
        assert sorted(up.tolist()) == sorted(was.mlp.up_proj.weight.tolist())  # every channel, once


def test_fewer_experts_lose_more_and_chance_loses_most(dense):
    model = dense()
    before = logits(model)
    energy, off = [], []
    for top_k in (1, 3, 5, 6):
        working, report = carved(model, top_k=top_k)
        energy.append(sum(row["energy"] for row in report["layers"].values()) / 2)
        off.append((logits(working) - before).square().sum().item())
    assert energy == sorted(energy) and off == sorted(off, reverse=True) and energy[-1] == 1
    assert energy[1] > (2 + 3) / 8 + 0.05  # what a split at random keeps, on average, is its share of the channels
    again, other = carved(model)
    torch.testing.assert_close(logits(again), logits(carved(model)[0]), atol=0, rtol=0)
    assert other == carved(model)[1]


def test_a_view_and_an_empty_model_know_it(dense):
    working, report = carved(dense())
    views = mixtures(working)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(5))
    for name, view in views.items():
        weights = view.weights(x)
        assert torch.equal(weights, view.module.weights(x)) and (weights.sum(1) == 3).all()
        assert len(view.shared()) == 3 and name in report["layers"]
    found = between(as_loaded(dense()).model, working)
    assert {n: s.kind for n, s in found.items()} == dict.fromkeys(views, "routed_ffn")
    working.model.layers[0].mlp.experts[1].down_proj = nn.Linear(8, 64, bias=False)
    found = from_json(as_json(between(as_loaded(dense()).model, working)))
    assert found["model.layers.0.mlp.experts.1.down_proj"].attributes["in_features"] == 8 and len(found) == 3
    empty = reshape(as_loaded(dense()).model, found)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in working.named_parameters()}


def test_a_folder_gives_the_same_logits_everywhere(dense, tiny_tokenizer, text, tmp_path, registered):
    pytest.importorskip("onnxruntime")
    from transformers import AutoModelForCausalLM

    from compressor.runtimes import OnnxSession

    chosen = {
        "calibration": {"windows": 4, "length": 32}, "exports": ["safetensors", "onnx"], "expert_plan": {"windows": 4},
        "steps": [{"moeify": {"targets": ["*.mlp.*"], **OPTIONS}}, {"quantize": {"weights": "int8"}}],
    }  # fmt: skip
    artifact = compress(dense(), Recipe.from_dict(chosen), tokenizer=tiny_tokenizer, data=text, measure=False)
    assert artifact.record["expert_plan"]["dynamic_k"]["k"] == [1, 2, 3, 4, 5, 6]
    folder = artifact.save(tmp_path / "out")
    model = load(folder).model()
    expected = logits(model)
    assert len(mixtures(model)) == 2 and any(".experts." in n for n in artifact.packed)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(stock), expected)
    found, _ = OnnxSession(folder).prefill(IDS)
    assert (found - expected).abs().amax() <= 1e-4 * expected.abs().amax()


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        ({"experts": 10, "shared": 2}, "llama", "does not divide the 96 channels of .*use one of 3, 4, 6, 8, 12"),
        ({"dense": 1}, "llama", "dense 1 leaves none of 2 layers"),
        ({"targets": ["*.up_proj"]}, "llama", "finds no feed-forward layer"),
        ({}, "mixtral", "finds no feed-forward layer"),
        ({}, "gpt2", "finds no feed-forward layer"),
        ({"top_k": 7}, "llama", "top_k 7 must be 1 to 6"),
        ({"shared": 7}, "llama", "shared 7 of 8 experts"),
    ],
)
def test_what_cannot_be_carved_is_said(tiny, step, kind, message):
    with pytest.raises((ModelError, RecipeError), match=message):
        plan_of(tiny(kind), Recipe.from_dict({"steps": [{"moeify": OPTIONS | step}]}))


def test_another_activation_than_the_config_says_is_refused(dense):
    model = dense()
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    with pytest.raises(ModelError, match=r"is not down\(silu\(gate\(x\)\) up\(x\)\)"):
        carved(model)
