"""OutlierTune: folds change nothing, scales clip nothing, integers compute what is stored, and the choices pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor import Recipe, compress, load
from compressor.calibrate import calibrate
from compressor.errors import RecipeError
from compressor.exporters import hf_config
from compressor.folds import find_folds, share
from compressor.kernels import activations as act
from compressor.layers import build
from compressor.methods import static_input as static
from compressor.methods.outlier_tune import OutlierTune
from compressor.model import as_loaded, linears, twin
from compressor.statistics import ChannelMinMax, TokenSample

FAMILIES = ["llama", "opt", "bert", "gpt2"]
LAYER_NORM = ["opt", "bert", "gpt2"]
ALWAYS = {"static_within": 1e9, "static_down": True}  # static wherever a scale can be folded
IDS = torch.randint(4, 288, (8, 48), generator=torch.Generator().manual_seed(3))


def output(model, ids=IDS):
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.logits if "logits" in found else found.last_hidden_state


def outliers(model, factor=30.0):
    """Norms with two channels `factor` times the others, one-sided where there is a bias, and their readers divided.

    What a trained model has and a random one has not; the model computes what it did but for the one-sidedness.
    """
    model = as_loaded(model).model
    sites = calibrate(model, IDS[:1], {ChannelMinMax}).sites
    for fold in find_folds(model, sites).values():
        if fold.kind != "norm":
            continue
        norm = model.get_submodule(fold.producer)
        with torch.no_grad():
            norm.weight[[3, 17]] = (norm.weight[[3, 17]] + fold.offset) * factor - fold.offset
            if norm._parameters.get("bias") is not None:
                norm.bias[[3, 17]] = 2 * factor
            for name in (*fold.site, *fold.others):
                model.get_submodule(name).weight[:, [3, 17]] /= factor
    return model


def folded(model, **options):
    """(method, working model, Inputs)"""
    method, working = OutlierTune(**options), twin(model)
    return method, working, method.fold(working, calibrate(working, IDS, method.fold_needs()))


def packed(model, **options):
    method, working, inputs = folded(model, **options)
    calibration = calibrate(working, IDS, method.needs())
    plans = method.plan(linears(working), calibration, inputs)
    return working, inputs, plans, {n: method.apply(m, plans[n]) for n, m in linears(working).items()}


@pytest.mark.parametrize("symmetrize", ["auto", True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_no_logit(tiny, name, symmetrize):
    model = outliers(tiny(name))
    before, original = {n: p.clone() for n, p in model.state_dict().items()}, output(model)
    _, working, inputs = folded(model, symmetrize=symmetrize, **ALWAYS)
    assert (output(working) - original).abs().max() <= 1e-4 * original.abs().max()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "the original was changed"
    assert any(s.scale is not None for s in inputs.sites)
    assert any(not torch.equal(p, before[n]) for n, p in working.state_dict().items() if n in before)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", [8, 6])
def test_nothing_that_calibration_saw_is_clipped(tiny, name, bits):
    """And the largest values come near the end of the range: the scale is no larger than needed."""
    _, inputs, plans, _ = packed(
        outliers(tiny(name)), bits=bits, **ALWAYS, symmetrize=True
    )
    top, seen = 2 ** (bits - 1) - 1, 0
    for name, plan in plans.items():
        if inputs.of(name).scale is not None:
            assert 0.99 * top < plan.detail["largest_code"] < top + 0.5
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize("name", LAYER_NORM)
def test_symmetrization_shrinks_the_scales_of_layer_norms(tiny, name):
    model = outliers(tiny(name))
    _, centred, with_shift = folded(model, **ALWAYS, alpha=1.0)
    _, _, without = folded(model, **ALWAYS, alpha=1.0, symmetrize=False)
    moved = [s for s in with_shift.sites if s.shifted == "producer"]
    assert moved and all(s.shrunk < 1 for s in moved)
    ranges = calibrate(centred, IDS, {ChannelMinMax})
    for site in moved:
        low, high = ranges.value(site.names[0], ChannelMinMax)
        fold = next(f for f in find_folds(centred, ranges.sites).values() if site.names[0] in f.site)
        low, high = share(fold, low, "min"), share(fold, high, "max")
        assert (low + high).abs().max() < 1e-3 * high.max()  # centred
        assert site.error <= without.of(site.names[0]).error  # gated by error, so never worse
    assert any(site.error < 0.9 * without.of(site.names[0]).error for site in moved)


def test_rms_norms_leave_the_shift_to_the_op(tiny):
    model = outliers(tiny("llama"))
    for symmetrize, found in ((True, {"input_offset"}), ("auto", {"no"}), (False, {"no"})):
        _, inputs, _, made = packed(model, symmetrize=symmetrize, **ALWAYS)
        shifted = {s.shifted for s in inputs.sites if s.names[0].endswith(("q_proj", "gate_proj"))}
        assert shifted <= found | {"no"} and bool(shifted & found)
        for name, p in made.items():
            assert ("input_offset" in p.tensors) == (inputs.of(name).shifted == "input_offset")


def test_an_offset_halves_the_step_of_inputs_of_one_sign(tiny):
    """As a ReLU gives them: half of the range was for values that never come."""
    model = tiny("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias += 0.5
    _, inputs, _, made = packed(model, **ALWAYS, symmetrize=True, alpha=1.0)
    _, plain, _, without = packed(model, **ALWAYS, alpha=1.0)
    assert not any("input_offset" in p.tensors for p in without.values())  # auto: what every runtime can load
    for name in (n for n in made if n.endswith("fc2")):
        assert "input_offset" in made[name].tensors and inputs.of(name).shrunk <= 0.501
        assert inputs.of(name).error < 0.7 * plain.of(name).error


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("symmetrize", ["auto", True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_compute_what_the_original_layers_do(tiny, name, symmetrize, rounding):
    """Offset, folded shift and bias belong together: output of each layer on the folded model's own input."""
    model = outliers(tiny(name))
    working, _, _, made = packed(model, symmetrize=symmetrize, **ALWAYS, alpha=1.0, rounding=rounding)
    for layer, p in made.items():
        working.set_submodule(layer, build(p))
    found, original = output(working), output(model)
    assert 1e-4 < (found - original).norm() / original.norm() < 0.06


@pytest.mark.parametrize("symmetrize", [True, False])
@pytest.mark.parametrize("bits", [8, 6])
def test_an_int32_product_is_exactly_the_fake_quantized_one(tiny, bits, symmetrize):
    """In float64, where sums of integers times two scales are exact, both give the same bits."""
    _, inputs, _, made = packed(outliers(tiny("llama")), bits=bits, symmetrize=symmetrize, **ALWAYS)
    generator, seen = torch.Generator().manual_seed(0), 0
    for name, p in made.items():
        module, chosen = build(p), inputs.of(name)
        assert p.tensors["weight"].dtype == torch.int8
        assert p.tensors["weight"].min() >= -(2 ** (bits - 1)) and p.tensors["weight"].max() <= 2 ** (bits - 1) - 1
        if chosen.scale is None:
            continue
        seen += 1
        assert torch.equal(torch.exp2(torch.log2(chosen.scale).round()), chosen.scale)  # a power of two
        x = torch.randn(5, p.attributes["in_features"], generator=generator) * chosen.scale * 2 ** (bits - 2)
        values = module.quantize_input(x)
        codes = (values / chosen.scale).to(torch.int32)
        assert torch.equal(codes * chosen.scale, values) and codes.abs().max() <= 2 ** (bits - 1)
        sums = codes @ p.tensors["weight"].T.to(torch.int32)
        integer = sums.double() * chosen.scale.double() * p.tensors["weight_scale"].double().T
        assert torch.equal(integer, values.double() @ module.dequantize().double().T)
        bias = p.tensors.get("bias", torch.zeros(p.attributes["out_features"]))
        torch.testing.assert_close(module(x), (integer + bias).float(), rtol=1e-5, atol=1e-5)
    assert seen >= 8


@pytest.mark.parametrize("name", FAMILIES)
def test_a_scale_a_channel_beats_one_scale_on_every_site(tiny, name):
    """Squared output error of the whole calibration input, weights rounded in both; 6 bits, where it matters."""
    model = outliers(tiny(name))
    calibration = calibrate(model, IDS, {ChannelMinMax, TokenSample})
    layers, compared = linears(model), 0
    for fold in find_folds(model, calibration.sites).values():
        low, high = calibration.value(fold.site[0], ChannelMinMax)
        s = static.scales(share(fold, low, "min"), share(fold, high, "max"), None, 6)
        x, weights = calibration.value(fold.site[0], TokenSample), [layers[n].weight.detach() for n in fold.site]
        plain, by_channel = static.split(s, None, 0.0), static.split(s, None, 1.0)
        assert torch.allclose(plain.fold, plain.fold[0]) and torch.allclose(s, by_channel.fold * by_channel.scale)
        noise = [act.int_with(x / g.fold, g.scale, 6) * g.fold - x for g in (plain, by_channel)]
        errors = [sum((e @ w.T).square().sum() for w in weights) for e in noise]
        assert errors[1] < errors[0]
        compared += 1
    assert compared >= 2


def test_grouped_values_share_their_scales(tiny):
    """Four query heads on two value heads: the copies of a value channel get one scale and one shift."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[5] *= 20
    original = output(model)
    _, working, inputs = folded(model, **ALWAYS, alpha=1.0, symmetrize=True)
    assert (output(working) - original).abs().max() <= 1e-4 * original.abs().max()
    assert inputs.of("model.layers.0.self_attn.o_proj").scale is not None
    ratio = working.model.layers[0].self_attn.o_proj.weight / model.model.layers[0].self_attn.o_proj.weight
    columns = ratio.median(0).values.view(2, 2, 16)  # value head, its two query heads, channel
    torch.testing.assert_close(columns[:, 0], columns[:, 1])
    assert columns[0, 0, 5] > 5 * columns[0, 0].median()


def test_an_input_that_is_much_better_with_a_scale_a_token_gets_one(tiny):
    """One massive token, as in a down projection: a static range for it leaves the other tokens nothing."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1000
        model.model.layers[0].mlp.gate_proj.weight *= 4
    ids = IDS.clone()
    ids[0, 0] = 7
    method = OutlierTune(static_down=True)
    working = twin(model)
    measured = method.fold(working, calibrate(working, ids, method.fold_needs()))
    for site in measured.sites:
        assert (site.scale is None) == site.rule.endswith("int8")
        if site.scale is not None:
            assert site.error <= 2 * site.token_error
    always = OutlierTune(**ALWAYS)
    working = twin(model)
    forced = always.fold(working, calibrate(working, ids, always.fold_needs()))
    assert all(s.scale is not None for s in forced.sites)
    for a, b in zip(measured.sites, forced.sites, strict=True):
        assert (a.scale is None) == (b.error > 2 * a.token_error)
    assert sum(s.scale is None for s in measured.sites) not in (0, len(measured.sites))
    default = OutlierTune(static_within=1e9)
    found = default.fold(twin(model), calibrate(model, ids, default.fold_needs())).sites
    assert {s.names[0].split(".")[-1] for s in found if s.scale is None} == {"down_proj"}
    never = OutlierTune(static_within=0.0)
    assert all(s.scale is None for s in never.fold(twin(model), calibrate(model, ids, never.fold_needs())).sites)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_inputs_with_a_scale_a_token_are_rotated_where_that_lowers_the_error(tiny, name):
    model = tiny(name)
    with torch.no_grad():
        for n, layer in linears(model).items():
            if n.endswith(("up_proj", "fc1")):
                layer.weight[5] *= 40  # one channel of the second linear's input
    original = output(model)
    working, inputs, _, made = packed(model, bits=6, hadamard=16, alpha=0.0)
    _, plain, _, without = packed(model, bits=6, alpha=0.0)
    assert (output(working) - original).abs().max() <= 1e-4 * original.abs().max()
    rotated = [s for s in inputs.sites if s.hadamard]
    assert rotated and all(s.scale is None for s in rotated)
    for site in inputs.sites:
        before = plain.of(site.names[0])
        assert site.token_error <= before.token_error
        if site.scale is None:
            assert (site.token_error < before.token_error) == bool(site.hadamard) == bool(site.row()["hadamard"])
    for layer, p in made.items():
        assert p.attributes.get("hadamard", 0) == inputs.of(layer).hadamard
    layer = rotated[-1].names[0]
    x = torch.randn(64, made[layer].attributes["in_features"], generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 8
    y = model.get_submodule(layer)(x).detach()
    errors = [float((build(found[layer])(x) - y).norm() / y.norm()) for found in (made, without)]
    assert errors[0] < 0.7 * errors[1]


def test_a_rotation_needs_our_own_ops(tiny, tiny_tokenizer, text):
    with pytest.raises(RecipeError, match="hadamard is not what transformers computes; set runtime: compressor"):
        Recipe.from_dict({"runtime": "transformers", "steps": [{"outlier_tune": {"hadamard": 64}}]})
    artifact = run(tiny("llama"), tiny_tokenizer, text, bits=6, hadamard=16, static_within=0.0)
    assert any(p.attributes.get("hadamard") for p in artifact.packed.values())
    assert "rotated in blocks of 16" in hf_config.loads_in(artifact)["transformers"]


def test_gptq_lowers_the_error_of_the_folded_layer(tiny):
    model = outliers(tiny("llama"))
    errors = {}
    for rounding in ("nearest", "gptq"):
        working, _, _, made = packed(model, bits=6, rounding=rounding, symmetrize=True, **ALWAYS)
        inputs: dict[str, tuple] = {}
        names = {layer: name for name, layer in linears(working).items()}
        for layer in names:
            layer.register_forward_hook(lambda m, args, y, into=inputs, of=names: into.update({of[m]: (args[0], y)}))
        output(working)
        modules = {n: build(p) for n, p in made.items()}
        for m in modules.values():
            m.attributes["activations"] = "none"
        errors[rounding] = sum(float((m(inputs[n][0]) - inputs[n][1]).square().mean()) for n, m in modules.items())
    assert errors["gptq"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_weights_are_weighted_by_what_they_multiply(tiny, rounding):
    """The second moments of the input behind its offset, from those before it and the mean."""
    model = outliers(tiny("llama"))
    with torch.no_grad():  # inputs with means, which random ones lack
        model.model.embed_tokens.weight += 1.0
    working, inputs, plans, _ = packed(model, rounding=rounding, symmetrize=True, **ALWAYS)
    seen: dict[str, torch.Tensor] = {}
    names = {layer: name for name, layer in linears(working).items()}
    for layer in names:
        layer.register_forward_pre_hook(lambda m, args: seen.update({names[m]: args[0].flatten(0, -2)}))
    output(working)
    moved = [n for n in names.values() if inputs.of(n).offset is not None]
    assert moved
    for name in moved:
        x = seen[name].double() - inputs.of(name).offset
        expected = x.square().mean(0).float()
        torch.testing.assert_close(plans[name].importance, expected, rtol=1e-3, atol=1e-4 * float(expected.mean()))
        assert (plans[name].hessian is not None) == (rounding == "gptq")


def run(model, tokenizer, text, exports=("safetensors",), **options):
    step = {"outlier_tune": options}
    recipe = {"calibration": {"windows": 8, "length": 32, "data": str(text)}, "runtime": "compressor", "steps": [step]}
    return compress(model, Recipe.from_dict({**recipe, "exports": list(exports)}), tokenizer=tokenizer)


@pytest.fixture
def prose_ids(tiny_tokenizer, prose):
    """Tokens like those of calibration: static ranges promise nothing for others, and random ids are others."""
    return torch.tensor(tiny_tokenizer(prose)["input_ids"][: 4 * 32]).view(4, 32)


def test_through_the_pipeline_and_back_from_the_folder(tiny, tiny_tokenizer, text, tmp_path, prose_ids):
    model = outliers(tiny("llama"))
    original = output(model, prose_ids)
    artifact = run(model, tiny_tokenizer, text, symmetrize=True, **ALWAYS)
    report = artifact.record["steps"]["1 outlier_tune"]
    assert report["static_share"] == 1.0 and len(report["sites"]) == 8
    detail = artifact.record["layers"]["model.layers.0.self_attn.q_proj"]
    assert detail["input"] == "int8_static" and 120 < detail["largest_code"] < 127.5
    found = output(artifact.model(), prose_ids)
    assert torch.equal(output(load(artifact.save(tmp_path / "out")).model(), prose_ids), found)
    assert (found - original).norm() / original.norm() < 0.1
    assert artifact.packed["model.layers.0.self_attn.q_proj"].attributes["activations"] == "int8_static"
    again = run(model, tiny_tokenizer, text, symmetrize=True, **ALWAYS)
    assert all(torch.equal(t, again.tensors()[n]) for n, t in artifact.tensors().items())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_onnx_graph_computes_the_same_nodes(tiny, tiny_tokenizer, text, tmp_path, name):
    """Offsets, folded biases and static scales, node by node and as a whole, in stock onnxruntime."""
    pytest.importorskip("onnxruntime")
    from compressor.verify_runtimes import check_onnxruntime, check_torch

    exports = ["safetensors", "onnx"]
    artifact = run(outliers(tiny(name)), tiny_tokenizer, text, exports=exports, symmetrize=True, **ALWAYS)
    assert any("input_offset" in p.tensors for p in artifact.packed.values())
    folder = artifact.save(tmp_path / "out")
    rows = [*check_torch(folder, tmp_path), *check_onnxruntime(folder, tmp_path)]
    assert len(rows) > 4 and all(row.status == "ok" for row in rows), rows


def test_all_windows_set_the_ranges(tiny, tiny_tokenizer, text, monkeypatch):
    seen = []
    fold = OutlierTune.fold
    monkeypatch.setattr("compressor.steps.SURVEY_WINDOWS", 2)

    def spy(self, model, calibration):
        seen.append(calibration._statistics[calibration.sites[0]][ChannelMinMax].tokens)
        return fold(self, model, calibration)

    monkeypatch.setattr(OutlierTune, "fold", spy)
    run(tiny("llama"), tiny_tokenizer, text)
    assert seen == [8 * 32] * 2, "every token, block by block"


def test_where_transformers_cannot_follow_is_said(tiny, tiny_tokenizer, text):
    model = outliers(tiny("llama"))
    said = hf_config.loads_in(run(model, tiny_tokenizer, text, symmetrize=True, **ALWAYS))
    assert "no: " in said["transformers"] and ("input_offset" in said["transformers"] or "bias" in said["transformers"])
    assert hf_config.loads_in(run(model, tiny_tokenizer, text))["transformers"] == "yes"
    step = {"outlier_tune": {"symmetrize": True}}
    with pytest.raises(RecipeError, match="symmetrize is not what transformers computes; set runtime: compressor"):
        Recipe.from_dict({"runtime": "transformers", "steps": [step]})
    # A bias that the fold made: the values of an o_proj take a shift, and a Llama has no place for it.
    artifact = run(model, tiny_tokenizer, text, symmetrize=False)
    name = "model.layers.0.self_attn.v_proj"
    artifact.packed[name].tensors["bias"] = torch.zeros(32)
    assert hf_config.loads_in(artifact)["transformers"].startswith(f"no: {name} has a bias")


def test_after_a_step_that_stores_layers_is_refused(tiny, tiny_tokenizer, text):
    steps = [{"quantize": {"weights": "int8", "targets": ["*.q_proj"]}}, {"outlier_tune": {"ignore": ["*.q_proj"]}}]
    recipe = Recipe.from_dict({"calibration": {"data": str(text), "windows": 2, "length": 16}, "steps": steps})
    with pytest.raises(RecipeError, match="put outlier_tune before it"):
        compress(tiny("llama"), recipe, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5 is not a share"),
        ({"static_within": -1.0}, "static_within -1 must be 0"),
        ({"damping": 0.0}, "damping 0 must be above 0"),
    ],
)
def test_options_out_of_range_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        OutlierTune(**options)


def test_layers_outside_the_step_are_compensated_and_kept(tiny, tiny_tokenizer, text, prose_ids):
    """k_proj is not targeted: it reads the same norm, whose scales it must get too."""
    model = outliers(tiny("llama"))
    artifact = run(model, tiny_tokenizer, text, ignore=["*.k_proj"], **ALWAYS)
    assert "model.layers.0.self_attn.k_proj.weight" in artifact.kept
    assert not torch.equal(
        artifact.kept["model.layers.0.self_attn.k_proj.weight"].float(), model.model.layers[0].self_attn.k_proj.weight
    )
    original = output(model, prose_ids)
    assert (output(artifact.model(), prose_ids) - original).norm() / original.norm() < 0.1
    assert isinstance(artifact.model().get_submodule("model.layers.0.self_attn.k_proj"), nn.Linear)
