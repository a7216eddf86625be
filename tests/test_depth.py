"""Blocks that are left out: which, what is numbered anew, and who runs what is left."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor import Recipe, compress, load
from compressor.errors import ModelError, RecipeError
from compressor.methods.depth import leave_out
from compressor.model import blocks, twin
from compressor.plan import plan_of
from compressor.verify_runtimes import check_torch, check_transformers

IDS = torch.arange(4, 24)[None]
RECIPE = {"exports": ["safetensors"], "calibration": {"windows": 2, "length": 24}, "steps": [{"depth": {"drop": 0.25}}]}


def logits(model, **more):
    with torch.inference_mode():
        return model(input_ids=IDS, **more)[0]


def identity(model, number):
    """The block adds nothing: its output is its input."""
    layer = model.model.layers[number]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def test_a_block_that_does_nothing_goes_and_nothing_changes(tiny, tiny_tokenizer, text, tmp_path):
    model = tiny("llama", num_hidden_layers=4)
    identity(model, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())  # as in a checkpoint
    artifact = compress(model, Recipe.from_dict(RECIPE), tokenizer=tiny_tokenizer, data=text)
    report = artifact.record["steps"]["1 depth"]
    assert report["left_out"] == ["model.layers.2"] and report["turned"]["model.layers.2"] < 1e-3
    assert artifact.config.num_hidden_layers == 3 and model.config.num_hidden_layers == 4
    torch.testing.assert_close(logits(artifact.model()), logits(model), atol=1e-4, rtol=1e-4)
    assert all(t.dtype == torch.bfloat16 for n, t in artifact.kept.items() if n.endswith("proj.weight"))
    artifact.save(tmp_path / "out")
    check_torch(tmp_path / "out", tmp_path)  # leaves what the next one compares with
    assert {row.check: row.status for row in check_transformers(tmp_path / "out", tmp_path)} == {
        "tokenizer": "ok",
        "logits": "ok",
    }
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()
    torch.testing.assert_close(logits(stock, use_cache=True), logits(load(tmp_path / "out").model()), atol=0.05, rtol=0)


def test_what_is_left_is_numbered_anew(tiny):
    original = tiny("gemma2", num_hidden_layers=4)
    model = twin(original)
    kinds = list(original.config.layer_types)
    leave_out(model, [1])
    assert [name for name, _ in blocks(model)] == [f"model.layers.{i}" for i in range(3)]
    assert [block.self_attn.layer_idx for _, block in blocks(model)] == [0, 1, 2]
    assert model.config.layer_types == [kinds[0], kinds[2], kinds[3]] and original.config.layer_types == kinds
    model.generation_config.max_new_tokens = 4
    cached = model.generate(IDS, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(IDS, do_sample=False, use_cache=False))


def test_a_config_that_cannot_say_what_is_left_is_refused(tiny, tiny_tokenizer, text):
    model = tiny("mistral", num_hidden_layers=4)
    model.model.layers[3].self_attn.sliding_window = 8  # where no config has it
    with pytest.raises(ModelError, match=r"cannot say which blocks are left \(self_attn.sliding_window is"):
        compress(model, Recipe.from_dict(RECIPE), tokenizer=tiny_tokenizer, data=text, measure=False)


def test_the_original_keeps_its_numbers(tiny):
    original = tiny("llama", num_hidden_layers=4)
    leave_out(twin(original), [0, 1])
    assert [block.self_attn.layer_idx for _, block in blocks(original)] == [0, 1, 2, 3]


def test_the_dry_run_has_fewer_blocks(tiny):
    plan = plan_of(tiny("llama", num_hidden_layers=4), Recipe.from_dict(RECIPE))
    assert len({row.name.split(".")[2] for row in plan.rows if ".layers." in row.name}) == 3


def test_the_ends_stay(tiny):
    with pytest.raises(RecipeError, match=r"drop 0.75 of 4 blocks is 3; at most 2 can go"):
        plan_of(
            tiny("llama", num_hidden_layers=4),
            Recipe.from_dict({**RECIPE, "steps": [{"depth": {"drop": 0.75}}]}),
        )
