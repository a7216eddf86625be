"""Experts of every family in both versions of transformers: made linears, seen, counted, saved under one name."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from compressor import Recipe, compress
from compressor.calibrate import calibrate
from compressor.errors import ModelError
from compressor.experts import unfuse
from compressor.folder import load
from compressor.mixtures import Routing, mixtures
from compressor.model import as_loaded, exempt, linears, skeleton, twin, unaccounted
from compressor.statistics import AbsMax, ChannelSquare, Gram

IDS = torch.randint(5, 288, (2, 40), generator=torch.Generator().manual_seed(1))
SOFTMAX = Routing("softmax", 2, True, 1.0, True)
# Family -> (what its router does, its experts' linears, layers of experts, those of shared experts).
FAMILIES = {
    "mixtral": (SOFTMAX, ("w1", "w3", "w2"), 2, 0),
    "qwen2_moe": (replace(SOFTMAX, renormalized=False), None, 2, 4),
    "qwen3_moe": (SOFTMAX, None, 2, 0),
    "olmoe": (replace(SOFTMAX, renormalized=False), None, 2, 0),
    "deepseek_v2": (replace(SOFTMAX, renormalized=False), None, 1, 3),
    "deepseek_v3": (Routing("sigmoid", 2, True, 2.5, False), None, 1, 3),
    "gpt_oss": (SOFTMAX, None, 2, 0),
    "granitemoe": (SOFTMAX, None, 2, 0),
}
# Family -> the tokens of each expert of the last layer, which must not depend on how transformers holds experts.
COUNTS = {
    "mixtral": [37, 30, 49, 44],
    "qwen2_moe": [27, 19, 25, 18, 18, 16, 21, 16],
    "qwen3_moe": [24, 10, 19, 24, 10, 16, 43, 14],
    "olmoe": [33, 10, 27, 28, 14, 20, 19, 9],
    "deepseek_v2": [16, 22, 25, 19, 36, 8, 19, 15],
    "deepseek_v3": [11, 20, 26, 19, 30, 10, 26, 18],
    "gpt_oss": [25, 58, 8, 1, 20, 42, 5, 1],
    "granitemoe": [27, 17, 14, 21, 21, 21, 20, 19],
}


@pytest.fixture(params=FAMILIES)
def mixture(request, tiny):
    """(family, original, the model that is worked on): weights drawn by name, so that both versions draw the same."""
    model = tiny(request.param)
    working = as_loaded(model).model
    for name, p in working.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.05)
        p.data.copy_(drawn if p.dim() > 1 else p.data * 0 + 1 + drawn)
    return request.param, working


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().amax() / expected.abs().amax()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_become_linears_and_compute_the_same(name, tiny):
    model = tiny(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    working = as_loaded(model).model
    assert off(logits(working), logits(model)) < 1e-5
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "the original was changed"
    assert sum(p.numel() for p in working.parameters()) == sum(p.numel() for p in model.parameters())
    assert not any(p.dim() > 2 for p in working.parameters())
    assert unaccounted(working, {f"{n}.weight" for n in linears(working)}) == []
    empty = skeleton(model.config, "causal-lm")
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in working.named_parameters()]
    count = twin(working)
    assert off(logits(count), logits(model)) < 1e-5
    assert len([*count.modules()]) == len([*working.modules()])


def test_a_view_says_what_the_router_does(mixture):
    family, model = mixture
    routing, names, layers, shared = FAMILIES[family]
    views = mixtures(model)
    assert len(views) == layers
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(5))
    for name, view in views.items():
        found = view.routing(x)
        assert replace(found, scale=round(found.scale, 4)) == routing
        assert view.router in {n for n, rule in exempt(model).items() if rule == "router"}
        assert len(view.shared()) == shared and all(n.startswith(name) for n in view.shared())
        assert view.get(3).names == (names or ("gate_proj", "up_proj", "down_proj"))
        weights = view.weights(x)
        assert weights.shape == (50, len(view)) and ((weights != 0).sum(-1) == 2).all()
        # The layer's output is what its weights make of the experts' outputs, beside the shared experts'.
        with torch.no_grad():
            given = view.module(x.unsqueeze(0))
            outputs = torch.stack([expert(x) for expert in view.experts], dim=1)
            routed = (weights.unsqueeze(-1) * outputs).sum(1)
            for expert in view.experts:
                expert.forward = torch.zeros_like
            rest = view.module(x.unsqueeze(0))
            for expert in view.experts:
                del expert.forward
        given, rest = (y if isinstance(y, torch.Tensor) else y[0] for y in (given, rest))
        assert off((given - rest)[0], routed) < 1e-4


def test_an_expert_is_given_back_bit_for_bit(mixture):
    _, model = mixture
    before = logits(model)
    view = next(iter(mixtures(model).values()))
    held = view.get(2)
    view.set(2, replace(held, gate=held.gate.clone(), down=held.down.clone()))
    assert torch.equal(logits(model), before)
    view.set(2, replace(held, down=held.down * 2))
    assert not torch.equal(logits(model), before) and torch.equal(view.get(2).up, held.up)


def test_every_token_is_counted(mixture):
    family, model = mixture
    found = calibrate(model, IDS, {ChannelSquare})
    assert set(found.uses) == set(mixtures(model))
    for name, use in found.uses.items():
        assert use.tokens == IDS.numel() and use.counts.sum() == 2 * use.tokens
        view = mixtures(model)[name]
        for e, count in enumerate(use.counts.tolist()):
            assert found.seen(view.linears(e)[0]) == (count > 0)
        assert (use.scores <= use.counts).all() and (use.scores[use.counts > 0] > 0).all()
    assert found.uses[name].counts.tolist() == COUNTS[family]


def test_routing_is_measured_in_float32_where_the_model_runs_in_bf16(mixture):
    _, model = mixture
    for use in calibrate(model, IDS, {ChannelSquare}, dtype=torch.bfloat16).uses.values():
        assert not use.unknown and use.counts.sum() == 2 * use.tokens == 2 * IDS.numel()
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(5))
        with torch.autocast("cpu", torch.bfloat16):
            weights = use.view.weights(x)
            scores = use.view.scores(x, weights)
        assert torch.equal(weights, use.view.weights(x)) and torch.equal(scores, use.view.scores(x, weights))


def test_experts_of_few_tokens_lean_on_the_others(mixture):
    _, model = mixture
    found = calibrate(model, IDS, {Gram, AbsMax})
    name, view = next(iter(mixtures(model).items()))
    counts = found.uses[name].counts.tolist()
    inside = [view.linears(e)[0] for e in range(len(view))]
    few = next(e for e, n in enumerate(counts) if 0 < n < 64)
    own = found._statistics[found._site_of[inside[few]]]
    together = found.together([n for n, c in zip(inside, counts, strict=True) if c], Gram)
    share = counts[few] / 64
    torch.testing.assert_close(found.value(inside[few], Gram), share * own[Gram].value() + (1 - share) * together)
    assert torch.linalg.matrix_rank(own[Gram].value()) < torch.linalg.matrix_rank(found.value(inside[few], Gram))
    assert found.value(inside[few], AbsMax) == own[AbsMax].value(), "only matrices are mixed"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_a_compressed_mixture_opens_again(name, tiny, tiny_tokenizer, tmp_path, prose):
    text = tmp_path / "text.txt"
    text.write_text(prose)
    steps = [{"quantize": {"weights": "int4", "group_size": 32}}]
    chosen = {"calibration": {"windows": 4, "length": 32}, "exports": ["safetensors"], "steps": steps}
    model = tiny(name)
    artifact = compress(model, Recipe.from_dict(chosen), tokenizer=tiny_tokenizer, data=text, measure=False)
    assert {n for n in linears(as_loaded(model).model)} == set(artifact.packed)
    rebuilt = load(artifact.save(tmp_path / "out")).model()
    assert torch.equal(logits(rebuilt), logits(artifact.model()))
    assert 1e-3 < (logits(rebuilt) - logits(model)).norm() / logits(model).norm() < 0.6


class Odd(nn.Module):
    """Fused parameters of the shapes of gated experts, which add and do not multiply."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8, generator=draw))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6, generator=draw))
        self.act_fn = nn.SiLU()

    def forward(self, x, indices, weights):
        y = torch.zeros_like(x)
        for k in range(indices.shape[1]):
            for t, e in enumerate(indices[:, k]):
                gate, up = (self.gate_up_proj[e] @ x[t]).chunk(2)
                y[t] += weights[t, k] * (self.down_proj[e] @ self.join(gate, up))
        return y

    def join(self, gate, up):
        return self.act_fn(gate) + up


def test_experts_that_compute_something_else_are_refused():
    model = nn.ModuleDict({"experts": Odd()})
    with pytest.raises(ModelError, match="experts: Odd does not compute what gated experts of its shapes do"):
        unfuse(model)
    model["experts"].join = lambda gate, up: model["experts"].act_fn(gate) * up  # and the proof is of what it does
    unfuse(model)
    assert len(linears_of(model)) == 12
    model = nn.ModuleDict({"experts": Odd()})
    model["experts"].forward = lambda hidden: hidden  # as Llama 4's
    with pytest.raises(ModelError, match="experts: Odd does not take tokens, indices and weights"):
        unfuse(model)
    model = nn.ModuleDict({"experts": Odd()})
    model["experts"].down_proj = nn.Parameter(torch.zeros(4, 8, 12))
    with pytest.raises(ModelError, match=r"experts of shapes .* not a gate and an up projection"):
        unfuse(model)


def linears_of(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def test_a_layer_that_is_not_understood_is_calibrated_all_the_same(tiny):
    model = as_loaded(tiny("mixtral")).model
    layer = model.model.layers[1].block_sparse_moe
    own = layer.forward

    def residual(x):
        y = own(x)
        return x + y if isinstance(y, torch.Tensor) else (x + y[0], *y[1:])

    layer.forward = residual
    found = calibrate(model, IDS, {ChannelSquare})
    assert found.seen("model.layers.1.block_sparse_moe.experts.0.w1")
    first, last = found.uses.values()
    assert first.counts.sum() == 2 * IDS.numel() and not first.unknown
    assert "model.layers.1.block_sparse_moe: it adds something else" in last.unknown and not last.counts.any()
