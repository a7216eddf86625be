"""A Sparsify and the linear behind it as one SparseLinear, so that a kernel can leave out what the mask leaves out.

Taken are weights in float32 and bf16, INT4 that MatMulNBits reads, and FP4; inputs that are rounded as well, and other
formats, stay two nodes, which compute the same and read every weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.exporters.onnx_nodes import DOMAIN, SHAPE

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Inner:
    """What a linear multiplies with: inputs and attributes of SparseLinear behind x and threshold."""

    format: str
    tensors: list[ir.Value | None]  # weight, weight_scale, weight_global_scale, bias
    block_size: int = 0
    shape: dict[str, int] = field(default_factory=dict)


def fuse(model: ir.Model) -> None:
    """In place, when every weight is what the graph reads from its file."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    graph = model.graph
    masks = [node for node in graph if node.domain == DOMAIN and node.op_type == "Sparsify"]
    for mask in masks:
        users = [node for node, _ in mask.outputs[0].uses()]
        inner = _inner(users[0], mask.outputs[0]) if len(users) == 1 else None
        if inner is None:
            continue
        old = users[0]
        attributes: dict[str, Any] = {"format": inner.format, "tokens": mask.attributes.get_string("tokens")}
        attributes |= {"block_size": inner.block_size, "K": 0, "N": 0, **inner.shape}
        node = ir.node("SparseLinear", [*mask.inputs, *inner.tensors], attributes, domain=DOMAIN, name=old.name)
        before, after = old.outputs[0], node.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.name = None
        graph.insert_before(old, node)
        before.replace_all_uses_with(after)
        graph.remove([old, mask], safe=True)
    if masks:
        common.RemoveUnusedNodesPass()(model)


def _inner(node: ir.Node, x: ir.Value) -> Inner | None:
    if node.inputs[0] is not x:
        return None
    attributes = {name: a.value for name, a in node.attributes.items()}
    shape: dict[str, int] = {name: attributes[name] for name in SHAPE if name in attributes}
    given = [*node.inputs, *[None] * 6]
    if node.op_type == "MatMulNBits" and attributes["bits"] == 4 and given[3:5] == [None, None]:
        return Inner("int4", [given[1], given[2], None, given[5]], attributes["block_size"], shape)
    if node.op_type == "FP4Linear" and attributes["activations"] == "none" and not attributes["hadamard"]:
        return Inner(attributes["format"], [*given[1:4], given[5]], attributes["block_size"], shape)
    weight = given[1]
    if node.op_type == "MatMul" and weight is not None and (turned := weight.producer()) is not None:
        weight = turned.inputs[0] if turned.op_type == "Transpose" else None
    elif node.op_type != "FusedMatMul" or attributes != {"transB": 1}:
        weight = None
    stored = _stored(weight)
    if stored is None or len(stored.shape or ()) != 2:
        return None
    return Inner("float", [stored, None, None, None])


def _stored(weight: ir.Value | None) -> ir.Value | None:
    """What the file holds, if that is bf16 behind a Cast."""
    import onnx_ir as ir

    cast = None if weight is None else weight.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source if source is not None and source.dtype == ir.DataType.BFLOAT16 else weight
