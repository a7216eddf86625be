"""Pruned models through the user's own door: budget, shapes, what is kept, folders and who loads them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor import Recipe, compress, load
from compressor.errors import ModelError, RecipeError
from compressor.importance import SCORES
from compressor.methods.cfsp import CFSP
from compressor.model import linears, twin
from compressor.plan import plan_of
from compressor.progress import Silent
from compressor.run import Run
from compressor.runtimes import OnnxSession, torch_greedy

IDS = torch.arange(4, 40)[None]
WINDOWS = torch.randint(4, 288, (3, 24), generator=torch.Generator().manual_seed(5))
OBS = {"prune": 0.25, "score": "obs", "allocation": "cfsp"}


def recipe(*steps, windows=3, **more):
    base = {"calibration": {"windows": windows, "length": 24}, "exports": ["safetensors"]}
    return Recipe.from_dict({**base, "steps": list(steps), **more})


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS)[0]


def widths(model):
    return [m.in_features for n, m in linears(model).items() if n.endswith("down_proj")]


@pytest.fixture
def pruned(tiny, tiny_tokenizer, text):
    def run(step, family="llama", windows=3, **changes):
        model = tiny(family, **changes)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())  # as in a checkpoint, so that storing what is not pruned loses nothing
        artifact = compress(
            model, recipe({"cfsp": step}, windows=windows), tokenizer=tiny_tokenizer, data=text, measure=False
        )
        return model, artifact

    return run


def test_nothing_pruned_changes_no_bit(pruned, tiny):
    model, artifact = pruned({"prune": 0})
    assert torch.equal(logits(artifact.model()), logits(model))
    model = tiny("llama")  # nor are weights rounded that are no bf16
    assert torch.equal(logits(rewritten(model, WINDOWS, prune=0)), logits(model))


@pytest.mark.parametrize("allocation", ["cfsp", "uniform", "global"])
@pytest.mark.parametrize("prune", [0.2, 0.5])
def test_the_budget_is_met_exactly(pruned, allocation, prune):
    _, artifact = pruned({"prune": prune, "allocation": allocation}, num_hidden_layers=4)
    found = widths(artifact.model())
    assert all(w % 8 == 0 and w >= 8 for w in found)
    assert sum(found) == round(4 * 96 * (1 - prune) / 8) * 8


def rewritten(model, ids, **options):
    """What the step alone makes of the model on windows [S, L], in float32."""
    changed = twin(model)
    run = Run(ids, torch.float32, torch.device("cpu"), Silent(), model, lambda _: ids)
    CFSP(**options).rewrite(changed, set(linears(changed)), run)
    return changed


def test_twice_the_text_leaves_the_allocation_as_it_is(tiny):
    model = tiny("llama", num_hidden_layers=4)
    few = WINDOWS[:1, :3]  # with sums over tokens in place of means, more would be all or nothing, once as twice
    once, twice = (rewritten(model, few.repeat(n, 1), **OBS | {"prune": 0.5}) for n in (1, 2))
    assert len(set(widths(once))) > 1 and widths(once) == widths(twice)
    assert all(kept(once, i) == kept(twice, i) for i in range(4))


def kept(model, layer):
    """The rows of gate_proj that are left, whatever their order."""
    return sorted(model.model.layers[layer].mlp.gate_proj.weight.tolist())


@pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
def test_the_order_of_the_channels_does_not_matter(tiny, score):
    model, other = tiny("llama"), tiny("llama")
    for layer in other.model.layers:
        order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.copy_(part.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    first, second = (rewritten(m, WINDOWS, prune=0.5, score=score) for m in (model, other))
    assert all(kept(first, i) == kept(second, i) for i in range(2))
    torch.testing.assert_close(logits(first), logits(second), atol=5e-3, rtol=5e-3)  # repaired weights in bf16


@pytest.mark.parametrize(
    "step",
    [{"cfsp": OBS | {"heads": 1}}, {"cfsp": {"score": "magnitude", "repair": "bias"}}, {"depth": {"drop": 0.25}}],
    ids=lambda step: next(iter(step)),
)
def test_blocks_that_visit_a_device_give_the_same(tiny, tiny_tokenizer, text, step):
    """To us "cpu:0" is another device than the model's "cpu": what runs there is a copy, as on any device."""
    chosen = recipe(step, calibration={"windows": 3, "length": 24, "dtype": "float32"})
    model = tiny("llama", num_hidden_layers=4)
    here, there = (
        compress(model, chosen, tokenizer=tiny_tokenizer, data=text, measure=False, device=device)
        for device in (None, "cpu:0")
    )
    assert all(torch.equal(t, there.kept[n]) for n, t in here.kept.items())


def test_repair_loses_less_of_every_layers_output(pruned):
    errors = {}
    for repair in ("none", "least_squares"):
        _, artifact = pruned({"prune": 0.5, "repair": repair})
        rows = artifact.record["steps"]["1 cfsp"]["layers"].values()
        errors[repair] = [row["error"] for row in rows]
    assert all(0 < a < 0.9 * b for a, b in zip(errors["least_squares"], errors["none"], strict=True))


def test_a_bias_of_flap_is_refused_by_stock_transformers_with_the_reason(pruned, tmp_path):
    _, artifact = pruned({"prune": 0.5, "score": "flap", "allocation": "uniform", "repair": "bias"})
    artifact.save(tmp_path / "out")
    assert artifact.model().model.layers[0].mlp.down_proj.bias.abs().max() > 0
    with pytest.raises(Exception, match=r"(?i)compressor.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


STOCK = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(4, 40)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(folder + "/again")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", dtype=torch.float32)
    with torch.inference_mode():
        found = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, found)
    numpy.save(folder + "/logits.npy", found.numpy())
assert "compressor" not in sys.modules
"""
STOCK_ONNX = """
import sys, numpy, onnxruntime
(folder,) = sys.argv[1:]
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
ids = numpy.arange(4, 40)[None]
feeds = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "position_ids": numpy.arange(36)[None]}
for i in session.get_inputs():
    if i.name not in feeds:  # the cache of a layer: [batch, heads, past, size]
        feeds[i.name] = numpy.zeros((1, i.shape[1], 0, i.shape[3]), numpy.float32)
feeds = {i.name: feeds[i.name] for i in session.get_inputs()}
numpy.save(folder + "/logits.npy", session.run(["logits"], feeds)[0])
assert not {"compressor", "torch", "transformers"} & set(sys.modules)
"""


def alone(script, *folders):
    """The logits that a process which knows nothing of compressor gets from each folder."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script, *map(str, folders)], check=True, env=clean)
    return [torch.from_numpy(np.load(folder / "logits.npy")) for folder in folders]


def test_one_width_and_padded_ones_are_plain_configs_that_transformers_loads_and_saves(pruned, tmp_path):
    equal = OBS | {"prune": 0.3, "allocation": "uniform", "widths": "equal"}  # 67.2 of 96 channels
    made = {"equal": equal, "padded": OBS | {"a": 20.0, "widths": "padded"}}
    artifacts = {name: pruned(step, num_hidden_layers=3)[1] for name, step in made.items()}
    assert artifacts["equal"].config.intermediate_size == 68
    for name, artifact in artifacts.items():
        assert not artifact.structure
        artifact.save(tmp_path / name)
    found = alone(STOCK, *(tmp_path / name for name in artifacts))
    for artifact, given in zip(artifacts.values(), found, strict=True):
        torch.testing.assert_close(given, logits(artifact.model()), atol=2e-4, rtol=1e-3)


def test_shapes_of_each_layer_in_onnxruntime_and_saved_again(tiny, tiny_tokenizer, text, tmp_path):
    """Fewer blocks, a key-value head less and a width for each layer: the graph and its cache have those shapes."""
    steps = ({"depth": {"drop": 0.25}}, {"cfsp": OBS | {"a": 20.0, "heads": 1}})
    chosen = recipe(*steps, exports=["safetensors", "onnx"])
    artifact = compress(tiny("llama", num_hidden_layers=4), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    model = artifact.model()
    assert len(set(widths(model))) > 1 and len(widths(model)) == 3 and artifact.structure
    artifact.save(tmp_path / "out")
    torch.testing.assert_close(alone(STOCK_ONNX, tmp_path / "out")[0], logits(model), atol=1e-3, rtol=1e-3)
    session = OnnxSession(tmp_path / "out")
    _, cache = session.prefill(IDS)
    assert len(cache) == 6 and {c.shape[1] for c in cache.values()} == {1}
    assert session.greedy(IDS, 4) == torch_greedy(model, IDS, 4)
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded.model()), logits(model))
    loaded.recipe = chosen.model_copy(update={"exports": ["safetensors"]})
    loaded.save(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again").model()), logits(model))


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_padded_widths_are_a_plain_config_and_compute_the_same(pruned, tmp_path, kind):
    step = OBS | {"a": 20.0}
    _, exact = pruned(step, kind, num_hidden_layers=3)
    _, padded = pruned(step | {"widths": "padded"}, kind, num_hidden_layers=3)
    assert not padded.structure and padded.config.intermediate_size == max(widths(exact.model()))
    torch.testing.assert_close(logits(padded.model()), logits(exact.model()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_heads_go_in_whole_groups_and_the_config_says_so(pruned, tmp_path, kind):
    _, artifact = pruned({"prune": 0, "heads": 1}, kind)
    config, model = artifact.config, artifact.model()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert model.model.layers[0].self_attn.q_proj.out_features == 32 and not artifact.structure
    artifact.save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()
    torch.testing.assert_close(logits(stock), logits(model), atol=2e-4, rtol=1e-3)


def test_later_steps_store_what_is_left(tiny, tiny_tokenizer, text):
    steps = (
        {"cfsp": {"prune": 0.3, "align": 32}},
        {"quantize": {"weights": "nvfp4", "activations": "nvfp4", "rounding": "gptq"}},
    )
    artifact = compress(tiny("llama"), recipe(*steps), tokenizer=tiny_tokenizer, data=text)
    packed = artifact.packed["model.layers.0.mlp.down_proj"].attributes
    assert packed["in_features"] == 64 and len(artifact.packed) == 14
    assert artifact.record["ledger"][0]["after"] == "1 cfsp"


def test_low_rank_after_pruning(tiny, tiny_tokenizer, text):
    steps = ({"cfsp": {"prune": 0.25, "allocation": "uniform"}}, {"svd": {"keep": 0.8, "targets": ["*.down_proj"]}})
    artifact = compress(tiny("llama"), recipe(*steps), tokenizer=tiny_tokenizer, data=text, measure=False)
    assert artifact.model().model.layers[0].mlp.down_proj.in_features == 72


def test_experts_are_pruned_each_by_itself(pruned):
    model, artifact = pruned({"prune": 0.25, "allocation": "uniform"}, "mixtral")
    assert artifact.config.intermediate_size == 72 and not artifact.structure
    experts = [expert for layer in model.model.layers for expert in layer.block_sparse_moe.experts]
    narrower = [expert for layer in artifact.model().model.layers for expert in layer.block_sparse_moe.experts]
    places = [
        [before.w1.weight.tolist().index(row) for row in after.w1.weight.tolist()]
        for before, after in zip(experts, narrower, strict=True)
    ]
    assert all(len(set(kept)) == 72 and kept == sorted(kept) for kept in places)
    assert len({tuple(kept) for kept in places}) == len(experts)


def test_the_dry_run_says_what_the_run_does(tiny):
    plan = plan_of(tiny("llama"), recipe({"cfsp": {"prune": 0.25}}))
    shapes = {row.name: row.shape for row in plan.rows}
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 72)
    assert shapes["model.layers.0.mlp.up_proj"] == (72, 64)
    assert plan.bytes_after < plan.bytes_before


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        ({"align": 64}, "llama", "align 64 does not divide a width of 96 channels; use one of 32"),
        ({"heads": 2}, "llama", "has 2 key-value heads; at least one must stay"),
        ({"heads": 1}, "phi3", "no attention whose heads can be cut out"),
        ({"targets": ["*.q_proj"]}, "llama", "no feed-forward layer to prune among its targets"),
        ({"targets": ["*.down_proj"]}, "llama", "no feed-forward layer to prune among its targets"),
        ({"prune": 1.0}, "llama", "prune 1 is not a share"),
        ({"widths": "equal"}, "llama", "widths: equal goes with allocation: uniform"),
        ({"score": "obs", "allocation": "global"}, "llama", "obs only ranks the channels of one"),
    ],
)
def test_what_cannot_be_is_said(tiny, step, kind, message):
    with pytest.raises((ModelError, RecipeError), match=message):
        plan_of(tiny(kind), recipe({"cfsp": step}))


def test_the_manifest_says_who_kept_what(pruned, tmp_path):
    _, artifact = pruned(OBS)
    report = artifact.record["steps"]["1 cfsp"]
    json.dumps(report)
    assert report["kept"] == sum(row["kept"] for row in report["layers"].values()) == 144
    assert set(report["turned"]) == {"model.layers.0", "model.layers.1"}
