"""The mixed_bits method: the budget is met, sites agree, never worse than one format, and it loads like any other."""

import copy
import math

import pytest
import torch
import yaml
from torch import nn

from compressor import Recipe, compress, load
from compressor.allocation import Choice, Table
from compressor.calibrate import calibrate, sites
from compressor.errors import RecipeError
from compressor.layers import build
from compressor.methods.mixed_bits import GPTQ_SHARE, MixedBits
from compressor.methods.quantize import Quantize
from compressor.model import linears
from compressor.plan import plan_of
from compressor.sensitivity import costs, output_fisher
from compressor.statistics import BlockNoise, ChannelSquare

CHOICES = ("mxfp4", "nvfp4", "int8")
WINDOWS = torch.randint(4, 288, (4, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def case(tiny):
    """A tiny llama whose layers differ in sensitivity, its linears, calibration and Fisher information."""
    model = tiny("llama")
    with torch.no_grad():  # block 0's MLP hardly matters then, block 1's does
        model.model.layers[0].mlp.down_proj.weight.mul_(0.05)
        model.model.layers[1].mlp.down_proj.weight.mul_(4)
    layers = linears(model)
    calibration = calibrate(model, WINDOWS, {ChannelSquare})
    fisher = output_fisher(model, WINDOWS, list(layers), torch.Generator().manual_seed(0))
    return model, layers, calibration, fisher


def bits_of(layers, plans):
    return sum(p.placement.size_bytes for p in plans.values()) * 8 / sum(m.weight.numel() for m in layers.values())


def planned(method, layers, calibration, fisher=None):
    return method.plan(layers, calibration, method.survey(layers, calibration, fisher))


def objective(method, plans, case):
    """The method's own objective, from what is stored."""
    _, layers, calibration, fisher = case
    total = 0.0
    for name, plan in plans.items():
        weight, h = layers[name].weight, calibration.value(name, ChannelSquare)
        decoded = build(method.apply(layers[name], plan)).dequantize()
        total += costs(weight, {"q": decoded}, h, fisher.weights[name] if method.sensitivity == "kl" else None)["q"]
    return total


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
@pytest.mark.parametrize("bits", [4.3, 5.0, 6.25, 7.77])
def test_the_budget_is_met_and_no_uniform_choice_that_fits_is_better(case, sensitivity, bits):
    _, layers, calibration, fisher = case
    method = MixedBits(bits=bits, choices=CHOICES, sensitivity=sensitivity)
    fisher = fisher if sensitivity == "kl" else None
    plans = planned(method, layers, calibration, fisher)
    assert list(plans) == list(layers)
    assert bits - 0.35 < bits_of(layers, plans) <= bits  # within one site's step of the budget, and never above
    mixed = objective(method, plans, case)
    for choice in CHOICES:
        uniform = Quantize(choice).plan(layers, calibration)
        if bits_of(layers, uniform) <= bits:
            assert mixed <= objective(method, uniform, case) * (1 + 1e-9), choice
    stored = sum(method.apply(layers[n], p).tensors["weight_packed"].nbytes for n, p in plans.items())
    assert stored * 8 / sum(m.weight.numel() for m in layers.values()) <= bits


def test_the_layers_that_matter_get_the_bits(case):
    _, layers, calibration, fisher = case
    decision = MixedBits(bits=6.0).survey(layers, calibration, fisher)
    chosen = decision.formats
    assert all(chosen[f"model.layers.{i}.self_attn.o_proj"] == "int8" for i in (0, 1))
    assert all(chosen[f"model.layers.0.mlp.{x}_proj"] == "nvfp4" for x in ("gate", "up", "down"))
    assert decision.allocation.sentence().startswith("mixed (4 nvfp4, 4 int8): cost ")


def test_the_cost_of_an_allocation_is_the_kl_of_the_model(case):
    """All layers at once, on the windows that were calibrated on."""
    model, layers, calibration, fisher = case
    with torch.no_grad():
        before = model(input_ids=WINDOWS).logits.double().log_softmax(-1)
    found = {}
    for bits in (4.5, 6.0, 8.3):
        method = MixedBits(bits=bits)
        decision, changed = method.survey(layers, calibration, fisher), copy.deepcopy(model)
        for name, plan in method.plan(layers, calibration, decision).items():
            decoded = build(method.apply(layers[name], plan)).dequantize()
            changed.get_submodule(name).weight = nn.Parameter(decoded)
        with torch.no_grad():
            after = changed(input_ids=WINDOWS).logits.double().log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1).mean().item()
        found[bits] = (kl, decision.allocation.cost)
        assert 0.6 < decision.allocation.cost / kl < 1.6, found
    assert found[6.0][0] < 0.5 * found[4.5][0] and found[8.3][0] < 0.05 * found[4.5][0]


def test_gptq_counts_for_weights_and_not_for_inputs_and_tables(case):
    _, layers, _, fisher = case
    calibration = calibrate(case[0], WINDOWS, {ChannelSquare, BlockNoise})
    tables = {"table": Table((1, 64), (Choice("row", 64, 0.25),))}

    def cost(**options):
        method = MixedBits(bits=4.505, choices=("nvfp4", "fp8"), **options)  # room for the table alone
        return method.survey(layers, calibration, fisher, tables).allocation.cost

    nearest, gptq = (cost(rounding=r) - 0.25 for r in ("nearest", "gptq"))
    assert gptq == pytest.approx(GPTQ_SHARE * nearest) and nearest > 0
    inputs = cost(activations="match") - 0.25 - nearest
    assert cost(activations="match", rounding="gptq") == pytest.approx(gptq + inputs + 0.25) and inputs > 0


@pytest.mark.parametrize("bits", [4.6, 5.5, 6.4, 7.3])
def test_linears_of_one_site_take_one_format(case, bits):
    model, layers, calibration, fisher = case
    method = MixedBits(bits=bits)
    decision = method.survey(layers, calibration, fisher)
    plans = method.plan(layers, calibration, decision)
    for site in sites(model):
        assert len({decision.formats[name] for name in site.names}) == 1, site.names
    assert decision.sites["model.layers.0.self_attn.q_proj"] == tuple(
        f"model.layers.0.self_attn.{x}_proj" for x in "qkv"
    )
    scales = {plans[f"model.layers.0.mlp.{x}_proj"].weight_global_scale for x in ("gate", "up")}
    assert scales == {None} or len({s.item() for s in scales}) == 1


def test_a_size_is_a_budget_of_all_layers_together(case):
    _, layers, calibration, fisher = case
    weights = sum(m.weight.numel() for m in layers.values())
    by_size = planned(MixedBits(size_mb=weights * 5.5 / 8e6), layers, calibration, fisher)
    by_bits = planned(MixedBits(bits=5.5), layers, calibration, fisher)
    assert {n: p.placement for n, p in by_size.items()} == {n: p.placement for n, p in by_bits.items()}


def test_plans_and_packed_are_those_of_quantize(case):
    _, layers, calibration, fisher = case
    method = MixedBits(bits=6.0, choices=("int4", "nvfp4", "fp8"), group_size=32)
    plans = planned(method, layers, calibration, fisher)
    for name, plan in plans.items():
        choice = plan.placement.format
        alone = Quantize(choice, group_size=32 if choice == "int4" else None)
        expected = alone.apply(layers[name], alone.plan(layers, calibration)[name])
        packed = method.apply(layers[name], plan)
        assert packed.kind == expected.kind and packed.attributes == expected.attributes
        assert all(torch.equal(packed.tensors[t], expected.tensors[t]) for t in expected.tensors)


def test_matching_activations_follow_the_format(case):
    method = MixedBits(bits=5.0, choices=("int4", "int8", "nvfp4"), activations="match", four_over_six=True)
    made = {c: q.activations for c, q in method._methods().items()}
    assert made == {"int4": "none", "int8": "int8", "nvfp4": "nvfp4"}
    assert {c: q.four_over_six for c, q in method._methods().items()} == {"int4": False, "int8": False, "nvfp4": True}
    assert {s.__name__ for s in method.needs()} == {"ChannelSquare", "AbsMax"}
    assert MixedBits(bits=5.0, scales="absmax").needs() == {ChannelSquare}


def test_a_format_that_does_not_fit_a_layer_is_no_choice_there():
    layers = {"narrow": nn.Linear(40, 16, bias=False), "wide": nn.Linear(64, 16, bias=False)}
    method = MixedBits(bits=8.5, sensitivity="error")
    place = method.place(16, 40)
    assert place.kept is None and "not nvfp4, 16 does not divide in_features 40" in place.note
    plans = planned(method, layers, None)
    assert plans["narrow"].placement.format == "int8"
    assert MixedBits(bits=6.0, choices=("nvfp4", "mxfp4")).place(16, 40).kept
    kept = planned(MixedBits(bits=4.5, choices=("nvfp4", "mxfp4"), sensitivity="error"), layers, None)
    assert kept["narrow"].placement.kept and kept["wide"].placement.format


def test_a_dry_run_shows_the_budget(tiny):
    shape = (96, 64)
    place = MixedBits(bits=5.5).place(*shape)
    assert (place.format, place.size_bytes, place.note) == ("mixed", 96 * 64 * 11 // 16, "one of nvfp4, int8")
    assert MixedBits(bits=99).place(*shape).size_bytes == Quantize("int8").place(*shape).size_bytes
    shapes = {"a": (96, 64), "b": (64, 96), "c": (32, 64)}
    shared = MixedBits(size_mb=0.01).place_all(shapes)
    assert 0.0099 < sum(p.size_bytes for p in shared.values()) / 1e6 <= 0.01
    with pytest.raises(RecipeError, match=r"size_mb is 0\.005, but the smallest .* is 0\.009; raise size_mb"):
        MixedBits(size_mb=0.005).place_all(shapes)


def test_a_budget_that_is_too_small_says_what_is_possible(case):
    _, layers, calibration, fisher = case
    with pytest.raises(RecipeError, match=r"bits is 4\.4, but the smallest that nvfp4, int8 .* is 4\.5; raise bits"):
        MixedBits(bits=4.4).survey(layers, calibration, fisher)
    assert {p.placement.format for p in planned(MixedBits(bits=4.5), layers, calibration, fisher).values()} == {"nvfp4"}
    with pytest.raises(RecipeError, match="give sensitivity: error"):
        MixedBits(bits=5.0).survey(layers, calibration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of bits and size_mb"),
        ({"bits": 5.0, "size_mb": 1.0}, "one of bits and size_mb"),
        ({"bits": 0.0}, "bits is 0.0; allowed: more than 0"),
        ({"size_mb": math.nan}, "size_mb is nan; allowed"),
        ({"bits": 5.0, "choices": ("int4",)}, "two or more different formats"),
        ({"bits": 5.0, "choices": ("int4", "int4")}, "two or more different formats"),
        ({"bits": 5.0, "choices": ("int4", "int5")}, "choices has 'int5'; allowed: nvfp4"),
        ({"bits": 5.0, "choices": ("nvfp4", "fp8"), "group_size": 32}, "choices has none"),
        ({"bits": 5.0, "choices": ("nvfp4", "int8"), "activations": "match", "group_size": 32}, "choices has none"),
        ({"bits": 5.0, "choices": ("int4", "int8"), "group_size": 48}, "power of two"),
        ({"bits": 5.0, "four_over_six": True}, "needs nvfp4 among the choices and activations: match"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixedBits(**options)


def test_a_recipe_compresses_saves_and_loads(tiny, tiny_tokenizer, tmp_path, prose):
    data = {"calibration": {"windows": 3, "length": 24}, "exports": ["safetensors"], "steps": []}
    data["steps"] = [{"mixed_bits": {"bits": 5.5, "choices": ["nvfp4", "int8"], "sensitivity": "error"}}]
    recipe = Recipe.from_dict(data)
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and recipe.steps[0].options.choices == ("nvfp4", "int8")
    model, text = tiny("llama"), tmp_path / "text.txt"
    text.write_text(prose * 4)
    planned = plan_of(model, recipe)
    inside = [row for row in planned.rows if row.action.startswith("mixed")]
    assert len(inside) == 14 and sum(r.bytes_after * 8 for r in inside) <= 5.5 * sum(math.prod(r.shape) for r in inside)
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer, data=text, measure=False)
    assert {p.kind for n, p in artifact.packed.items() if "layers" in n} == {"fp4_linear", "int_linear"}
    artifact.save(tmp_path / "small")
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        ours = artifact.model()(input_ids=ids).logits
        assert torch.equal(load(tmp_path / "small").model()(input_ids=ids).logits, ours)
        original = model(input_ids=ids).logits
    assert (ours - original).norm() / original.norm() < 0.3


def test_a_recipe_with_an_unknown_choice_says_where(tiny):
    steps = [{"mixed_bits": {"bits": 5.0, "choices": ["nvfp4", "int9"]}}]
    with pytest.raises(RecipeError, match=r"step 1 \(mixed_bits\): choices.* is 'int9'; did you mean 'int8'"):
        Recipe.from_dict({"steps": steps})


def test_rounded_inputs_count(tiny):
    """With inputs rounded alike, the layer whose input four bits spoil gets eight, though its weights do not ask."""
    model = tiny("llama")
    layers = linears(model)
    calibration = calibrate(model, WINDOWS, {ChannelSquare, BlockNoise})
    fisher = output_fisher(model, WINDOWS, list(layers), torch.Generator().manual_seed(0))
    budget = {"bits": 6.0, "choices": ("nvfp4", "fp8")}
    by_weights = MixedBits(**budget).survey(layers, calibration, fisher).formats
    site = next(s for s in calibration.sites if by_weights[s.names[0]] == "nvfp4")
    calibration._statistics[site][BlockNoise].total *= 1e6
    assert MixedBits(**budget).survey(layers, calibration, fisher).formats == by_weights
    matched = MixedBits(**budget, activations="match").survey(layers, calibration, fisher).formats
    assert {matched[name] for name in site.names} == {"fp8"}
