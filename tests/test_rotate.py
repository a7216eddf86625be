"""Rotations: orthogonal matrices, models that compute what they did or a refusal, and what ops and files make of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from compressor import Recipe, compress, load, rotations
from compressor.calibrate import calibrate, sites
from compressor.errors import ModelError, RecipeError
from compressor.exporters import hf_config
from compressor.folds import find_folds, folds_of, merge_norm, probes, renamed
from compressor.hadamard import construction, hadamard, rotation
from compressor.kernels import activations as act
from compressor.layers import build, hadamard_of
from compressor.methods.outlier_tune import OutlierTune
from compressor.methods.quantize import Quantize
from compressor.methods.rotate import Rotate
from compressor.methods.smooth import Smooth
from compressor.model import as_loaded, is_tied, linears, twin
from compressor.plan import plan_of
from compressor.rotations import head_size, rotate_residual, rotate_values
from compressor.sensitivity import output_fisher
from compressor.statistics import AbsMax, ChannelSquare, Gram, TokenSample

TOLERANCE = 1e-4  # of the largest |logit|; what is right is 1e-6 off
IDS = torch.randint(4, 256, (4, 24), generator=torch.Generator().manual_seed(7))
# Family -> what stands in the way of rotating its residual stream; the others are rotated.
REFUSED = {
    "gemma2": "post_attention_layernorm is not read by linears alone",
    "gemma3": "post_attention_layernorm is not read by linears alone",
    "bert": "no output head",
    **{f: "subtracts the mean" for f in ("phi", "opt", "gpt_neox", "gpt2")},
}
ROTATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"]


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids)[0]


def off(model: nn.Module, expected: torch.Tensor) -> float:
    return ((logits(model) - expected).abs().max() / expected.abs().max()).item()


def rotated(model: nn.Module, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    method, working = Rotate(**options), twin(model)
    return working, method.fold(working, calibrate(working, IDS, method.fold_needs()))


def outliers(model: nn.Module, factor: float = 30.0) -> nn.Module:
    """As in trained models, two channels of each norm are `factor` times the others; readers make up for it."""
    model = as_loaded(model).model
    for fold in find_folds(model, sites(model)).values():
        if fold.kind == "norm":
            with torch.no_grad():
                norm: Any = model.get_submodule(fold.producer)
                norm.weight[[3, 17]] = (norm.weight[[3, 17]] + fold.offset) * factor - fold.offset
                for name in (*fold.site, *fold.others):
                    model.get_submodule(name).weight[:, [3, 17]] /= factor
    return model


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 64, 72, 80, 96, 112, 128, 576, 896, 1536])
def test_hadamard_matrices(order):
    h = hadamard(order)
    assert h is not None and bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    factors = construction(order)
    assert factors is not None and torch.tensor(factors).prod() == order


def test_orders_of_real_models_have_a_construction():
    for order in (960, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 5120, 8192, 14336):
        assert construction(order) is not None, order


@pytest.mark.parametrize(("order", "kind", "said"), [
    (576, "hadamard", "hadamard, 36 x 16"), (12, "hadamard", "hadamard, 12"), (92, "hadamard", "no Hadamard matrix"),
    (6, "hadamard", "no Hadamard matrix"), (64, "random", "random orthogonal"),
])  # fmt: skip
def test_rotations_are_orthogonal_and_seeded(order, kind, said):
    matrix, what = rotation(order, kind, torch.Generator().manual_seed(3))
    assert said in what
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    if what.startswith("hadamard"):
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))
    assert torch.equal(matrix, rotation(order, kind, torch.Generator().manual_seed(3))[0])
    assert not torch.equal(matrix, rotation(order, kind, torch.Generator().manual_seed(4))[0])


def test_merging_every_norm_changes_no_logit(tiny, family):
    """Negative and zero weights too."""
    model = as_loaded(tiny(family)).model
    folds = [f for f in find_folds(model, sites(model)).values() if f.kind == "norm"]
    with torch.no_grad():
        for fold in folds:
            norm: Any = model.get_submodule(fold.producer)
            norm.weight[[1, 2]] = torch.tensor([-fold.offset, -0.7 - fold.offset])
    expected, changed = logits(model), twin(model)
    for fold in folds:
        merge_norm(changed, fold)
        norm = changed.get_submodule(fold.producer)
        assert bool((norm.weight + fold.offset == 1).all())
    assert off(changed, expected) < TOLERANCE
    assert bool(folds) == (family != "bert")
    for fold in folds:  # the measure is not blind: a reader that is left out shows
        last = changed.get_submodule(fold.site[-1])
        kept, last.weight = last.weight, model.get_submodule(fold.site[-1]).weight
        assert off(changed, expected) > 10 * TOLERANCE, fold
        last.weight = kept


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_the_residual_stream_is_rotated_or_refused(tiny, family, kind):
    model = as_loaded(tiny(family)).model
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    if family in REFUSED:
        working = twin(model)
        held = {n: p for n, p in working.named_parameters()}
        with pytest.raises(ModelError, match=REFUSED[family]) as error:
            Rotate(residual=kind).fold(working, calibrate(working, IDS[:1], ()))
        assert str(error.value).endswith("set residual: none.")
        assert all(p is held[n] for n, p in working.named_parameters())  # nothing was changed
        return
    changed, report = rotated(model, residual=kind)
    assert off(changed, expected) < TOLERANCE
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items()), "the original was changed"
    experts = 4 if family == "mixtral" else 1
    said = {"norms_merged": 5, "writers": 2 * (1 + experts)}
    assert {k: report["residual"][k] for k in said} == said and kind in report["residual"]["matrix"]
    for name in (f"model.layers.{i}.self_attn.o_proj" for i in range(2)):  # and it is another basis
        a, b = (m.get_submodule(name).weight for m in (model, changed))
        assert not torch.allclose(a, b, atol=1e-2) and torch.allclose(a.norm(dim=0), b.norm(dim=0), rtol=1e-4)


def test_a_rotated_stream_has_no_outlier_channels(tiny):
    model = outliers(tiny("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 100
    changed, _ = rotated(model, residual="hadamard")
    table = changed.model.embed_tokens.weight.detach().abs().amax(0)
    assert table.max() / table.median() < 3
    wide = model.model.embed_tokens.weight.detach().abs().amax(0)
    assert wide.max() / wide.median() > 30


def test_a_wrong_rotation_is_refused_and_put_back(tiny, monkeypatch):
    """A model that reads its residual stream outside the blocks: every block is fine, the logits are not."""
    model = as_loaded(tiny("llama")).model
    final = model.model.norm

    class Biased(type(final)):
        def forward(self, x):
            return super().forward(x + 1.0)

    final.__class__ = Biased
    working = twin(model)
    held = {n: p for n, p in working.named_parameters()}
    with pytest.raises(ModelError, match="something outside its blocks reads or writes it"):
        rotate_residual(working, rotation(64, "hadamard", torch.Generator().manual_seed(0))[0])
    assert all(p is held[n] for n, p in working.named_parameters())
    monkeypatch.setattr("compressor.rotations.SAME", 1e9)
    rotate_residual(working, rotation(64, "hadamard", torch.Generator().manual_seed(0))[0])  # the check is what refused
    assert off(working, logits(model)) > TOLERANCE


def test_a_writer_that_is_left_out_is_seen(tiny, monkeypatch):
    model = as_loaded(tiny("llama")).model
    found = rotations._writers
    monkeypatch.setattr(rotations, "_writers", lambda under: found(under)[:-1])
    with pytest.raises(ModelError, match="in a way that is not understood"):
        rotated(model, residual="hadamard")


@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_a_tied_head_is_untied_everywhere(tiny, tiny_tokenizer, text, tmp_path, name):
    model = tiny(name, tie_word_embeddings=True)
    changed, report = rotated(as_loaded(model).model, residual="hadamard")
    assert not is_tied(changed) and report["residual"]["untied_bytes"] == 288 * 64 * 2
    steps = [{"rotate": {"residual": "hadamard"}}, {"quantize": {"weights": "int8"}}]
    recipe = make_recipe(text, *steps, embedding="keep", lm_head="keep")
    plan = plan_of(model, recipe)
    assert {"lm_head", "model.embed_tokens"} <= {row.name for row in plan.rows}
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer)
    assert model.config.tie_word_embeddings and artifact.config.tie_word_embeddings is False
    folder = artifact.save(tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((folder / "manifest.json").read_text())["tied"] == {}
    ours = logits(artifact.model())
    assert torch.equal(logits(load(folder).model()), ours)
    assert ((ours - logits(model)).norm() / logits(model).norm()) < 0.05  # int8 weights
    if hf_config.loads_in(artifact)["transformers"] == "yes":
        pytest.importorskip("compressed_tensors")
        from transformers import AutoModelForCausalLM

        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert ((logits(stock) - ours).norm() / ours.norm()) < 1e-4


def test_values_are_rotated_in_every_family(tiny, family):
    model = as_loaded(tiny(family)).model
    changed, report = rotated(model, values=True)
    assert off(changed, logits(model)) < TOLERANCE
    assert len(report["values"]) == 2 and {row["head_size"] for row in report["values"].values()} == {16}
    for name, row in report["values"].items():
        for touched in (name, row["producer"]):
            assert not torch.equal(changed.get_submodule(touched).weight, model.get_submodule(touched).weight)


@pytest.mark.parametrize("head_dim", [12, 24, 80, 10])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_head_sizes_that_are_no_powers_of_two(tiny, head_dim, kv_heads):
    model = as_loaded(tiny("qwen3", head_dim=head_dim, num_key_value_heads=kv_heads)).model
    changed, report = rotated(model, values=True)
    assert off(changed, logits(model)) < TOLERANCE
    assert [row["head_size"] for row in report["values"].values()] == [head_dim, head_dim]
    what = next(iter(report["values"].values()))["matrix"]
    assert what.startswith("random orthogonal, no Hadamard" if head_dim == 10 else "hadamard")


def test_a_block_across_heads_is_not_exact(tiny):
    """Twice the head's size, which attention does not mix with one set of weights."""
    model = as_loaded(tiny("llama", num_key_value_heads=4)).model
    _, under, inside = next(iter(probes(model, sites(model))))
    fold = next(f for f in folds_of(under, inside) if f.kind == "values")
    assert [rotations._values_proven(under, fold, size) for size in (8, 16, 32)] == [True, True, False]
    assert head_size(under, fold) == 16
    changed = twin(model)
    full = renamed(fold, lambda n: f"model.layers.0.{n}")
    rotate_values(changed, full, rotation(32, "hadamard", torch.Generator().manual_seed(0))[0])
    assert off(changed, logits(model)) > TOLERANCE


@pytest.mark.parametrize("block", [16, 32])
def test_rotated_inputs_change_no_logit(tiny, family, block):
    model = as_loaded(tiny(family)).model
    changed, report = rotated(model, inputs=block, where="all")
    assert off(changed, logits(model)) < TOLERANCE
    assert {hadamard_of(m) for m in linears(changed).values()} == {block}
    assert all(row["hadamard"] == block for row in report["inputs"].values())
    assert [s.names for s in sites(changed)] == [s.names for s in sites(model)]  # q, k and v stay one


def test_inputs_that_the_block_does_not_divide_are_left_alone(tiny):
    model = as_loaded(tiny("llama")).model
    changed, report = rotated(model, inputs=64, where="all")  # 64 divides 64, not 96
    assert off(changed, logits(model)) < TOLERANCE
    for name, layer in linears(changed).items():
        assert hadamard_of(layer) == (0 if name.endswith("down_proj") else 64)
    assert report["inputs"]["model.layers.0.mlp.down_proj"]["why"] == "64 does not divide 96"
    again, report = Rotate(inputs=16, where="all"), {}
    report = again.fold(changed, calibrate(changed, IDS, ()))
    assert report["inputs"]["model.layers.0.self_attn.q_proj"]["why"] == "rotated by an earlier step"
    assert off(changed, logits(model)) < TOLERANCE


def test_statistics_are_of_the_rotated_input(tiny):
    model = outliers(tiny("llama"))
    changed, _ = rotated(model, inputs=32, where="all")
    kinds = {Gram, ChannelSquare, AbsMax, TokenSample}
    plain, found = calibrate(model, IDS, kinds), calibrate(changed, IDS, kinds)
    h = act.rotate(torch.eye(96, dtype=torch.float64), 32).float()
    for site in plain.sites:
        name, matrix = site.names[0], h[: site.features, : site.features]
        gram = matrix @ plain.value(name, Gram) @ matrix
        torch.testing.assert_close(found.value(name, Gram), gram, rtol=1e-3, atol=1e-4 * float(gram.abs().max()))
        assert float(found.value(name, AbsMax)) != float(plain.value(name, AbsMax))
    name = "model.layers.0.self_attn.q_proj"  # the outliers are spread: 30 / √32 of what they were, and no less
    assert float(found.value(name, AbsMax)) < 0.5 * float(plain.value(name, AbsMax))


def test_where_one_linear_of_a_site_is_rotated_there_are_two_sites(tiny):
    model = as_loaded(tiny("llama")).model
    method, changed = Rotate(inputs=32, where="all"), twin(model)
    q = "model.layers.0.self_attn.q_proj"
    method.fold(changed, calibrate(changed, IDS, (), {q}))
    found = [s.names for s in sites(changed) if "layers.0.self_attn" in s.names[0]]
    assert found[:2] == [(q,), (q.replace("q_", "k_"), q.replace("q_", "v_"))]


def test_the_fisher_information_does_not_turn(tiny):
    """Its sums over input channels are the same in every basis, so sensitivity.py need not know of rotations."""
    model = as_loaded(tiny("llama")).model
    changed, _ = rotated(model, inputs=32, where="all")
    a, b = (output_fisher(m, IDS, list(linears(m)), torch.Generator().manual_seed(0)) for m in (model, changed))
    for name in a.weights:
        torch.testing.assert_close(a.weights[name], b.weights[name], rtol=1e-3, atol=1e-9)


def test_nothing_is_folded_into_a_rotated_input(tiny):
    """Scales are per channel of x, columns of the weight those of H x. Producers that rotate their input still fold."""
    model = outliers(tiny("llama"))
    changed, _ = rotated(model, inputs=32, where="all")
    assert not find_folds(changed, sites(changed))
    method = Smooth()
    report = method.fold(changed, calibrate(changed, IDS, method.fold_needs()))
    assert {row["kind"] for row in report.values()} == {"none"} and off(changed, logits(model)) < TOLERANCE
    some = twin(model)
    Rotate(inputs=32, where="all").fold(some, calibrate(some, IDS, (), [n for n in linears(some) if "v_proj" in n]))
    values = [f for f in find_folds(some, sites(some)).values() if f.kind == "values"]
    assert len(values) == 2 and hadamard_of(some.get_submodule(values[0].producer)) == 32


def test_biases_of_writers_turn_too(tiny):
    model = as_loaded(tiny("llama", attention_bias=True, mlp_bias=True)).model
    assert off(rotated(model, residual="hadamard")[0], logits(model)) < TOLERANCE


@pytest.mark.parametrize(("formats", "pays"), [("int8", True), ("nvfp4", False)])
def test_auto_rotates_where_that_lowers_the_error(tiny, formats, pays):
    """An outlier that sets the step of a whole token is worth spreading, one that sets that of a block of 16 is not."""
    changed, report = rotated(outliers(tiny("llama")), inputs=32, weights=formats, activations=formats)
    rows = report["inputs"]
    for row in rows.values():
        assert (row["hadamard"] == 32) == (row["error_after"] < row["error_before"])
        assert {hadamard_of(changed.get_submodule(n)) for n in row["linears"]} == {row["hadamard"]}
    norms = [rows[f"model.layers.{i}.{n}"] for i in (0, 1) for n in ("self_attn.q_proj", "mlp.gate_proj")]
    assert all((row["hadamard"] == 32) == pays for row in norms)
    assert not pays or all(row["error_after"] < 0.5 * row["error_before"] for row in norms)


@pytest.mark.parametrize("activations", ["int8", "none"])
def test_the_measured_error_is_that_of_what_is_rounded(tiny, activations):
    """Of the inputs where they are rounded, else of the weights."""
    model = outliers(tiny("llama"))
    _, report = rotated(model, inputs=32, weights="int8", activations=activations)
    name = "model.layers.0.mlp.down_proj"
    quantize = Quantize("int8", activations, scales="absmax")
    calibration = calibrate(model, IDS, {TokenSample})
    x = calibration.value(name, TokenSample)
    for working, key in ((model, "error_before"), (rotated(model, inputs=32, where="all")[0], "error_after")):
        layer = working.get_submodule(name)
        with torch.no_grad():
            y = model.get_submodule(name)(x)
            stored = build(quantize.apply(layer, quantize.plan({name: layer}, None)[name]))
            weight = layer.weight if activations == "int8" else stored.dequantize()
            stored = stored.quantize_input(x) @ weight.T
        ratio = ((stored - y).square().sum(-1) / y.square().sum(-1)).mean().sqrt().item()
        assert report["inputs"][name][key] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("weights", ["mxfp4", "nvfp4", "int8", "fp8"])
def test_every_format_stores_and_computes_it(tiny, weights):
    """The packed layer against its slow twin: the rotated linear on rounded weights."""
    model = outliers(tiny("llama"))
    changed, _ = rotated(model, inputs=16, where="all")
    quantize = Quantize(weights=weights)
    plans = quantize.plan(linears(changed), calibrate(changed, IDS, quantize.needs()))
    for name, layer in linears(changed).items():
        packed = quantize.apply(layer, plans[name])
        assert packed.attributes["hadamard"] == 16
        module, x = build(packed), torch.randn(3, layer.in_features)
        expected = act.rotate(x, 16) @ module.dequantize().T
        assert torch.allclose(module(x), expected, atol=1e-5 * float(expected.abs().max()))
        error = (module(x) - model.get_submodule(name)(x)).norm() / expected.norm()
        assert error < 0.2


def test_gptq_on_rotated_inputs(tiny):
    """Better than to nearest on H of the rotated input, and without the rotation's statistics it would not be."""
    model = outliers(tiny("llama"))
    changed, _ = rotated(model, inputs=32, where="all")

    def error(rounding: str) -> float:
        quantize = Quantize("mxfp4", "mxfp4", rounding=rounding)
        stored = twin(changed)
        plans = quantize.plan(linears(stored), calibrate(stored, IDS, quantize.needs()))
        for name, layer in linears(stored).items():
            stored.set_submodule(name, build(quantize.apply(layer, plans[name])))
        return float((logits(stored) - logits(model)).norm() / logits(model).norm())

    assert error("gptq") < error("nearest")


def test_outlier_tune_keeps_a_scale_a_token(tiny):
    changed, _ = rotated(outliers(tiny("llama")), inputs=32, where="all")
    method = OutlierTune(static_within=1e9)
    inputs = method.fold(changed, calibrate(changed, IDS, method.fold_needs()))
    assert {s.rule for s in inputs.sites} == {"int8"}
    plans = method.plan(linears(changed), calibrate(changed, IDS, method.needs()), inputs)
    name = "model.layers.0.mlp.down_proj"
    assert method.apply(linears(changed)[name], plans[name]).attributes["hadamard"] == 32


def make_recipe(text, *steps: dict[str, Any], **settings: Any) -> Recipe:
    calibration = {"windows": 4, "length": 32, "data": str(text)}
    return Recipe.from_dict({"calibration": calibration, "exports": ["safetensors"], **settings, "steps": list(steps)})


ONLINE = {"rotate": {"inputs": 32, "where": "all"}}
MXFP4 = {"quantize": {"weights": "mxfp4", "activations": "mxfp4", "on_misfit": "pad", "rounding": "gptq"}}


def test_through_the_pipeline_and_back_from_the_folder(tiny, tiny_tokenizer, text, tmp_path, plain_torch):
    model = outliers(tiny("llama"))
    step = {"quantize": {"weights": "int8", "activations": "int8"}}
    recipe = make_recipe(text, ONLINE, step, runtime="compressor")
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer)
    assert all(p.attributes["hadamard"] == 32 for p in artifact.packed.values())
    plain = compress(model, make_recipe(text, step), tokenizer=tiny_tokenizer)
    assert "hadamard" not in next(iter(plain.packed.values())).attributes
    a, b = ((logits(x.model()) - logits(model)).norm() for x in (artifact, plain))
    assert a < 0.7 * b  # outliers are what it is for
    folder = artifact.save(tmp_path / "out")
    assert torch.equal(logits(load(folder).model()), logits(artifact.model()))
    assert torch.equal(logits(artifact.model()), logits(artifact.model(dense=True)))
    said = hf_config.loads_in(artifact)["transformers"]
    assert said.startswith("no: ") and "its input is rotated in blocks of 32" in said
    assert hf_config.loads_in(plain)["transformers"] == "yes"
    again = compress(model, recipe, tokenizer=tiny_tokenizer)
    assert all(torch.equal(t, again.tensors()[n]) for n, t in artifact.tensors().items())


def test_what_no_step_stores_is_not_rotated(tiny, tiny_tokenizer, text):
    """A kept linear is a plain nn.Linear of the model's class, which rotates nothing."""
    step = {"quantize": MXFP4["quantize"] | {"ignore": ["*.v_proj", "*.down_proj"]}}
    model = tiny("llama")
    artifact = compress(model, make_recipe(text, ONLINE, step, runtime="compressor"), tokenizer=tiny_tokenizer)
    kept = artifact.kept["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(kept.float(), model.model.layers[0].self_attn.v_proj.weight)
    assert artifact.packed["model.layers.0.self_attn.q_proj"].attributes["hadamard"] == 32
    assert float((logits(artifact.model()) - logits(model)).norm() / logits(model).norm()) < 0.4


def test_a_method_that_loses_the_rotation_is_stopped(tiny, tiny_tokenizer, text, monkeypatch):
    apply = Quantize.apply

    def forgetful(self, layer, plan):
        packed = apply(self, layer, plan)
        packed.attributes.pop("hadamard", None)
        return packed

    monkeypatch.setattr(Quantize, "apply", forgetful)
    with pytest.raises(AssertionError, match="quantize lost a rotation"):
        compress(tiny("llama"), make_recipe(text, ONLINE, MXFP4, runtime="compressor"), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("steps", [
    [ONLINE, MXFP4],
    [ONLINE, {"quantize": {"weights": "nvfp4", "activations": "nvfp4", "on_misfit": "pad"}}],
    [ONLINE, {"quantize": {"weights": "int4", "group_size": 32}}],
    [ONLINE, {"quantize": {"weights": "int8", "activations": "int8"}}],
    [ONLINE, {"quantize": {"weights": "fp8", "activations": "fp8"}}],
    [{"rotate": {"residual": "hadamard", "values": True}}, {"rotate": {"inputs": 16}}, MXFP4],
], ids=["mxfp4", "nvfp4", "int4", "int8", "fp8", "all three"])  # fmt: skip
def test_the_onnx_graph_computes_the_same_nodes(tiny, tiny_tokenizer, text, tmp_path, steps):
    """Node by node with activations rounded, and as a whole, in stock onnxruntime."""
    pytest.importorskip("onnxruntime")
    from compressor.verify_runtimes import check_onnxruntime, check_torch

    recipe = make_recipe(text, *steps, runtime="compressor", exports=["safetensors", "onnx"])
    artifact = compress(outliers(tiny("llama", tie_word_embeddings=True)), recipe, tokenizer=tiny_tokenizer)
    assert any(p.attributes.get("hadamard") for p in artifact.packed.values())
    folder = artifact.save(tmp_path / "out")
    rows = [*check_torch(folder, tmp_path), *check_onnxruntime(folder, tmp_path)]
    assert len(rows) > 3 and all(row.status == "ok" for row in rows), rows


def test_folded_rotations_load_in_transformers(tiny, tiny_tokenizer, text, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = outliers(tiny("llama", tie_word_embeddings=True))
    step = {"rotate": {"residual": "hadamard", "values": True}}
    artifact = compress(model, make_recipe(text, step, {"quantize": {"weights": "int8"}}), tokenizer=tiny_tokenizer)
    assert hf_config.loads_in(artifact) == {"transformers": "yes"}
    report = artifact.record["steps"]["1 rotate"]
    assert report["residual"]["untied_bytes"] == 288 * 64 * 2 and len(report["values"]) == 2
    norms = [t for n, t in artifact.kept.items() if "norm" in n]
    assert len(norms) == 5 and all(bool((t == 1).all()) for t in norms)
    stock = AutoModelForCausalLM.from_pretrained(artifact.save(tmp_path / "out"), dtype=torch.float32).eval()
    found, expected = logits(stock), logits(artifact.model())
    assert ((found - expected).norm() / expected.norm()) < 1e-4
    assert ((found - logits(model)).norm() / logits(model).norm()) < 0.05


@pytest.mark.parametrize(("options", "message"), [
    ({}, "nothing to rotate; give residual, values or inputs"),
    ({"inputs": 32, "values": True}, "rotate inputs in a second rotate step"),
    ({"inputs": 32, "weights": "int4", "activations": "int8"}, "do not go with"),
])  # fmt: skip
def test_options_that_cannot_be_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Rotate(**options)


def test_online_rotations_are_for_our_own_runtime(text):
    with pytest.raises(RecipeError, match="inputs is not what transformers computes; set runtime: compressor"):
        make_recipe(text, ONLINE, MXFP4)
    with pytest.raises(RecipeError, match="inputs is 8"):
        make_recipe(text, {"rotate": {"inputs": 8}}, MXFP4, runtime="compressor")
    make_recipe(text, {"rotate": {"residual": "hadamard"}}, MXFP4)


def test_residual_after_inputs_says_which_comes_first(tiny):
    changed, _ = rotated(as_loaded(tiny("llama")).model, inputs=32, where="all")
    with pytest.raises(ModelError, match="q_proj rotates its input already; put residual before inputs"):
        Rotate(residual="hadamard").fold(changed, calibrate(changed, IDS[:1], ()))


def test_fp4_says_that_it_takes_no_rotated_input(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("runtime: compressor\nsteps:\n  - rotate: {inputs: 32}\n  - fp4: {bits: 4}\n")
    with pytest.raises(RecipeError, match=r"r.yaml.*fp4 does not store inputs that an earlier step rotates"):
        Recipe.load(recipe)
