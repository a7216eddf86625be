"""CATS: which neurons of gated feed-forward layers are left out, how many, and the folder."""

from __future__ import annotations

import pytest
import torch

from compressor import Recipe, compress, load
from compressor.errors import ModelError, RecipeError
from compressor.methods.cats import Gate, find_gates
from compressor.sparse import SparseActivation, everywhere
from compressor.verify import FAILED, verify

IDS = torch.arange(4, 40)[None]


def made(model, tokenizer, text, sparsity, **more):
    chosen = {"calibration": {"windows": 3, "length": 64}, "steps": [{"cats": {"sparsity": sparsity}}]}
    return compress(model, Recipe.from_dict(chosen | more), tokenizer=tokenizer, data=text, measure=False)


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3"])
def test_gates_are_seen_and_not_named(tiny, kind):
    mlp = "model.layers.{}.mlp".format
    expected = [Gate(*(f"{mlp(i)}.{part}" for part in ("gate_proj", "act_fn", "up_proj", "down_proj"))) for i in (0, 1)]
    assert find_gates(tiny(kind)) == expected
    assert find_gates(tiny("opt")) == []


def test_small_gates_are_left_out_as_often_as_asked_for(tiny, tiny_tokenizer, text):
    model = made(tiny("llama"), tiny_tokenizer, text, 0.2, exports=["safetensors"]).model()
    mlp = model.model.layers[1].mlp
    every = sum(p.numel() for n, p in tiny("llama").named_parameters() if n.endswith("proj.weight"))
    share = 0.2 * every / (4 * 64 * 96)  # of two layers' up and down
    gates, read = [], []
    mlp.gate_proj.register_forward_hook(lambda m, a, out: gates.append(out))
    mlp.down_proj.register_forward_hook(lambda m, a, out: read.append(a[0]))
    with torch.inference_mode(), everywhere():
        model(
            input_ids=tiny_tokenizer(
                "Numbers such as 42 occur, so do names; the lazy dog is told.", return_tensors="pt"
            ).input_ids
        )
    kept = torch.nn.functional.silu(gates[0]).abs() > mlp.act_fn.threshold
    kept[:, 0] = True
    assert torch.equal(read[0] != 0, kept)
    assert abs((~kept[:, 1:]).double().mean().item() - share) < 0.06


def test_nothing_left_out_is_the_model_and_a_folder_runs(tiny, tiny_tokenizer, text, tmp_path):
    artifact = made(tiny("llama"), tiny_tokenizer, text, 0.2)
    assert isinstance(artifact.model().model.layers[0].mlp.act_fn, SparseActivation)
    folder = artifact.save(tmp_path / "out")
    with torch.inference_mode(), everywhere():
        assert torch.equal(load(folder).model()(IDS).logits, artifact.model()(IDS).logits)
        dense = made(
            tiny("llama"), tiny_tokenizer, text, 0.0, exports=["safetensors"], steps=[{"cats": {"sparsity": 0.0}}]
        )
        model = tiny("llama")
        for name in ("embed_tokens",):
            table = getattr(model.model, name).weight
            table.data = table.data.bfloat16().float()
        model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()
        assert torch.equal(dense.model()(IDS).logits, model(IDS).logits)
    report = verify(folder, runtimes=("torch", "onnxruntime"))
    assert report.ok, [r for r in report.rows if r.status == FAILED]
    assert any(r.check == "sparsity" for r in report.rows)


def test_errors(tiny, tiny_tokenizer, text):
    with pytest.raises(
        RecipeError, match=r"cats: sparsity 0.6 is more than up and down of all neurons, which are 0.400"
    ):
        made(tiny("llama"), tiny_tokenizer, text, 0.6)
    with pytest.raises(ModelError, match="no targeted linear of OPTForCausalLM is the gate"):
        made(tiny("opt"), tiny_tokenizer, text, 0.1)
    with pytest.raises(RecipeError, match="sparsity 1 is not a share"):
        Recipe.from_dict({"steps": [{"cats": {"sparsity": 1.0}}]})
