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
from compressor.errors import CompressorError
from compressor.exporters import onnx_attention, onnx_graph, safetensors_file
from compressor.kernels import native, swiglu
from compressor.model import as_loaded, embedding_name, head_name, is_tied
from compressor.runtimes import OnnxSession, read_graph
from compressor.verify import FAILED, Check
from compressor.verify_runtimes import CHECKS

TOLERANCE = 1e-4  # whole models in float32 on both sides
NORMS, MERGED = "SimplifiedLayerNormalization", "merged linears"
# Of one layer (gemma3: two, one with a sliding window), and the norm and the head behind it.
EXPECTED: dict[str, dict[str, int]] = {
    "llama": {"GroupQueryAttention": 1, NORMS: 1, f"Skip{NORMS}": 2, "SwiGLU": 1, MERGED: 5},
    "qwen3": {"GroupQueryAttention": 1, NORMS: 3, f"Skip{NORMS}": 2, "SwiGLU": 1, MERGED: 5},
    "gemma3": {"GroupQueryAttention": 2, NORMS: 9, f"Skip{NORMS}": 4, MERGED: 10},
    "gpt2": {"GroupQueryAttention": 1},
    "opt": {MERGED: 3},
    "bert": {MERGED: 3},
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
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    safetensors_file.write(folder / "model.safetensors", artifact.tensors(), order)
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
    assert second - first == 8
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
    turn = next(n for n in graph.graph.node if n.op_type == "GroupQueryAttention")
    turn.input[7], turn.input[8] = turn.input[8], turn.input[7]
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


def attention_model(packed: bool, rotary: bool, softcap: float, size: int) -> Any:
    """One node of ours as a model: heads 6, kv heads 2."""
    import onnx_ir as ir

    from compressor.exporters import onnx_functions, onnx_nodes

    kinds = {
        "seqlens_k": ir.DataType.INT32,
        "total_sequence_length": ir.DataType.INT32,
        "position_ids": ir.DataType.INT64,
    }
    left_out = {"key", "value"} if packed else set()
    left_out |= set() if rotary else {"cos_cache", "sin_cache", "position_ids"}
    values = [
        None if name in left_out else ir.Value(name=name, type=ir.TensorType(kinds.get(name, ir.DataType.FLOAT)))
        for name in onnx_nodes.INPUTS["GroupQueryAttention"]
    ]
    attributes = {
        "num_heads": 6,
        "kv_num_heads": 2,
        "head_size": size,
        "do_rotary": int(rotary),
        "scale": size**-0.5,
        "softcap": softcap,
    }
    node = ir.node("GroupQueryAttention", values, attributes, domain=onnx_nodes.DOMAIN, num_outputs=3)
    for index, value in enumerate(node.outputs):
        value.name, value.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": onnx_nodes.OPSET, onnx_nodes.DOMAIN: onnx_nodes.VERSION}
    graph = ir.Graph([v for v in values if v], node.outputs, nodes=[node], opset_imports=opsets, name="attention")
    model = ir.Model(graph, ir_version=10)
    onnx_functions.attach_bodies(model)
    return ir.to_proto(model).SerializeToString()


@pytest.fixture
def kernels() -> None:
    try:
        native.library()
    except CompressorError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni"])
@pytest.mark.parametrize(
    ("packed", "rotary", "softcap", "size"),
    [(True, True, 0.0, 64), (False, True, 0.0, 48), (False, False, 30.0, 40), (True, False, 0.0, 80)],
)
def test_the_attention_kernel_computes_what_its_body_computes(
    kernels: None, isa: str, packed: bool, rotary: bool, softcap: float, size: int
) -> None:
    """And what torch computes; where the body refuses a batch with several new tokens behind a past, torch alone."""
    import onnxruntime

    best = native.isa()
    if not native.use_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    model, torch_generator = attention_model(packed, rotary, softcap, size), torch.Generator().manual_seed(0)
    options = onnxruntime.SessionOptions()
    native.register_ops(options)
    session = onnxruntime.InferenceSession(model, options)
    body = onnxruntime.InferenceSession(model)
    for batch, tokens, past in [(1, 1, 0), (1, 1, 200), (2, 1, 33), (1, 129, 0), (1, 7, 31), (3, 17, 0), (2, 5, 6)]:
        total = past + tokens
        random = [torch.randn(batch, tokens, n * size, generator=torch_generator) for n in (6, 2, 2)]
        held = [torch.randn(batch, 2, past, size, generator=torch_generator) for _ in range(2)]
        mask = (torch.arange(total) <= torch.arange(past, total)[:, None]).expand(batch, 1, tokens, total).clone()
        mask[0, :, :, : total // 3] = False  # padded on the left: some rows see nothing at all
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        angles = torch.rand(batch * tokens, size // 2, generator=torch_generator) * 6
        positions = torch.arange(batch * tokens).reshape(batch, tokens)
        q, k, v = random
        if rotary:
            q, k = (turned(x, angles, size) for x in (q, k))
        expected = onnx_attention.grouped_attention(q, k, v, *held, mask, 6, size**-0.5, softcap)
        feeds = {
            "query": torch.cat(random, -1) if packed else random[0],
            "past_key": held[0],
            "past_value": held[1],
            "seqlens_k": torch.full((batch,), total - 1, dtype=torch.int32),
            "total_sequence_length": torch.tensor(total, dtype=torch.int32),
            "attention_bias": bias,
        }
        feeds |= {} if packed else {"key": random[1], "value": random[2]}
        feeds |= {"cos_cache": angles.cos(), "sin_cache": angles.sin(), "position_ids": positions} if rotary else {}
        given = {name: tensor.numpy() for name, tensor in feeds.items()}
        found = session.run(None, given)
        for a, b in zip(found, expected, strict=True):
            assert relative(torch.from_numpy(a), b) < 2e-6
        if batch == 1 or not past:
            stock = body.run(None, given)
            seen = mask.any(-1)[:, 0]  # rows of padding have no meaning: the stock operator gives zeros
            assert relative(torch.from_numpy(found[0])[seen], torch.from_numpy(stock[0])[seen]) < 2e-6
            for a, b in zip(found[1:], stock[1:], strict=True):
                assert relative(torch.from_numpy(a), torch.from_numpy(b)) < 2e-6
    assert native.use_isa(best)


def turned(x: Tensor, angles: Tensor, size: int) -> Tensor:
    """x [B, S, heads * D] with every head turned by the angles [B * S, D / 2]."""
    a, b = x.unflatten(-1, (-1, size)).chunk(2, -1)
    cos, sin = (f(angles).reshape(*x.shape[:2], 1, -1) for f in (torch.cos, torch.sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(2)


def test_swiglu_computes_what_its_reference_computes(kernels: None) -> None:
    best = native.isa()
    for isa in filter(native.use_isa, ("portable", "avx2", "avx512vnni")):
        for shape in [(1, 2), (1, 62), (33, 254), (3, 40, 1026), (0, 8), (200, 3072)]:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 8
            assert torch.allclose(swiglu.swiglu(x), swiglu.reference(x), rtol=1e-6, atol=1e-30), (isa, shape)
    assert native.use_isa(best)


def test_linears_of_one_input_share_a_node_and_the_bytes_of_the_file(written: Path) -> None:
    """Their order in the file is that of the rows, so no byte is stored twice; a node says whose rows it computes."""
    graph, entries = read_graph(written), safetensors_file.header(written / "model.safetensors")
    names = [n.name for n in graph.graph.node if "+" in n.name]
    parts = ["model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj"]
    assert [parts_of.split("+") for parts_of in names if "q_proj" in parts_of] == [
        [p.format(i) for p in parts] for i in (0, 1)
    ]
    initializers = {t.name: {e.key: e.value for e in t.external_data} for t in graph.graph.initializer}
    whole = initializers["+".join(f"{p.format(0)}.weight_packed" for p in parts)]
    offset = entries[f"{parts[0].format(0)}.weight_packed"][2]
    assert int(whole["offset"]) == offset
    assert int(whole["length"]) == sum(entries[f"{p.format(0)}.weight_packed"][3] for p in parts)


PIVOTED = {"keep": 0.7, "rank_multiple": 4}
PLAIN = {"keep": 0.7, "form": "plain", "targets": ["*.mlp.*"]}
SITES = [["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"]]


@pytest.mark.parametrize(
    ("steps", "leaf", "sites"),
    [
        ([{"svd": PIVOTED}], "down.weight", SITES),
        ([{"svd": PLAIN}, {"quantize": {"weights": "nvfp4"}}], "down.weight_packed", SITES[:1]),
    ],
)
def test_first_factors_of_one_input_share_a_node(
    steps: list[Any], leaf: str, sites: list[list[str]], tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """q, k and v of low rank read their input once, whatever their ranks; what each rank becomes is its own node.

    Lean models have a LowRankLinear instead, where factors are not quantized."""
    chosen = {"graph": "ort", "calibration": {"windows": 2, "length": 16}, "steps": steps, "lean": False}
    recipe = Recipe.from_dict(chosen)
    artifact = compress(tiny("llama", num_hidden_layers=1), recipe, tokenizer=tiny_tokenizer, measure=False)
    artifact.save(tmp_path / "out")
    ranks = {name.rpartition(".")[2]: shaped.attributes["rank"] for name, shaped in artifact.structure.items()}
    wide = [t for t in read_graph(tmp_path / "out").graph.initializer if "+" in t.name and t.name.endswith(f".{leaf}")]
    named = [sorted(part.split(".")[-3] for part in t.name.split("+")) for t in wide]
    assert sorted(named) == sites
    assert [t.dims[0] for t in wide] == [sum(ranks[part] for part in parts) for parts in named]
    ids = torch.randint(4, 288, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = artifact.model()(input_ids=ids).logits
    assert relative(OnnxSession(tmp_path / "out").prefill(ids)[0], expected) < TOLERANCE
