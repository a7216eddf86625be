"""A step that changes shapes: recipe, factors, later steps on them, the folder and every runtime that reads it."""

import json

import pytest
import torch
from torch import nn

from compressor import Recipe, compress, load
from compressor.errors import ModelError, RecipeError
from compressor.exporters.onnx_graph import compressed_nodes
from compressor.layers import QuantLinear
from compressor.lowrank import LowRankLinear, weights
from compressor.model import linears, skeleton, twin
from compressor.plan import plan_of
from compressor.runtimes import read_graph
from compressor.structure import Shaped, as_json, between, from_json, hollow, reshape
from compressor.verify import FAILED, OK, verify

IDS = torch.arange(4, 40)[None]
SVD = {"keep": 0.8}
FP4 = {"weights": "nvfp4", "rounding": "gptq"}


def recipe(*steps, **more):
    return Recipe.from_dict({"calibration": {"windows": 3, "length": 24}, "steps": list(steps), **more})


def logits(model):
    with torch.inference_mode():
        out = model(input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_factors_are_linears_that_a_later_step_quantizes(tiny, tiny_tokenizer, text, tmp_path, form):
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    chosen = recipe({"svd": {**SVD, "form": form}}, {"quantize": {**FP4, "targets": ["*.down", "*.up"]}})
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=text)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "the original was changed"
    rebuilt = artifact.model()
    pair = rebuilt.model.layers[1].mlp.gate_proj
    assert isinstance(pair, LowRankLinear) and pair.pivoted == (form == "pivoted")
    assert isinstance(pair.down, QuantLinear) and isinstance(pair.up, QuantLinear)
    factored = len(artifact.structure)  # of 14: a layer stays whole where factors would cost more
    assert 12 <= factored <= 14 and len(artifact.packed) == 2 * factored
    ledger = artifact.record["ledger"]
    assert [row["after"] for row in ledger] == ["1 svd"] and ledger[0]["kl"] < artifact.record["quality"]["kl"]
    assert ledger[0]["parameters"] < artifact.record["parameters"]
    if form == "plain":  # its graph is what the pivoted form's is, without the last two nodes
        return
    artifact.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.structure == artifact.structure and loaded.record["ledger"] == ledger
    assert torch.equal(logits(loaded.model()), logits(rebuilt))
    report = verify(tmp_path / "out", runtimes=("torch", "onnxruntime"))  # seconds each; `compress` verifies in all
    assert {r.runtime for r in report.rows if r.status == OK} == {"files", "torch", "onnxruntime"}
    assert report.ok, [r for r in report.rows if r.status == FAILED]


def test_a_feed_forward_of_factors_and_of_whole_layers_has_a_node_for_each(tiny, tiny_tokenizer, text, tmp_path):
    """In bf16 it is one op; in four bits its module computes what its linears hold."""
    model = tiny("llama", num_hidden_layers=1)
    chosen = recipe({"svd": {**SVD, "form": "plain", "targets": ["*.gate_proj"]}}, {"quantize": {"weights": "nvfp4"}})
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    graph = read_graph(artifact.save(tmp_path / "out"))
    names = [node.name for node in graph.graph.node if node.name]
    assert len(names) == len(set(names)) and compressed_nodes(graph, artifact.packed).keys() == artifact.packed.keys()


def test_factors_alone_are_a_folder_that_stock_transformers_refuses(tiny, tiny_tokenizer, text, tmp_path):
    from transformers import AutoModelForCausalLM

    chosen = recipe({"svd": SVD}, exports=["safetensors"])
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    assert not artifact.packed
    factors = [t for n, t in artifact.kept.items() if n.endswith((".down.weight", ".up.weight"))]
    assert len(factors) == 2 * len(artifact.structure) >= 24 and all(t.dtype == torch.bfloat16 for t in factors)
    assert artifact.record["kept"]["model.layers.0.mlp.up_proj.down"] == "step 1 (svd): bf16"
    folder = artifact.save(tmp_path / "out")
    assert torch.equal(logits(load(folder).model()), logits(artifact.model()))
    with pytest.raises(Exception, match=r"(?i)open this folder with compressor.load, because .* rank 32"):
        AutoModelForCausalLM.from_pretrained(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["coverage"]["original_parameters"] > manifest["coverage"]["parameters"]
    assert from_json(manifest["structure"]) == artifact.structure


def test_every_family_takes_low_rank(family, tiny, tiny_tokenizer, text):
    model = tiny(family)
    options = {"keep": 0.97, "rank_multiple": 1, "ignore": ["*.experts.*"] if family == "mixtral" else []}
    chosen = recipe({"svd": options})  # weights without any structure: little can go
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    rebuilt, original = logits(artifact.model()), logits(model)
    assert 0.001 < (rebuilt - original).norm() / original.norm() < 0.5
    assert sum(isinstance(m, LowRankLinear) for m in artifact.model().modules()) == len(artifact.structure) > 0


def test_the_dry_run_shows_the_shapes_that_come_out(tiny, tiny_tokenizer, text):
    chosen = recipe({"svd": {**SVD, "targets": ["*.mlp.*"]}}, {"quantize": FP4})
    plan = plan_of(tiny("llama"), chosen)
    rows = {row.name: row for row in plan.rows}
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    assert {n for n in rows if ".layers." in n} == set(artifact.packed)
    for name, packed in artifact.packed.items():
        assert rows[name].shape == (packed.attributes["out_features"], packed.attributes["in_features"])
        assert rows[name].bytes_after == packed.size_bytes - 4, name  # beside the global scale
    assert plan.bytes_before == 2 * sum(p.numel() for n, p in tiny("llama").named_parameters() if p.dim() == 2)


def test_shapes_change_before_anything_is_stored(tiny):
    with pytest.raises(RecipeError, match=r"step 2 \(svd\).*already compressed by an earlier step; put svd before it"):
        plan_of(tiny("llama"), recipe({"quantize": FP4}, {"svd": SVD}))
    with pytest.raises(RecipeError, match=r"matches no linear.*q_proj"):
        plan_of(tiny("llama"), recipe({"svd": {**SVD, "targets": ["*.nope"]}}))


def test_transforms_before_it_fold_what_its_factors_store(tiny, tiny_tokenizer, text):
    steps = [{"svd": {**SVD, "targets": ["*.mlp.*"]}}, {"quantize": FP4}]
    smooth = {"smooth": {"rule": "smoothquant"}}
    artifact = compress(tiny("llama"), recipe(smooth, *steps), tokenizer=tiny_tokenizer, data=text, measure=False)
    folds = artifact.record["steps"]["1 smooth"]
    assert folds["model.layers.0.mlp.gate_proj"]["kind"] == folds["model.layers.0.self_attn.q_proj"]["kind"] == "norm"
    rotate = {"rotate": {"inputs": 16, "where": "all", "weights": "nvfp4", "activations": "nvfp4"}}
    rotated = recipe(rotate, *steps, runtime="compressor")
    with pytest.raises(ModelError, match=r"gate_proj: its input is rotated.*put rotate after svd"):
        compress(tiny("llama"), rotated, tokenizer=tiny_tokenizer, data=text, measure=False)


def test_widths_of_their_own_are_structure_too(tiny):
    """What a pruning step leaves: per-layer widths, a bias where there was none."""
    model = tiny("llama")
    working = twin(model)
    mlp = working.model.layers[1].mlp
    for name, layer in (("gate_proj", nn.Linear(64, 48, False)), ("up_proj", nn.Linear(64, 48, False))):
        setattr(mlp, name, layer)
    mlp.down_proj = nn.Linear(48, 64, True)
    found = between(skeleton(model.config, "causal-lm"), working)
    assert found["model.layers.1.mlp.down_proj"] == Shaped(
        "linear", {"out_features": 64, "in_features": 48, "bias": True}
    )
    assert len(found) == 3 and from_json(json.loads(json.dumps(as_json(found)))) == found
    empty = reshape(skeleton(model.config, "causal-lm"), found)
    empty.load_state_dict(working.state_dict(), assign=True)
    assert torch.equal(logits(empty), logits(working)) and not between(empty, working)
    with pytest.raises(ModelError, match=r"unknown structure 'conv'; known: linear, lowrank_linear"):
        reshape(empty, {"model.layers.0.mlp.up_proj": Shaped("conv")})


def test_a_hollow_twin_keeps_shapes_and_ties(tiny):
    model = hollow(tiny("llama", tie_word_embeddings=True))
    assert all(p.is_meta for p in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {n: m.weight.shape for n, m in linears(model).items()} == {
        n: m.weight.shape for n, m in linears(tiny("llama")).items()
    }


def test_ranks_cost_what_they_say():
    for pivoted in (False, True):
        pair = LowRankLinear.shaped(48, 40, 16, pivoted=pivoted)
        assert sum(p.numel() for p in pair.parameters()) == weights(48, 40, 16, pivoted)
