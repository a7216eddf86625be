"""Rules that leave out experts: what they compute, that keeping all changes no bit, and that they last in a folder."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from compressor import Recipe, compress
from compressor.errors import ModelError, RecipeError
from compressor.exporters import onnx_experts
from compressor.fewer_experts import FewerExperts
from compressor.folder import load
from compressor.kernels import native
from compressor.methods import otp
from compressor.methods.thinning import layers_of, thinned
from compressor.mixtures import mixtures
from compressor.model import as_loaded, linears, twin

IDS = torch.randint(5, 288, (2, 20), generator=torch.Generator().manual_seed(1))
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe",
)  # fmt: skip
SOFTMAX_OF_CHOSEN = ("gpt_oss", "granitemoe")  # ours is that of all, divided by the sum: equal but for rounding
SHORT = {
    "calibration": {"windows": 2, "length": 32, "dtype": "float32"}, "embedding": "keep", "lm_head": "keep",
    "exports": ["safetensors"],
}  # fmt: skip
TRAIN = {"windows": 4, "epochs": 4, "batch": 2, "keep": 0.75}


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def ruled(model: nn.Module, rule: str, tables: bool = False) -> dict[str, FewerExperts]:
    """All layers of experts with rules, of random values that leave out some."""
    layers = thinned(model, layers_of(model, linears(model)), rule, 0.5, tables)
    generator = torch.Generator().manual_seed(3)
    for layer in layers.values():
        if rule == "ratio":
            layer.rule.beta = nn.Parameter(torch.full((1,), 0.8), False)
            continue
        otp._begin(layer.rule, generator, torch.device("cpu"))
        for name in ("second", "second_bias", *(["table"] if tables else [])):
            shape = getattr(layer.rule, name).shape
            setattr(layer.rule, name, nn.Parameter(torch.randn(shape, generator=generator), False))
    return layers


@pytest.fixture
def compressed(tiny_tokenizer, text):
    def run(model, *steps, **more):
        recipe = Recipe.from_dict(SHORT | {"steps": list(steps)} | more)
        return compress(model, recipe, tokenizer=tiny_tokenizer, data=text, measure=False)

    return run


@pytest.mark.parametrize("step", [{"odp": {"keep": 1.0}}, {"otp": {"keep": 1.0}}])
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_changes_nothing(name, step, tiny, compressed):
    model = tiny(name)
    expected = logits(as_loaded(tiny(name)).model)
    artifact = compressed(model, step)
    found = artifact.model()
    assert sum(isinstance(m, FewerExperts) for m in found.modules()) == len(mixtures(found)) > 0
    if name in SOFTMAX_OF_CHOSEN:
        assert (logits(found) - expected).abs().amax() <= 2e-6 * expected.abs().amax()
    else:
        assert torch.equal(logits(found), expected)
    report = artifact.record["steps"]["1 " + next(iter(step))]
    assert report["kept"] == 1 and len(report["layers"]) == len(mixtures(found))


@pytest.mark.parametrize("rule", ["ratio", "head", "tables"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_a_layer_is_what_the_equations_say(name, rule, tiny):
    scaled = {"routed_scaling_factor": 2.0, "topk_method": "greedy"} if name == "deepseek_v2" else {}
    model = as_loaded(tiny(name, num_experts_per_tok=3, **scaled)).model
    original = twin(model)
    layers = ruled(model, "ratio" if rule == "ratio" else "head", rule == "tables")
    for layer_name, layer in layers.items():
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
        view = mixtures(original)[layer_name]
        own, renormalized = view.weights(x), view.routing(x).renormalized
        expected, counts, ran = torch.zeros_like(x), [], [0] * len(view)
        for t in range(len(x)):
            order = own[t].argsort(descending=True, stable=True)[:3]
            w = own[t, order]
            if rule == "ratio":
                count = int((w >= 0.8 * w[0]).sum())
            else:
                count = int(layer.rule.logits(x[t : t + 1], w[None], view.scores(x, own)[t : t + 1]).argmax()) + 1
            counts.append(count)
            gain = 0.5 if rule == "tables" else float(renormalized)
            for j, e in enumerate(order.tolist()):
                if j < count:
                    scale = 1 + gain * w[count:].sum() / w[:count].sum()
                    ran[e] += 1
                    expected[t] += w[j] * scale * view.experts[e](x[t : t + 1])[0]
                elif rule == "tables":
                    expected[t] += w[j] * layer.rule.table[e]
        assert {*counts} == {1, 2, 3}
        seen: list[int] = [0] * len(view)
        for e, expert in enumerate(mixtures(model)[layer_name].experts):
            expert.register_forward_hook(lambda _, args, out, e=e, seen=seen: seen.__setitem__(e, len(args[0])))
        found = layer(x[None])
        assert seen == ran  # nobody runs for nothing
        found = found if isinstance(found, torch.Tensor) else found[0]
        beside = layer.parts.beside(layer, x)
        assert (found[0] - expected - (0 if beside is None else beside)).abs().amax() <= 1e-5 * expected.abs().amax()
        assert torch.equal(mixtures(model)[layer_name].weights(x) != 0, layer.decide(x)[0] != 0)


@pytest.mark.parametrize("step", [{"odp": {"keep": 0.75}}, {"odp": {"keep": 0.75, "scope": "model"}}, {"otp": TRAIN}])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "granitemoe"])
def test_a_folder_keeps_the_rule(name, step, tiny, compressed, tmp_path):
    pmq = {"pmq": {"targets": ["*.experts.*"], "bits": 2.5, "choices": [2, 3], "group_size": 32}}
    artifact = compressed(tiny(name), step, pmq)
    report = artifact.record["steps"]["1 " + next(iter(step))]
    assert 0.7 <= report["kept"] <= 0.8 and any(row["kept"] < 1 for row in report["layers"].values())
    again = load(artifact.save(tmp_path / "out"))
    assert json.dumps(again.record["steps"], sort_keys=True) == json.dumps(artifact.record["steps"], sort_keys=True)
    model = again.model()
    assert torch.equal(logits(model), logits(artifact.model()))
    used = [v.weights(torch.randn(400, 64)).ne(0).double().sum(-1).mean().item() for v in mixtures(model).values()]
    assert min(used) < 2
    assert torch.equal(logits(compressed(tiny(name), step, pmq).model()), logits(model))


def test_training_comes_nearer_than_the_rule_of_ratios(tiny, tiny_tokenizer, text):
    kl = {}
    for step in ({"odp": {"keep": 0.75}}, {"otp": TRAIN | {"epochs": 20}}):
        recipe = Recipe.from_dict(SHORT | {"steps": [step]})
        made = compress(tiny("mixtral"), recipe, tokenizer=tiny_tokenizer, data=text, quality_text=text)
        kl[next(iter(step))] = made.record["ledger"][0]["kl"]
    assert 0 < kl["otp"] < 0.5 * kl["odp"]


@pytest.mark.parametrize("rule", ["ratio", "head", "tables"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_the_traced_sum_leaves_out_the_same(name, rule, tiny):
    model = as_loaded(tiny(name)).model
    whole = logits(model)
    ruled(model, "ratio" if rule == "ratio" else "head", rule == "tables")
    expected = logits(model)
    assert not torch.allclose(whole, expected, rtol=1e-3)
    with onnx_experts.dense(model):
        found = logits(model)
    assert (found - expected).abs().amax() <= 1e-5 * expected.abs().amax()


def test_the_rule_is_in_the_graph(tiny, compressed, tmp_path):
    pytest.importorskip("onnxruntime")
    from compressor.runtimes import OnnxSession, read_graph

    pmq = {"pmq": {"targets": ["*.experts.*"], "bits": 2.5, "choices": [2, 3], "group_size": 32}}
    model = tiny("mixtral", num_hidden_layers=1)
    artifact = compressed(model, {"otp": TRAIN}, pmq, exports=["safetensors", "onnx"])
    folder = artifact.save(tmp_path / "out")
    assert [n.op_type for n in read_graph(folder).graph.node].count("MixedBitMoE") == 1
    expected = logits(artifact.model())
    for library in (False, True) if native.built() else (False,):
        session = OnnxSession(folder, library=library)
        found, _ = session.prefill(IDS)
        assert (found - expected).abs().amax() <= 1e-4 * expected.abs().amax(), f"library {library}"


def test_a_plan_counts_what_tokens_keep(tiny, compressed):
    pmq = {"pmq": {"targets": ["*.experts.*"], "bits": 2.5, "choices": [2, 3], "group_size": 32}}
    artifact = compressed(tiny("mixtral"), {"odp": {"keep": 0.75}}, pmq, expert_plan={"windows": 4})
    numbers = artifact.record["expert_plan"]["dynamic_k"]
    assert numbers["k"] == [2] and 1.3 < numbers["used"][0] < 1.7
    assert numbers["active_params"][0] == pytest.approx(
        sum(p.numel() for p in tiny("mixtral").parameters()) - (8 - 2 * numbers["used"][0]) * 3 * 64 * 96, rel=0.02
    )


def test_what_does_not_go_is_said(tiny, compressed):
    with pytest.raises(ModelError, match="targets hold no layer of experts; change targets"):
        compressed(tiny("llama"), {"odp": {}})
    with pytest.raises(ModelError, match=r"keep 0\.4 is less than one expert a token; 1 of 2 is the least"):
        compressed(tiny("mixtral"), {"odp": {"keep": 0.4}})
    with pytest.raises(ModelError, match="an earlier step chose how many experts"):
        compressed(tiny("mixtral"), {"odp": {}}, {"odp": {}})
    with pytest.raises(ModelError, match="parts of a dense layer have no weights that rank them"):
        moeify = {"moeify": {"experts": 8, "shared": 2, "top_k": 3, "dense": 0}}
        compressed(tiny("llama"), moeify, {"odp": {}})
    for wrong in ({"odp": {"keep": 0}}, {"otp": {"keep": 1.5}}, {"otp": {"batch": 0}}, {"otp": {"lr": 0}}):
        with pytest.raises(RecipeError, match="must be"):
            Recipe.from_dict({"steps": [wrong]})
