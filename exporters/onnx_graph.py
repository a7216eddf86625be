"""model.onnx: one graph with a KV cache whose weights are the bytes of model.safetensors.

Stock onnxruntime, optimum and onnxruntime-genai load the folder; the last one through genai_config.json, written
here as well. The steps live beside this file: onnx_capture (model -> graph), onnx_fusion and onnx_sites (for
`graph: ort`), onnx_sparse (masks and linears), onnx_nodes and onnx_functions (compressed modules and what they
compute), onnx_weights (initializers).
Below: views of a written graph for verification.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import OutputError
from compressor.exporters import (
    genai_config,
    onnx_capture,
    onnx_experts,
    onnx_functions,
    onnx_fusion,
    onnx_moe,
    onnx_nodes,
    onnx_qmoe,
    onnx_sites,
    onnx_sparse,
    onnx_weights,
)

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import nn

    from compressor.artifact import Artifact
    from compressor.layers import Packed

GRAPH = "model.onnx"
WEIGHTS = "model.safetensors"


def export(artifact: Artifact, folder: Path) -> list[Path]:
    """Write model.onnx, and genai_config.json for a language model. Raises OutputError.

    The folder must hold model.safetensors already.
    """
    import onnx_ir as ir

    weights = folder / WEIGHTS
    if not weights.is_file():
        raise OutputError(
            f"The onnx export points into {WEIGHTS}, which is not there; add safetensors to the recipe's exports."
        )
    model = artifact.model()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            # A tensor object of its own: the exporter gives one initializer to modules that share a scale in memory.
            module._buffers[name] = None if buffer is None else buffer.detach()
    state = model.state_dict().keys()
    artifact.record.pop("graph", None)
    if artifact.recipe.graph == "ort":
        graph, artifact.record["graph"] = onnx_fusion.capture(model, artifact.kind)
    else:
        graph = onnx_capture.capture(model, artifact.kind)
    onnx_moe.bind(graph.graph, weights, artifact.record.get("expert_index", {}))
    onnx_weights.bind(graph, weights, artifact.tied, state)
    if artifact.recipe.graph == "ort":
        merged = onnx_sites.merge(graph, weights)
    onnx_sparse.fuse(graph)
    if artifact.recipe.graph == "ort":
        artifact.record["graph"] |= onnx_fusion.counted(graph.graph) | ({"merged linears": merged} if merged else {})
    _finish_experts(artifact, model, graph)
    onnx_functions.attach_bodies(graph)
    graph.opset_imports[onnx_nodes.DOMAIN] = onnx_nodes.VERSION
    path = folder / GRAPH
    path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    if artifact.kind != "causal-lm":
        return [path]
    return [path, genai_config.write(artifact, graph, folder)]


def _finish_experts(artifact: Artifact, model: nn.Module, graph: ir.Model) -> None:
    """Experts as the recipe wants them, and in the manifest how they run. Raises OutputError."""
    found: dict[str, Any] = {onnx_moe.OP: len(onnx_moe.nodes(graph.graph))}
    summed = onnx_experts.sums(model)
    if artifact.recipe.experts == "qmoe":
        for name, reason in summed.items():
            raise OutputError(f"{name}: stock QMoE cannot compute these experts: {reason}; set experts: mixed.")
        found = {onnx_qmoe.OP: onnx_qmoe.lower(graph, onnx_experts.top_k(model))}
    if summed:
        reasons = "; ".join(sorted({*summed.values()}))
        found["layers whose every expert runs on every token"] = f"{len(summed)} ({reasons})"
    if found := {kind: count for kind, count in found.items() if count}:
        artifact.record["graph"] = artifact.record.get("graph", {}) | found


def compressed_nodes(graph: onnx.ModelProto, packed: Mapping[str, Packed]) -> dict[str, tuple[str, str, slice]]:
    """Module name -> (name of its input, name of its output, its part of the output's last axis), for all of `packed`.

    The values are the module's, not the node's: before padding, after an embedding's multiplier or a correction.
    """
    domains = (onnx_nodes.DOMAIN, onnx_nodes.STOCK_DOMAIN)
    producer = {out: node for node in graph.graph.node for out in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {}
    for node in graph.graph.node:
        modules = onnx_sites.modules_of(node.name)
        if node.domain not in domains or not packed.keys() >= set(modules):
            continue
        source, target = node.input[0], node.output[0]
        before = producer.get(source)
        if before is not None and before.op_type == "Pad":
            source = before.input[0]
        if node.op_type in onnx_nodes.EMBEDDINGS and [n.op_type for n in users.get(target, [])] == ["Mul"]:
            target = users[target][0].output[0]
        first = 0
        for index, name in enumerate(modules):
            rows = packed[name].attributes["out_features"]
            value, part = target, slice(first, first + rows) if len(modules) > 1 else slice(None)
            if "correction_down" in packed[name].tensors:
                own = target if len(modules) == 1 else users[target][0].output[index]  # of the Split behind it
                value, part = next(user for user in users[own] if user.op_type == "Add").output[0], slice(None)
            found[name] = (source, value, part)
            first += rows
    return found


def expert_nodes(graph: onnx.ModelProto) -> dict[str, tuple[str, str, str]]:
    """Container of experts -> (input, weights of the experts, output) of the node or nodes that compute them all."""
    producer = {out: node for node in graph.graph.node for out in node.output}
    found = {}
    for node in graph.graph.node:
        if (node.domain, node.op_type) == (onnx_nodes.DOMAIN, onnx_moe.OP):
            found[node.name] = (node.input[0], node.input[1], node.output[0])
        elif (node.domain, node.op_type) == (onnx_nodes.STOCK_DOMAIN, onnx_qmoe.OP):
            users = [n for n in graph.graph.node if node.output[0] in n.input and n.op_type == "Sum"]
            weights = producer[node.input[1]].input[0]  # of the Gather of its own experts
            container = node.name.rpartition(onnx_qmoe.NAMED)[0]
            found[container] = (node.input[0], weights, (users or [node])[0].output[0])
    return found


def held_routing(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph, changed in place, which asks for the weights of the experts [T, E] of each layer instead of computing
    them; each is an input of the name that the value had, the second of `expert_nodes`."""
    import onnx

    held = {weights for _, weights, _ in expert_nodes(graph).values()}
    for node in graph.graph.node:
        for index, name in enumerate(node.output):
            if name in held:
                node.output[index] = f"{name} unused"
    kind = onnx.TensorProto.FLOAT
    graph.graph.input.extend(onnx.helper.make_tensor_value_info(name, kind, [None, None]) for name in sorted(held))
    return graph


def smooth_graph(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without rounding of activations and with all of them: same weights, same wiring."""
    import onnx_ir as ir

    model = ir.from_proto(graph)
    for node in model.graph:
        if node.domain == onnx_nodes.DOMAIN and "activations" in node.attributes:
            node.attributes["activations"] = ir.AttrString("activations", "none")
        if node.domain == onnx_nodes.DOMAIN and node.op_type in ("Sparsify", "SparseLinear"):
            node.attributes["tokens"] = ir.AttrString("tokens", "none")
    onnx_functions.attach_bodies(model)
    return ir.to_proto(model)
