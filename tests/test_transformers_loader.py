"""Folders that stock transformers refuses, after register_transformers(): the model of compressor.load, bit for bit."""

import torch
from transformers import AutoModel, AutoModelForCausalLM

from compressor import Recipe, compress, load
from compressor.lowrank import LowRankLinear

IDS = torch.arange(4, 40)[None]


def written(model, steps, tokenizer, text, folder, **more):
    calibration = {"windows": 2, "length": 24, "data": str(text)}
    recipe = Recipe.from_dict({"calibration": calibration, "exports": ["safetensors"], "steps": steps, **more})
    return compress(model, recipe, tokenizer=tokenizer, measure=False).save(folder)


def out(model):
    with torch.inference_mode():
        found = model(input_ids=IDS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def test_low_rank_in_four_bits_loads(registered, tiny, tiny_tokenizer, text, tmp_path):
    steps = [{"svd": {"keep": 0.8}}, {"quantize": {"weights": "nvfp4", "activations": "nvfp4"}}]
    folder = written(tiny("llama"), steps, tiny_tokenizer, text, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model.model.layers[0].mlp.up_proj, LowRankLinear)
    assert torch.equal(out(model), out(load(folder).model(torch.bfloat16)))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, IDS.shape[1] + 3)


def test_corrections_are_not_left_out(registered, tiny, tiny_tokenizer, text, tmp_path):
    steps = [{"quantize": {"weights": "nvfp4"}}, {"correct": {"bits": 2.0}}]
    folder = written(tiny("llama"), steps, tiny_tokenizer, text, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.optional("correction_up") is not None
    assert torch.equal(out(model), out(load(folder).model(torch.bfloat16)))


def test_a_packed_table_and_an_encoder_load(registered, tiny, tiny_tokenizer, text, tmp_path):
    tables = {"embedding": "int8-row", "lm_head": "int8-row"}
    steps = [{"quantize": {"weights": "int4", "group_size": 32}}]
    folder = written(tiny("llama", tie_word_embeddings=True), steps, tiny_tokenizer, text, tmp_path / "tied", **tables)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(out(model), out(load(folder).model()))
    folder = written(tiny("bert"), [{"svd": {"keep": 0.7}}], tiny_tokenizer, text, tmp_path / "bert")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(out(model), out(load(folder).model()))


def test_what_stock_transformers_loads_still_goes_its_way(registered, tiny, tiny_tokenizer, text, tmp_path):
    folder = written(tiny("llama"), [{"quantize": {"weights": "int8"}}], tiny_tokenizer, text, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
