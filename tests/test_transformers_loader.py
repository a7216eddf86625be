"""Folders that stock transformers refuses, after register_transformers(): the model of compressor.load, bit for bit;
models of experts with and without it, in the version at hand."""

import json
import re
from importlib import metadata

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from compressor import Recipe, compress, load
from compressor.console import how_to_load
from compressor.experts import unfuse
from compressor.folder import read_manifest
from compressor.layers import build
from compressor.lowrank import LowRankLinear
from compressor.verify import _not_applicable, verify

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


MAJOR = metadata.version("transformers").partition(".")[0]
EXPERTS, REST = {"targets": ["*.experts.*"]}, {"targets": ["*"], "ignore": ["*.experts.*"]}
INT8 = {"quantize": REST | {"weights": "int8", "rounding": "nearest"}}
PMQ = {"pmq": EXPERTS | {"bits": 2.5, "choices": [2, 3], "group_size": 32, "rounding": "nearest"}}
# What a model of experts is stored as -> (steps, what transformers 5 makes of it: yes, a note, or a refusal).
STORED = {
    "int4": ([{"quantize": EXPERTS | {"weights": "int4", "group_size": 32, "rounding": "nearest"}}, INT8], "yes"),
    "mxfp4": ([{"quantize": {"weights": "mxfp4", "on_misfit": "keep", "rounding": "nearest"}}], "yes"),
    "fp8": ([{"quantize": {"weights": "fp8", "activations": "fp8", "rounding": "nearest"}}], "with inputs of experts"),
    "pmq": ([PMQ, INT8], "no: transformers 5 merges experts that all have one format, and"),
    "pmq, one width a layer": (
        [{"pmq": PMQ["pmq"] | {"uniform": "layer"}}, INT8], "no: transformers 5 merges experts that all have one format"
    ),
    "nvfp4": (
        [{"quantize": {"weights": "nvfp4", "on_misfit": "keep", "rounding": "nearest"}}],
        "no: transformers 5 cannot merge experts in the format nvfp4-pack-quantized",
    ),
    "w8a8": (
        [{"quantize": {"weights": "int8", "activations": "int8", "rounding": "nearest"}}],
        "no: transformers 5 cannot merge experts in the format int-quantized",
    ),
    "kept": ([INT8], "no: transformers 5 merges experts as if they were compressed, and these are not"),
}  # fmt: skip
FUSED = ("gpt_oss", "granitemoe")  # no version has their experts one by one in a checkpoint
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", *FUSED)
CASES = [(f, s) for s in STORED for f in (FAMILIES if s in ("int4", "pmq") else ("mixtral", "olmoe"))]
CASES += [(f, "kept") for f in FUSED]


@pytest.fixture(scope="module")
def mixture(tiny, tiny_tokenizer, prose, tmp_path_factory):
    """mixture(family, stored) -> its folder, written once; weights of the original fit bf16, as in checkpoints."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(prose * 6)
    made = {}

    def folder(family, stored):
        if (family, stored) not in made:
            model = tiny(family)
            for p in model.parameters():
                p.data.copy_(p.data.bfloat16())
            where = tmp_path_factory.mktemp("out") / "folder"
            made[family, stored] = written(model, STORED[stored][0], tiny_tokenizer, text, where)
        return made[family, stored]

    return folder


@pytest.mark.parametrize(("name", "stored"), CASES)
def test_what_loads_in_says_of_experts_is_so(mixture, name, stored):
    """In this version: every weight is ours, rounded to bf16, or the folder is refused with the manifest's reason."""
    pytest.importorskip("compressed_tensors")
    folder = mixture(name, stored)
    said = read_manifest(folder)["loads_in"]
    if name in FUSED:
        assert said.keys() == {"transformers"} and "is no tensor of" in said["transformers"]
    else:
        assert said["transformers"] == "yes" and said.get("transformers 5", "yes").startswith(STORED[stored][1])
    answer = said.get(f"transformers {MAJOR}", said["transformers"])
    if answer.startswith("no: "):
        reason = re.escape(answer.removeprefix("no: ").partition(";")[0])
        with pytest.raises(Exception, match=f"(?i)(compressor.load|register_transformers).*{reason}"):
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.endswith(".padding") for key in info["unexpected_keys"])
    out(model)  # the first forward decompresses
    unfuse(model)
    for linear, packed in load(folder).packed.items():
        assert torch.equal(model.get_submodule(linear).weight, build(packed).dequantize().bfloat16()), linear


@pytest.mark.parametrize(("name", "stored"), CASES)
def test_registered_experts_are_those_of_compressor_load(registered, mixture, name, stored):
    folder = mixture(name, stored)
    said = read_manifest(folder)["loads_in"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = name in FUSED or said.get("transformers 5", "yes") != "yes"
    assert (type(model.hf_quantizer).__name__ == "Quantizer") == ours
    if ours:
        assert torch.equal(out(model), out(load(folder).model(torch.bfloat16)))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(out(model), out(load(folder).model()))
        for config in (model.config, load(folder).config):
            assert "experts_implementation" not in config.to_dict()


def test_both_versions_write_the_same_config(mixture):
    """Of experts that transformers 5 merges: names, their order and what is left alone do not depend on the writer."""
    config = json.loads((mixture("mixtral", "int4") / "config.json").read_text())["quantization_config"]
    experts, rest = config["config_groups"].values()
    where = [f"model.layers.{layer}.block_sparse_moe" for layer in (0, 1)]
    assert experts["targets"] == [f"{w}.experts.{e}.w{n}" for w in where for e in range(4) for n in (1, 2, 3)]
    assert experts["weights"]["num_bits"] == 4 and rest["weights"]["num_bits"] == 8
    assert rest["targets"] == [f"model.layers.{layer}.self_attn.{n}_proj" for layer in (0, 1) for n in "koqv"]
    assert config["ignore"] == ["lm_head", *(f"{w}.gate" for w in where)]


def test_experts_first_where_another_layer_comes_before_them(mixture):
    """transformers 5 decodes experts by the first group; DeepSeek's first layer has none and sorts before them."""
    config = json.loads((mixture("deepseek_v2", "int4") / "config.json").read_text())["quantization_config"]
    assert all(".experts." in name for name in next(iter(config["config_groups"].values()))["targets"])


def test_the_answer_of_this_version_is_what_verify_and_the_summary_say(mixture):
    folder = mixture("mixtral", "pmq")
    manifest = read_manifest(folder)
    lines, refused = dict(how_to_load(folder, manifest)), manifest["loads_in"]["transformers 5"]
    assert "from_pretrained" in lines["transformers"] and lines["transformers 5"] == refused
    assert _not_applicable("transformers", manifest, folder) == (refused if MAJOR == "5" else None)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_verify_compares_experts_of_one_width_in_both_versions(name, tiny, tiny_tokenizer, text, tmp_path):
    steps = [{"quantize": {"weights": "int4", "group_size": 32}}]
    folder = written(tiny(name), steps, tiny_tokenizer, text, tmp_path / "out")
    report = verify(folder, runtimes=("torch", "transformers"))
    assert report.ok, report.rows
    assert any(row.check.startswith("logits") for row in report.rows)
