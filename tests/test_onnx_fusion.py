"""`graph: ort`: what is fused is counted, and the graph computes what the model does in every runtime that loads it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor import Recipe, compress
from compressor.artifact import Artifact
from compressor.exporters import onnx_attention, onnx_graph, safetensors_file
from compressor.model import as_loaded, embedding_name, head_name, is_tied
from compressor.runtimes import OnnxSession, read_graph
from compressor.verify import FAILED, Check
from compressor.verify_runtimes import CHECKS

TOLERANCE = 1e-4  # whole models in float32 on both sides
NORMS = "SimplifiedLayerNormalization"
# Of one layer (gemma3: two, one with a sliding window), and the norm and the head behind it.
EXPECTED: dict[str, dict[str, int]] = {
    "llama": {"GroupQueryAttention": 1, NORMS: 1, f"Skip{NORMS}": 2, "QuickGelu": 1},
    "qwen3": {"GroupQueryAttention": 1, NORMS: 3, f"Skip{NORMS}": 2, "QuickGelu": 1},
    "gemma3": {"GroupQueryAttention": 2, NORMS: 9, f"Skip{NORMS}": 4},
    "gpt2": {"GroupQueryAttention": 1},
    "opt": {},
    "bert": {},
}


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def export(source: Any, folder: Path, graph: str = "ort") -> Artifact:
    """The uncompressed model as a folder of weights and graph."""
    loaded = as_loaded(source)
    model = loaded.model
    tied = {f"{head_name(model)}.weight": f"{embedding_name(model)}.weight"} if is_tied(model) else {}
    kept = {name: p.detach() for name, p in model.named_parameters() if name not in tied}
    recipe = Recipe.load("nvfp4a16", [f"graph={graph}"])
    artifact = Artifact(model.config, loaded.kind, None, recipe, {}, kept, tied)
    folder.mkdir()
    safetensors_file.write(folder / "model.safetensors", artifact.tensors())
    onnx_graph.export(artifact, folder)
    return artifact


@pytest.mark.parametrize("name", EXPECTED)
def test_fused_graphs_agree_with_torch(name: str, tiny: Any, tmp_path: Path) -> None:
    source = tiny(name, num_hidden_layers=2 if name == "gemma3" else 1)
    made = export(source, tmp_path / name).record["graph"]
    assert {kind: n for kind, n in made.items() if kind not in ("FusedMatMul", "attention")} == EXPECTED[name]
    assert ("portable" in made.get("attention", "")) == (name == "opt")  # it says what it could not fuse, and why
    session = OnnxSession(tmp_path / name)
    torch.manual_seed(0)
    if name == "bert":
        ids = torch.randint(4, 288, (2, 9))
        with torch.inference_mode():
            assert relative(session.prefill(ids)[0], source(input_ids=ids).last_hidden_state) < TOLERANCE
        return
    for batch, first, second in [(1, 1, 1), (1, 20, 3), (3, 20, 1)]:
        ids = torch.randint(4, 288, (batch, first + second))
        with torch.inference_mode():
            expected = source(input_ids=ids).logits
        found, past = session.prefill(ids[:, :first])
        assert relative(found, expected[:, :first]) < TOLERANCE
        assert relative(session.prefill(ids[:, first:], past)[0], expected[:, first:]) < TOLERANCE
    for padded in (slice(0, 2), slice(4, 6)):  # left, right
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, padded] = 0
        ids, positions = torch.randint(4, 288, (2, 6)), (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            expected = source(**given).logits
        empty = {n: np.zeros(session._past_shape(n, 2), np.float32) for n in session.past_names}
        feeds = {n: v.numpy() for n, v in given.items() if n in session.inputs}
        found = torch.from_numpy(session.session.run(["logits"], {**feeds, **empty})[0])
        assert relative(found[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_the_op_is_the_attention_of_torch() -> None:
    """Grouped heads, a cache, a mask with holes and a soft cap; keys and values come back joined."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, heads * 8, generator=generator) for heads in (4, 2, 2))
    past_k, past_v = torch.randn(2, 2, 2, 5, 8, generator=generator)
    mask = torch.rand(2, 1, 3, 8, generator=generator) > 0.3
    mask[..., 0] = True
    out, keys, values = onnx_attention.grouped_attention(q, k, v, past_k, past_v, mask, 4, 0.5, 0.0)
    assert torch.equal(keys[:, :, :5], past_k) and torch.equal(values[:, 1, 5:], v[..., 8:])
    heads = q.unflatten(-1, (4, 8)).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads, keys, values, attn_mask=mask, scale=0.5, enable_gqa=True
    )
    assert relative(out.unflatten(-1, (4, 8)).transpose(1, 2), expected) < 1e-5
    assert relative(onnx_attention.grouped_attention(q, k, v, past_k, past_v, mask, 4, 0.5, 1.0)[0], out) > 1e-2


@pytest.fixture(scope="module")
def written(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.load("w4a4", ["calibration.windows=2", "calibration.length=24", "graph=ort"])
    artifact = compress(tiny_folder("llama"), recipe, measure=False)
    return artifact.save(tmp_path_factory.mktemp("fused") / "w4a4")


def checks(folder: Path, scratch: Path, runtimes: list[str]) -> list[Check]:
    """What `verify` finds, without a process for each runtime."""
    return [row for name in runtimes for row in CHECKS[name](folder, scratch)]


def test_verification_passes_and_the_manifest_says_what_was_fused(written: Path, tmp_path: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["graph"]["GroupQueryAttention"] == 2 and manifest["graph"]["merged linears"] == 10
    assert json.loads((written / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    kinds = [n.op_type for n in read_graph(written).graph.node]
    first, second = (i for i, kind in enumerate(kinds) if kind == "GroupQueryAttention")
    assert second - first == 14
    genai = ["onnxruntime-genai"] if importlib.util.find_spec("onnxruntime_genai") else []
    rows = checks(written, tmp_path, ["torch", "onnxruntime", *genai])
    assert not [r for r in rows if r.status == FAILED], rows
    view = "without activation rounding"
    passed = {r.check for r in rows if r.runtime == "onnxruntime"}
    assert {"nodes", *(f"{c} {view}" for c in ("prefill", "cached decode", "greedy", "batch of two lengths"))} <= passed


def test_verification_finds_what_is_wired_wrong(written: Path, tmp_path: Path) -> None:
    """Cosines for sines; a mask that the op is not shown, so that padding is attended to."""
    folder = shutil.copytree(written, tmp_path / "out")
    graph = read_graph(folder)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[10] = ""
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    rows = checks(folder, tmp_path, ["torch", "onnxruntime"])
    assert {r.check for r in rows if r.status == FAILED} == {"batch of two lengths without activation rounding"}
    turn = next(n for n in graph.graph.node if n.op_type == "RotaryEmbedding")
    turn.input[2], turn.input[3] = turn.input[3], turn.input[2]
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    rows = checks(folder, tmp_path, ["onnxruntime"])
    assert "prefill without activation rounding" in {r.check for r in rows if r.status == FAILED}


def test_optimum_generates_a_batch_padded_on_the_left(tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    source = tiny("llama")
    for p in source.parameters():
        p.data.mul_(4 if p.dim() == 2 else 1)  # so that it does not say the same token for ever
    folder = tmp_path / "ort"
    export(source, folder)
    source.config.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    model = optimum.ORTModelForCausalLM.from_pretrained(folder)
    ids, mask = torch.randint(4, 288, (2, 9), generator=torch.Generator().manual_seed(3)), torch.ones(2, 9).long()
    ids[1, :4], mask[1, :4] = 3, 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    expected = source.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(set(expected[1, 9:].tolist())) > 3
