"""A low-rank pair beside a stored layer: what it makes up for, where it runs, and as a LoRA adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from compressor import Recipe, compress, load
from compressor.errors import OutputError, RecipeError
from compressor.layers import build
from compressor.model import linears
from compressor.plan import plan_of
from compressor.rank_allocation import share_ranks
from compressor.verify import FAILED, OK, verify

IDS = torch.arange(4, 40)[None]
QUANTIZE = {"quantize": {"weights": "nvfp4", "rounding": "gptq"}}


def recipe(*steps, **more):
    return Recipe.from_dict({"calibration": {"windows": 6, "length": 48}, "steps": list(steps), **more})


@pytest.fixture
def text(tmp_path, prose):
    path = tmp_path / "text.txt"
    path.write_text(prose * 12)
    return path


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def kl(model, other):
    p, q = (logits(m).double().log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_it_makes_up_for_rounding_as_predicted(tiny, tiny_tokenizer, text):
    model = tiny("llama")
    made = {}
    for bits in (None, 0.5, 2.0):
        steps = [QUANTIZE] + ([{"correct": {"bits": bits}}] if bits else [])
        made[bits] = compress(model, recipe(*steps), tokenizer=tiny_tokenizer, data=text, measure=bits == 2.0)
    measured = {bits: kl(model, artifact.model()) for bits, artifact in made.items()}
    assert measured[2.0] < 0.6 * measured[None] and measured[2.0] < measured[0.5] < measured[None]
    (rounded,) = made[2.0].record["ledger"]
    assert rounded["after"] == "1 quantize" and rounded["kl"] > 1.3 * made[2.0].record["quality"]["kl"]
    report = made[2.0].record["steps"]["2 correct"]
    assert sum(r["kl_after"] for r in report.values()) < 0.5 * sum(r["kl_before"] for r in report.values())
    linear = sum(m.weight.numel() for m in linears(model).values())
    for bits in (0.5, 2.0):
        pairs = [t for p in made[bits].packed.values() for n, t in p.tensors.items() if n.startswith("correction_")]
        assert bits * 0.8 < 16 * sum(t.numel() for t in pairs) / linear <= bits
    for name, packed in made[2.0].packed.items():
        rows = [t for n, t in packed.tensors.items() if not n.startswith("correction_")]
        assert all(torch.equal(a, b) for a, b in zip(rows, made[None].packed[name].tensors.values(), strict=True))


def test_a_corrected_folder_runs_everywhere_and_is_an_adapter(tiny, tiny_tokenizer, text, tmp_path):
    steps = ({"quantize": {**QUANTIZE["quantize"], "activations": "nvfp4"}}, {"correct": {"bits": 1.0}})
    chosen = recipe(*steps, exports=["safetensors", "onnx", "lora"])
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    folder = artifact.save(tmp_path / "out")
    assert torch.equal(logits(load(folder).model()), logits(artifact.model()))
    assert torch.allclose(logits(artifact.model(dense=True)), logits(artifact.model()), atol=2e-2)
    report = verify(folder, runtimes=("torch", "onnxruntime"))
    assert report.ok, [r for r in report.rows if r.status == FAILED]
    assert {r.runtime for r in report.rows if r.status == OK} == {"files", "torch", "onnxruntime"}
    config = json.loads((folder / "lora" / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(folder / "lora" / "adapter" / "adapter_model.safetensors")
    base = load_file(folder / "lora" / "base" / "model.safetensors")
    assert not any("correction" in name for name in base)
    for name in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        rank = config["rank_pattern"].get(name, config["r"])
        assert a.shape[0] == b.shape[1] == rank == config["alpha_pattern"].get(name, config["lora_alpha"])
        assert torch.allclose(a.float().norm(dim=1), b.float().norm(dim=0), rtol=0.02)  # float16 holds both
        module = build(artifact.packed[name])
        x = torch.randn(2, module.in_features)
        assert torch.allclose(module(x), module.rounded(x) + x @ a.float().T @ b.float().T, atol=1e-5)
    (folder / "lora" / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert not verify(folder, runtimes=()).ok


def test_the_pair_of_a_rotated_layer_reads_the_input_as_it_is(tiny, tiny_tokenizer, text):
    model = tiny("llama")
    rotate = {"rotate": {"inputs": 16, "where": "all", "weights": "nvfp4", "activations": "nvfp4"}}
    quantize = {"quantize": {"weights": "nvfp4", "activations": "nvfp4"}}
    made = [
        compress(model, one, tokenizer=tiny_tokenizer, data=text, measure=False)
        for more in ([], [{"correct": {"bits": 4.0}}])
        for one in [recipe(rotate, quantize, *more, runtime="compressor")]
    ]
    assert made[1].packed["model.layers.0.mlp.up_proj"].attributes["hadamard"] == 16
    name = "model.layers.0.mlp.up_proj"
    layer, x = model.get_submodule(name), torch.randn(64, 64)
    before, after = (build(artifact.packed[name]) for artifact in made)
    for module in (before, after):
        module.attributes["activations"] = "none"
    assert (after(x) - layer(x)).norm() < 0.9 * (before(x) - layer(x)).norm()


def test_the_dry_run_counts_the_pairs(tiny):
    for bits, expected in ((None, 4.5), (0.5, 5.0)):
        steps = [QUANTIZE] + ([{"correct": {"bits": bits}}] if bits else [])
        rows = [r for r in plan_of(tiny("llama"), recipe(*steps)).rows if ".layers." in r.name]
        assert all(r.bits_per_weight == pytest.approx(expected, abs=0.01) for r in rows)


def test_ranks_go_where_they_save_most():
    losses = {"steep": torch.tensor([9.0, 1.0, 0.5, 0.4, 0.0]), "flat": torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])}
    shapes = {"steep": (4, 4), "flat": (4, 4)}
    assert share_ranks(shapes, losses, 8 * 3, 1) == {"steep": 1, "flat": 2}
    assert share_ranks(shapes, None, 8 * 3, 1) == {"steep": 1, "flat": 2}  # equal, and one more by name
    assert share_ranks(shapes, losses, 7, 1) == {"steep": 0, "flat": 0}


def test_what_cannot_be_is_refused(tiny, tiny_tokenizer, text, tmp_path):
    sequential = {"quantize": {**QUANTIZE["quantize"], "sequential": True}}
    with pytest.raises(RecipeError, match=r"step 2 \(correct\).*set quantize.sequential=false"):
        plan_of(tiny("llama"), recipe(sequential, {"correct": {}}))
    with pytest.raises(RecipeError, match=r"bits 0 must be above 0"):
        recipe(QUANTIZE, {"correct": {"bits": 0.0}})
    chosen = recipe(QUANTIZE, exports=["safetensors", "lora"])
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    with pytest.raises(OutputError, match="the recipe has none; add one, or drop lora"):
        artifact.save(tmp_path / "out")
