"""The svd step on models: metrics, allocations, the sequential update."""

import pytest
import torch
from torch import nn

from compressor import Recipe, compress
from compressor.calibrate import calibrate
from compressor.errors import ModelError, RecipeError
from compressor.lowrank import LowRankLinear
from compressor.model import linears, twin
from compressor.paired import calibrate_pairs
from compressor.plan import plan_of
from compressor.statistics import CrossGram, Gram

IDS = torch.arange(4, 40)[None]


def recipe(**options):
    return Recipe.from_dict({"calibration": {"windows": 6, "length": 48}, "steps": [{"svd": options}]})


@pytest.fixture
def text(tmp_path, prose):
    path = tmp_path / "text.txt"
    path.write_text(prose * 12)
    return path


def windows(count=4, length=48):
    return torch.randint(4, 288, (count, length), generator=torch.Generator().manual_seed(1))


def test_pairs_see_what_replaced_layers_compute(tiny):
    """In one block: o_proj's input behind a changed v_proj, against the same run by hand."""
    original = tiny("llama")
    model, seen = twin(original), []

    def then(part):
        site = part.sites[0].names
        seen.append(site)
        own, cross = part.value(site[0], Gram), part.value(site[0], CrossGram)
        if site[0] == "model.layers.0.self_attn.q_proj":
            assert torch.allclose(own, cross, atol=1e-5)
            layer = model.model.layers[0].self_attn.v_proj
            layer.weight = nn.Parameter(layer.weight * 0.5)
        if site[0] == "model.layers.0.self_attn.o_proj":
            assert torch.allclose(cross, own * 2, rtol=1e-4, atol=1e-6)  # o_proj's input is linear in v
        if site[0] == "model.layers.1.self_attn.q_proj":
            expected = calibrate(model, windows(), {Gram}, [site[0]]).value(site[0], Gram)
            assert torch.allclose(own, expected, rtol=1e-3, atol=1e-4) and not torch.allclose(own, cross, atol=1e-3)

    calibrate_pairs(model, original, windows(), then)
    kinds = [names[0].rpartition(".")[2] for names in seen]
    assert kinds == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2
    assert sorted(n for names in seen for n in names) == sorted(linears(original))


def spread(model):
    """Inputs and outputs of very different size, so that metrics matter; block 1 hardly matters at all."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for i, block in enumerate(model.model.layers):
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight.mul_(torch.logspace(-1, 1, 64)[torch.randperm(64, generator=generator)])
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight.mul_(0.05 if i else 1.0)
    return model


def divergence(model, compressed):
    ids = windows(6)
    with torch.inference_mode():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, compressed))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def losses(tiny, tiny_tokenizer, prose, tmp_path_factory):
    """KL of each variant, on text like that of calibration."""
    path = tmp_path_factory.mktemp("svd") / "text.txt"
    path.write_text(prose * 12)
    model, found = spread(tiny("llama")), {}

    def measured(**options):
        key = tuple(sorted(options.items()))
        if key not in found:
            chosen = recipe(**{"keep": 0.8, "rank_multiple": 4, **options})
            artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=path, measure=False)
            from compressor.data import windows as of_text

            ids = of_text(tiny_tokenizer, prose * 12, 6, 48)
            with torch.inference_mode():
                p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, artifact.model()))
            found[key] = (p.exp() * (p - q)).sum(-1).mean().item()
        return found[key]

    return measured


def test_what_inputs_look_like_is_worth_knowing(losses):
    assert losses(metric="inputs") < losses(metric="asvd") < losses(metric="plain")


def test_the_pivoted_form_keeps_more_of_the_same_weights(losses):
    assert losses() < 0.8 * losses(form="plain")


def test_what_the_loss_looks_at_is_worth_knowing(losses):
    assert losses(metric="fisher") < losses()
    assert losses(allocation="kl", floor=0.0, metric="fisher") < losses(metric="fisher")


def test_sequential_makes_up_for_what_is_lost(losses):
    assert losses(sequential=True) < losses()


@pytest.mark.parametrize(
    "options", [{"allocation": "svd_llm2"}, {"allocation": "relative"}, {"metric": "fwsvd"}, {"metric": "kfac"}]
)
def test_every_other_choice_runs(losses, options):
    assert 0 < losses(**options) < 3 * losses(metric="plain")


def test_the_report_says_ranks_and_losses(tiny, tiny_tokenizer, text):
    chosen = recipe(keep=0.8, rank_multiple=4)
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    report = artifact.record["steps"]["1 svd"]
    assert len(report) == 14
    for name, row in report.items():
        assert row["rank"] == artifact.structure[name].attributes["rank"] and 0 < row["loss"] < 1
    kept = sum(t.numel() for n, t in artifact.kept.items() if n.endswith((".down.weight", ".up.weight")))
    linear = sum(m.weight.numel() for m in linears(tiny("llama")).values())
    assert kept <= 0.8 * linear


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_a_target_in_parameters_bytes_or_operations_is_met(tiny, tiny_tokenizer, text, form):
    model = tiny("llama")
    dense = sum(m.weight.numel() for m in linears(model).values())
    targets = {"parameters": int(0.75 * dense), "size_mb": 0.75 * dense * 2 / 1e6, "mflops": 0.75 * dense * 2 / 1e6}
    for name, value in targets.items():
        options = {name: value, "rank_multiple": 1, "form": form, "allocation": "kl"}
        artifact = compress(model, recipe(**options), tokenizer=tiny_tokenizer, data=text, measure=False)
        stored = {n: t for n, t in artifact.kept.items() if any(n.startswith(layer) for layer in linears(model))}
        weights = sum(t.numel() for n, t in stored.items() if not n.endswith("order"))
        spent = sum(t.numel() * t.element_size() for t in stored.values()) / 1e6 if name == "size_mb" else weights
        target = value * 1e6 / 2 if name == "mflops" else value
        assert 0.995 * target <= spent <= target, name
    with pytest.raises(RecipeError, match=rf"svd: the budget is \d+ weights, and these linears have {dense}"):
        plan_of(model, recipe(size_mb=100.0))


def test_biases_are_kept_in_both_forms(tiny, tiny_tokenizer, text):
    model = tiny("qwen2")
    for form in ("plain", "pivoted"):
        chosen = recipe(keep=0.97, rank_multiple=1, form=form, targets=["*.q_proj"])
        artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
        pair = artifact.model().model.layers[0].self_attn.q_proj
        layer = model.model.layers[0].self_attn.q_proj
        assert isinstance(pair, LowRankLinear)
        assert torch.allclose(pair(torch.zeros(1, 64))[0], layer.bias, atol=1e-5) and layer.bias.norm() > 0.1


def test_what_cannot_be_is_refused(tiny, tiny_tokenizer, text):
    for options, message in (
        ({"keep": 1.2}, "not a share of the weights"),
        ({}, "give one of keep, parameters, size_mb, mflops"),
        ({"keep": 0.8, "size_mb": 1.0}, "give one of keep, parameters, size_mb, mflops"),
        ({"mflops": 0.0}, "mflops is 0; allowed: more than 0"),
        ({"keep": 0.8, "sequential": True, "metric": "asvd"}, "sequential needs metric: inputs, fisher or kfac"),
        ({"keep": 0.8, "floor": 2.0}, "floor 2 is not a share"),
        ({"keep": 0.8, "rank_multiple": 0}, "rank_multiple 0 must be 1 or more"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(**options)
    with pytest.raises(ModelError, match=r"experts.*set sequential: false"):
        compress(tiny("mixtral"), recipe(keep=0.8, sequential=True), tokenizer=tiny_tokenizer, data=text, measure=False)
