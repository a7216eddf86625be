"""The exported graph in stock onnxruntime, optimum and onnxruntime-genai, on tiny models of each family."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from compressor.artifact import Artifact
from compressor.errors import OutputError
from compressor.exporters import onnx_graph, onnx_weights, safetensors_file
from compressor.layers import Packed, build
from compressor.methods.quantize import LayerPlan, Quantize
from compressor.model import as_loaded, embedding_name, head_name, is_tied, linears
from compressor.recipe import Recipe
from compressor.runtimes import OnnxSession, expose, read_graph

# Whole models in float32 on both sides.
TOLERANCE = 1e-4
NVFP4 = Quantize("nvfp4", scales="absmax")
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi", "opt", "gpt_neox", "gpt2"]
# One linear of every kind, padding and four-over-six included; the others of the layer are NVFP4.
MIXED = {
    "q_proj": Quantize("nvfp4", "nvfp4", scales="absmax", four_over_six=True),
    "k_proj": Quantize("mxfp4", "mxfp4", scales="absmax"),
    "v_proj": Quantize("int4", group_size=32, scales="absmax"),
    "o_proj": Quantize("int8", "int8", scales="absmax"),
    "gate_proj": Quantize("fp8", "fp8", scales="absmax"),
    "up_proj": Quantize("int4", group_size=128, on_misfit="pad", scales="absmax"),
    "down_proj": Quantize("int2", scales="absmax"),  # one scale a row of 96: three blocks of the stock op share it
}


def pack(layer: nn.Linear, method: Quantize) -> Packed:
    """One linear by round to nearest; activations reach ±8."""
    scale = torch.tensor([336.0]) if method.activations == "nvfp4" else None
    return method.apply(layer, LayerPlan(method.place(*layer.weight.shape), input_global_scale=scale))


def artifact_of(source: Any, methods: dict[str, Quantize] | None = None, table: int | None = None) -> Artifact:
    """NVFP4 weights unless `methods` names the linear; `table`: bits of the embedding and of a head tied to it."""
    loaded = as_loaded(source)
    model = loaded.model
    packed = {
        name: pack(layer, (methods or {}).get(name.rpartition(".")[2], NVFP4)) for name, layer in linears(model).items()
    }
    tied: dict[str, str] = {}
    embedding, head = embedding_name(model), head_name(model)
    if is_tied(model):
        tied[f"{head}.weight"] = f"{embedding}.weight"
    if table:
        rows = model.get_submodule(embedding).weight
        shell = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
        shell.weight = rows
        stored = pack(shell, Quantize(f"int{table}", group_size=32, scales="absmax"))
        packed[embedding] = Packed("int_embedding", stored.tensors, stored.attributes | {"multiplier": 1.0})
        if is_tied(model):
            packed[head] = stored
            tied = {f"{head}.{name}": f"{embedding}.{name}" for name in stored.tensors}
    kept = {
        name: p.detach().bfloat16()
        for name, p in model.named_parameters()
        if name not in tied and name.rpartition(".")[0] not in packed
    }
    return Artifact(model.config, loaded.kind, None, Recipe.load("nvfp4a16"), packed, kept, tied)


def export(artifact: Artifact, folder: Path) -> Path:
    folder.mkdir()
    safetensors_file.write(folder / "model.safetensors", artifact.tensors())
    onnx_graph.export(artifact, folder)
    return folder


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def check_pointers(folder: Path, artifact: Artifact) -> None:
    """Every weight of the graph is bytes of the safetensors file, no byte of it twice in the folder."""
    graph = read_graph(folder).graph
    stored = safetensors_file.header(folder / "model.safetensors")
    entries = {(offset, length) for _, _, offset, length in stored.values()}
    pointed = set()
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.safetensors"
            pointed.add((int(place["offset"]), int(place["length"])))
        else:
            assert len(tensor.raw_data) < onnx_weights.INLINE_BYTES
            assert tensor.name not in artifact.tensors()
    assert pointed <= entries
    weights = [entry for entry in entries if entry[1] > 1024]
    assert len(set(weights) - pointed) == 0
    assert (folder / "model.onnx").stat().st_size < 200_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> tuple[Artifact, Path]:
    """A tied two-layer Llama, NVFP4 weights, everything else bf16."""
    model = tiny("llama", tie_word_embeddings=True)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() == 2 else 1)  # so that it does not say the same token for ever
    artifact = artifact_of(model)
    return artifact, export(artifact, tmp_path_factory.mktemp("onnx") / "llama")


@pytest.mark.parametrize("name", DECODERS)
def test_language_models_agree_with_torch(name: str, tiny: Any, tmp_path: Path) -> None:
    artifact = artifact_of(tiny(name, num_hidden_layers=2 if name == "gemma3" else 1))
    folder = export(artifact, tmp_path / name)
    check_pointers(folder, artifact)
    model, session = artifact.model(), OnnxSession(folder)
    torch.manual_seed(0)
    for batch, first, second in [(1, 1, 1), (2, 20, 3), (3, 2, 1)]:
        ids = torch.randint(4, 288, (batch, first + second))
        with torch.inference_mode():
            expected = model(input_ids=ids).logits
        found, past = session.prefill(ids[:, :first])
        assert relative(found, expected[:, :first]) < TOLERANCE
        assert relative(session.prefill(ids[:, first:], past)[0], expected[:, first:]) < TOLERANCE
    # The shorter text of a batch is padded on the left.
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    ids, positions = torch.randint(4, 288, (2, 6)), (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    empty = {n: np.zeros(session._past_shape(n, 2), np.float32) for n in session.past_names}
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **empty}
    found = torch.from_numpy(session.session.run(["logits"], feeds)[0])
    assert relative(found[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_encoder_agrees_with_torch(tiny: Any, tmp_path: Path) -> None:
    artifact = artifact_of(tiny("bert", num_hidden_layers=1), {"dense": Quantize("int8", scales="absmax")}, table=4)
    folder = export(artifact, tmp_path / "bert")
    session = OnnxSession(folder)
    assert list(session.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert session.outputs == ["last_hidden_state"]
    ids = torch.randint(4, 288, (2, 9))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 5:], types[:, 4:] = 0, 1
    with torch.inference_mode():
        expected = artifact.model()(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}
    found = torch.from_numpy(session.session.run(None, feeds)[0])
    assert relative(found[mask.bool()], expected[mask.bool()]) < TOLERANCE
    assert not (folder / "genai_config.json").exists()


def test_names_shapes_and_nodes(llama: tuple[Artifact, Path]) -> None:
    artifact, folder = llama
    check_pointers(folder, artifact)
    graph = read_graph(folder)
    onnx.checker.check_model(str(folder / "model.onnx"))
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    cached = [f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    assert [o.name for o in graph.graph.output] == ["logits", *cached]
    nodes = [n for n in graph.graph.node if n.domain == "ai.compressor"]
    assert {n.name for n in nodes} == set(artifact.packed)
    assert {n.op_type for n in nodes} == {"FP4Linear"}
    # One body serves all of them, and the tied table is one initializer that head and embedding read.
    assert len(graph.functions) == 1
    assert len({n.overload for n in nodes}) == 1
    assert Counter(t.name for t in graph.graph.initializer)["model.embed_tokens.weight"] == 1
    assert not any(t.name.startswith("lm_head") for t in graph.graph.initializer)


def test_same_bytes_and_nothing_of_this_machine(llama: tuple[Artifact, Path], tmp_path: Path) -> None:
    artifact, folder = llama
    again = (export(artifact, tmp_path / "again") / "model.onnx").read_bytes()
    assert again == (folder / "model.onnx").read_bytes()
    # Linears that share a scale in memory read each its own once they are loaded from the file.
    name = "weight_global_scale"
    first = next(p.tensors[name] for p in artifact.packed.values())
    shared = {m: Packed(p.kind, p.tensors | {name: first}, p.attributes) for m, p in artifact.packed.items()}
    loaded = {m: Packed(p.kind, p.tensors | {name: first.clone()}, p.attributes) for m, p in artifact.packed.items()}
    graphs = [
        (export(replace(artifact, packed=packed), tmp_path / folder) / "model.onnx").read_bytes()
        for packed, folder in ((shared, "shared"), (loaded, "loaded"))
    ]
    assert graphs[0] == graphs[1] == again
    for trace in (b"site-packages", b'File "', str(Path(__file__).parents[1]).encode(), b"pkg.torch"):
        assert trace not in again


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> tuple[Artifact, Path]:
    """Every kind of module in one layer, and an INT8 table that embedding and head share."""
    model = tiny("llama", tie_word_embeddings=True, num_hidden_layers=1)
    artifact = artifact_of(model, MIXED, table=8)
    return artifact, export(artifact, tmp_path_factory.mktemp("onnx") / "mixed")


def test_every_node_is_its_torch_op(mixed: tuple[Artifact, Path]) -> None:
    artifact, folder = mixed
    check_pointers(folder, artifact)
    graph = read_graph(folder)
    kinds = {n.name.rpartition(".")[2]: n.op_type for n in graph.graph.node if n.name in artifact.packed}
    assert kinds == {
        **dict.fromkeys(("q_proj", "k_proj"), "FP4Linear"),
        **dict.fromkeys(("v_proj", "up_proj", "down_proj", "lm_head"), "MatMulNBits"),
        "o_proj": "IntLinear",
        "gate_proj": "FP8Linear",
        "embed_tokens": "IntEmbedding",
    }
    nodes = onnx_graph.compressed_nodes(graph, artifact.packed)
    assert set(nodes) == set(artifact.packed)
    given = {i.name for i in graph.graph.input}
    expose(graph, [name for pair in nodes.values() for name in pair[:2] if name not in given])
    ids = torch.randint(4, 288, (2, 9))
    values = {"input_ids": ids.numpy(), **OnnxSession(folder, graph).run(ids)}
    for name, (source, target, _) in nodes.items():
        with torch.inference_mode():
            expected = build(artifact.packed[name])(torch.from_numpy(values[source]))
        assert relative(torch.from_numpy(values[target]), expected) < 1e-5, name


def test_smooth_graph_rounds_no_activations(mixed: tuple[Artifact, Path]) -> None:
    artifact, folder = mixed
    model = artifact.model()
    for module in model.modules():
        if hasattr(module, "attributes"):
            module.attributes["activations"] = "none"
    ids = torch.randint(4, 288, (2, 9))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    session = OnnxSession(folder, onnx_graph.smooth_graph(read_graph(folder)))
    assert relative(session.prefill(ids)[0], expected) < TOLERANCE


def test_a_flipped_nibble_in_the_weight_file_is_seen(llama: tuple[Artifact, Path], tmp_path: Path) -> None:
    folder = llama[1]
    for name in ("model.onnx", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "model.safetensors"
    _, _, offset, _ = safetensors_file.header(path)["model.layers.0.self_attn.v_proj.weight_packed"]
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x70
    path.write_bytes(bytes(data))
    ids = torch.randint(4, 288, (1, 9))
    assert relative(OnnxSession(tmp_path).prefill(ids)[0], OnnxSession(folder).prefill(ids)[0]) > TOLERANCE


def test_errors(llama: tuple[Artifact, Path], tiny: Any, tmp_path: Path) -> None:
    artifact, _ = llama
    with pytest.raises(OutputError, match="add safetensors"):
        onnx_graph.export(artifact, tmp_path)
    one_layer = artifact_of(tiny("llama", num_hidden_layers=1))
    tensors = one_layer.tensors()
    name = "model.layers.0.mlp.up_proj.weight_scale"
    scale = tensors.pop(name)
    safetensors_file.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(OutputError, match=name):
        onnx_graph.export(one_layer, tmp_path)
    safetensors_file.write(tmp_path / "model.safetensors", tensors | {name: scale[:, :2]})
    with pytest.raises(OutputError, match=r"\[96, 2\] in the file and \[96, 4\]"):
        onnx_graph.export(one_layer, tmp_path)


def write_hf_files(artifact: Artifact, folder: Path, tokenizer: Any) -> None:
    artifact.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_optimum_generates(llama: tuple[Artifact, Path], tiny_tokenizer: Any) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    artifact, folder = llama
    write_hf_files(artifact, folder, tiny_tokenizer)
    ids = torch.randint(4, 288, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = OnnxSession(folder).greedy(ids, 12)
    model = optimum.ORTModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert tokens[0, 9:].tolist() == expected
    assert len(set(expected)) > 3


def test_genai_generates(llama: tuple[Artifact, Path], tiny_tokenizer: Any) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    artifact, folder = llama
    write_hf_files(artifact, folder, tiny_tokenizer)
    described = json.loads((folder / "genai_config.json").read_text())["model"]
    assert described["decoder"]["num_key_value_heads"] == 2
    assert (described["eos_token_id"], described["pad_token_id"], described["context_length"]) == ([2], 3, 128)
    ids = torch.randint(4, 288, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = OnnxSession(folder).greedy(ids, 12)
    assert 2 not in expected
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=21)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[9:].tolist() == expected
