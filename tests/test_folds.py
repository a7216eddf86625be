"""Folds: found for every family, exact for every one that is found, refused where they would change the model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from compressor.calibrate import sites
from compressor.folds import Fold, find_folds, fold_scale, fold_shift, is_exact, share
from compressor.model import as_loaded, linears

TOLERANCE = 1e-4  # of the largest |logit|; what is found is 1e-6 off, a wrong fold more than 1e-2
GATED = {"norm": 2, "values": 1, "up": 1}
# Folds of one block by kind. Each line is a statement about the architecture, not about how it was found.
EXPECTED: dict[str, dict[str, int]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"], GATED),
    "phi": {"norm": 1, "values": 1},  # one norm for attention and MLP, GELU between fc1 and fc2
    "opt": {"norm": 2, "values": 1, "activation": 1},
    "gpt_neox": {"norm": 2, "values": 1},
    "gpt2": {"norm": 2, "values": 1},
    "bert": {"values": 1},  # its norms feed the residual stream too
    "mixtral": {"norm": 2, "values": 1, "up": 4},
}
LAYER_NORM = ("phi", "opt", "gpt_neox", "gpt2")


def working_copy(model: nn.Module) -> nn.Module:
    """Modules of its own, tensors shared with the original."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(4, 256, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=tokens)[0]


def off(model: nn.Module, expected: torch.Tensor) -> float:
    return ((logits(model) - expected).abs().max() / expected.abs().max()).item()


def drawn(fold: Fold, features: int, seed: int = 0) -> torch.Tensor:
    """Scales from 1/e² to e² that obey the fold's groups."""
    return share(fold, (4 * torch.rand(features, generator=torch.Generator().manual_seed(seed)) - 2).exp())


def features_of(model: nn.Module, fold: Fold) -> int:
    return linears(model)[fold.site[0]].in_features


def test_expected_kinds(tiny, family):
    model = as_loaded(tiny(family)).model
    folds = find_folds(model, sites(model))
    for block in ("0", "1"):
        inside = [f for f in folds.values() if next(p for p in f.site[0].split(".") if p.isdigit()) == block]
        counts = {kind: sum(f.kind == kind for f in inside) for kind in ("norm", "values", "up", "activation")}
        assert {k: n for k, n in counts.items() if n} == EXPECTED[family]
    for fold in folds.values():
        norm = fold.kind == "norm"
        assert fold.shifts == (fold.kind == "values" or (norm and family in LAYER_NORM))
        assert fold.offset == (1.0 if norm and family.startswith("gemma") else 0.0)
        assert (fold.rows is None) == norm


def test_every_fold_alone_leaves_the_model_as_it_is(tiny, family):
    model = as_loaded(tiny(family)).model
    expected = logits(model)
    for fold in find_folds(model, sites(model)).values():
        scale = drawn(fold, features_of(model, fold))
        changed = working_copy(model)
        fold_scale(changed, fold, scale)
        assert off(changed, expected) < TOLERANCE, fold
        if fold.shifts:
            shifted = working_copy(model)
            fold_shift(shifted, fold, scale.log())
            assert off(shifted, expected) < TOLERANCE, fold
        undone = working_copy(model)  # the same fold without its last reader must show: the measure is not blind
        fold_scale(undone, fold, scale)
        last = undone.get_submodule(fold.site[-1])
        last.weight = model.get_submodule(fold.site[-1]).weight
        assert off(undone, expected) > 10 * TOLERANCE, fold


def test_all_folds_together_and_the_original_untouched(tiny, family):
    model = as_loaded(tiny(family)).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = logits(model)
    changed = working_copy(model)
    for i, fold in enumerate(find_folds(model, sites(model)).values()):
        values = drawn(fold, features_of(model, fold), i)
        if fold.shifts:
            fold_shift(changed, fold, values.log())
        fold_scale(changed, fold, values)
    assert off(changed, expected) < TOLERANCE
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert all(p.dtype == torch.float32 for p in changed.parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "gpt_neox"])
def test_the_input_is_divided(tiny, name):
    """The contract x' = (x - z) / s at the readers, and not only at the logits."""
    model = as_loaded(tiny(name)).model

    def inputs(m: nn.Module) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
            for n, layer in linears(m).items()
        ]
        logits(m)
        for hook in hooks:
            hook.remove()
        return seen

    plain = inputs(model)
    for fold in find_folds(model, sites(model)).values():
        changed = working_copy(model)
        scale = drawn(fold, features_of(model, fold))
        shift = scale.log() if fold.shifts else torch.zeros_like(scale)
        if fold.shifts:
            fold_shift(changed, fold, shift)
        fold_scale(changed, fold, scale)
        seen = inputs(changed)
        for n in fold.site:
            torch.testing.assert_close(seen[n], (plain[n] - shift) / scale, rtol=1e-4, atol=1e-5)


def test_groups_are_the_copies_of_a_value(tiny):
    """4 heads of 16 over 2 key-value heads: channel (head, i) comes from row (head // 2, i) of v_proj."""
    model = as_loaded(tiny("llama")).model
    fold = find_folds(model, sites(model))[("model.layers.0.self_attn.o_proj",)]
    head, i = torch.arange(64) // 16, torch.arange(64) % 16
    assert torch.equal(fold.groups, head // 2 * 16 + i) and torch.equal(fold.rows, fold.groups)
    assert fold.producer == "model.layers.0.self_attn.v_proj"
    for family, first in {"phi3": 96, "gpt2": 128}.items():  # fused: after q and k
        model = as_loaded(tiny(family)).model
        fused = next(f for f in find_folds(model, sites(model)).values() if f.kind == "values")
        assert fused.rows.min() == first
    model = as_loaded(tiny("gpt_neox")).model  # interleaved by head: q, k, v of head 0, then of head 1
    fused = next(f for f in find_folds(model, sites(model)).values() if f.kind == "values")
    assert torch.equal(fused.rows, head * 48 + 32 + i) and fused.groups is None


def test_mixtral_compensates_router_and_all_experts(tiny):
    model = as_loaded(tiny("mixtral")).model
    moe = "model.layers.1.block_sparse_moe"
    fold = next(f for f in find_folds(model, sites(model)).values() if f.others and "layers.1" in f.producer)
    assert fold.others == (f"{moe}.gate",)
    assert fold.site == tuple(f"{moe}.experts.{e}.{w}" for e in range(4) for w in ("w1", "w3"))
    assert not is_exact(model, replace(fold, others=()))
    assert not is_exact(model, replace(fold, site=fold.site[:-2]))
    assert is_exact(model, fold)


def wrong_folds(model: nn.Module) -> dict[str, Fold]:
    layer = "model.layers.0"
    folds = find_folds(model, sites(model))
    norm = folds[tuple(f"{layer}.self_attn.{p}_proj" for p in "qkv")]
    values = folds[(f"{layer}.self_attn.o_proj",)]
    up = folds[(f"{layer}.mlp.down_proj",)]
    assert up.rows is not None
    return {
        "a reader is left out": replace(norm, site=norm.site[:2]),
        "a (1 + w) norm": replace(norm, offset=1.0),
        "another norm": replace(norm, producer=f"{layer}.post_attention_layernorm"),
        "the gate, behind SiLU": replace(up, producer=f"{layer}.mlp.gate_proj"),
        "rows of other channels": replace(up, rows=up.rows.flip(0)),
        "keys": replace(values, producer=f"{layer}.self_attn.k_proj"),
        "heads in another order": replace(values, rows=values.rows.roll(16), groups=values.groups.roll(16)),
        "a shift through a product": replace(up, shifts=True),
        "nothing that is read": replace(norm, producer=f"{layer}.mlp.down_proj", rows=torch.arange(64)),
    }


WRONG = [
    "a reader is left out", "a (1 + w) norm", "another norm", "the gate, behind SiLU", "rows of other channels", "keys",
    "heads in another order", "a shift through a product", "nothing that is read",
]  # fmt: skip


@pytest.mark.parametrize("which", WRONG)
def test_wrong_folds_are_refused(tiny, which):
    model = as_loaded(tiny("llama")).model
    assert not is_exact(model, wrong_folds(model)[which])


def test_a_wrong_fold_behind_a_large_residual_is_refused(tiny):
    """Massive activations must not hide a branch: here the residual stream is 1e5 times what the MLP adds."""
    model = as_loaded(tiny("llama")).model
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach() * 1e-5)
    folds = find_folds(model, sites(model))
    norm = folds[("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")]
    assert is_exact(model, norm)
    assert not is_exact(model, replace(norm, site=norm.site[:1]))


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu2", "relu"])
def test_only_relu_lets_a_scale_through(tiny, activation):
    model = as_loaded(tiny("opt", activation_function=activation)).model
    kinds = {fold.kind for fold in find_folds(model, sites(model)).values()}
    assert ("activation" in kinds) == (activation == "relu")


class Toy(nn.Module):
    """A block with a norm, two linears that read it, and what a subclass does besides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.norm(hidden_states)
        return hidden_states + self.down(self.mix(self.gate(x), self.up(x))) + self.rest(x)

    def mix(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate.sigmoid() * up

    def rest(self, x: torch.Tensor) -> Any:
        return 0


class NormInResidual(Toy):
    def rest(self, x):
        return 1e-3 * x


class UpReadTwice(Toy):
    def rest(self, x):
        return 1e-3 * self.up(x)


class Sums(Toy):
    def mix(self, gate, up):
        return gate + up.tanh()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x).sigmoid() * self.up(x))


class Experts(nn.Module):
    """Four experts behind a norm and a router; tokens choose among the first `reached` only."""

    reached = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.norm(hidden_states)[0]
        chosen = self.router(x)[:, : self.reached].argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(x[chosen == i])
        return hidden_states + out[None]


class OneExpertIdle(Experts):
    reached = 3


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([block(), block()])

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return (x,)


@pytest.mark.parametrize(
    ("block", "kinds"), [(Toy, {"norm", "up"}), (NormInResidual, {"up"}), (UpReadTwice, set()), (Sums, {"norm"})]
)
def test_what_else_reads_a_tensor_decides(block, kinds):
    model = Model(block).eval()
    assert {f.kind for f in find_folds(model, sites(model)).values()} == kinds


def test_an_expert_that_no_token_reaches_is_not_guessed_at():
    """Its own fold is absent, and so is that of the norm, which it would read unscaled if a token ever came."""
    idle, all_run = (Model(block).eval() for block in (OneExpertIdle, Experts))
    found = find_folds(idle, sites(idle)).values()
    assert [f.site[0] for f in found] == [f"layers.{b}.experts.{e}.down" for b in (0, 1) for e in range(3)]
    found = find_folds(all_run, sites(all_run)).values()
    assert [len(f.site) for f in found if f.kind == "norm"] == [8, 8] and len(found) == 10
    assert [f.others for f in found if f.kind == "norm"] == [("layers.0.router",), ("layers.1.router",)]


def test_readers_outside_the_sites_are_compensated(tiny):
    """Where calibration was asked for some linears only, the others that read the same norm are `others`."""
    model = as_loaded(tiny("llama")).model
    some = [replace(s, names=s.names[:1]) for s in sites(model) if len(s.names) == 3]
    folds = find_folds(model, some)
    assert [f.others for f in folds.values()] == [
        tuple(f"model.layers.{i}.self_attn.{p}_proj" for p in "kv") for i in (0, 1)
    ]


def test_share():
    fold = Fold(("o",), "values", "v", (), True, torch.tensor([0, 1, 0, 1, 3]))
    values = torch.tensor([1.0, 5.0, 4.0, -5.0, 2.0])
    assert share(fold, values).tolist() == [4, 5, 4, 5, 2]
    assert share(fold, values, "min").tolist() == [1, -5, 1, -5, 2]
    assert share(fold, values, "midpoint").tolist() == share(fold, values, "mean").tolist() == [2.5, 0, 2.5, 0, 2]
    assert torch.equal(share(replace(fold, groups=None), values), values)


def test_refuses_bad_values(tiny):
    model = as_loaded(tiny("llama")).model
    folds = find_folds(model, sites(model))
    norm = folds[tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")]
    values = folds[("model.layers.0.self_attn.o_proj",)]
    good = torch.ones(64)
    for scale, message in [
        (torch.ones(63), "must be 64 finite values"),
        (good.index_fill(0, torch.tensor([3]), float("nan")), "NaN or Inf"),
        (good.index_fill(0, torch.tensor([3]), 0.0), "positive"),
        (good.index_fill(0, torch.tensor([3]), -1.0), "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_scale(model, norm, scale)
    with pytest.raises(ValueError, match="through share"):
        fold_scale(model, values, torch.linspace(1, 2, 64))
    with pytest.raises(ValueError, match="no shift"):
        fold_shift(model, norm, good)
    with pytest.raises(ValueError, match="through share"):
        fold_shift(model, values, torch.linspace(1, 2, 64))


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt2", "phi3", "mixtral"])
def test_powers_of_two_change_no_bit(tiny, name):
    """Exact in every product and sum; (1 + w) / s - 1 of Gemma is not, and is not here."""
    model = as_loaded(tiny(name)).model
    expected = logits(model)
    for i, fold in enumerate(find_folds(model, sites(model)).values()):
        changed = working_copy(model)
        fold_scale(changed, fold, torch.exp2(drawn(fold, features_of(model, fold), i).log2().round()))
        assert torch.equal(logits(changed), expected), fold


def test_bf16_parameters_stay_bf16(tiny):
    model = as_loaded(tiny("llama")).model
    fold = find_folds(model, sites(model))[("model.layers.0.mlp.down_proj",)]
    model = model.bfloat16()
    changed = working_copy(model)
    fold_scale(changed, fold, torch.full((96,), 2.0))
    for name, power in {fold.producer: 0.5, fold.site[0]: 2.0}.items():
        weight = changed.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, model.get_submodule(name).weight * power)


def test_finding_leaves_the_model_as_it_is(tiny):
    model = as_loaded(tiny("mixtral")).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    held = {n: id(p) for n, p in model.named_parameters()}
    find_folds(model, sites(model))
    assert held == {n: id(p) for n, p in model.named_parameters()}
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
