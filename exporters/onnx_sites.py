"""Linears that read the same value, as one node: q, k and v; gate and up; the first factors of those, in low rank.

A runtime pays for every node: its start, a second thread, and rounding of an input that was rounded already. Rows of
one output matrix may belong to several modules, so the merged node is the op that they had, with more rows, and its
weight is the range of the file in which theirs lie side by side (safetensors_file.py orders them so): no byte more.
Behind it a Split hands out the parts, unless attention takes them packed or SwiGLU takes both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressor.exporters.onnx_nodes import DOMAIN, INPUTS, STOCK_DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

JOIN = "+"  # between the names of modules that share a node
ROWS = {"weight", "weight_packed", "weight_scale", "bias"}  # one row, or one number, for each output
LINEARS = {name: inputs for name, inputs in INPUTS.items() if name.endswith("Linear") and name != "LowRankLinear"}
LINEARS["MatMulNBits"] = ("x", "weight", "weight_scale", "zero_points", "g_idx", "bias")
LINEARS["FusedMatMul"] = ("x", "weight")  # transB, as onnx_fusion.py makes it


@dataclass(frozen=True)
class Stored:
    """A range of the weight file and what it holds."""

    name: str
    location: str
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]


def merge(model: ir.Model, weights: Path) -> int:
    """Merge in place, after every weight points into the file `weights`; how many linears share a node with others."""
    from onnx_ir.passes import common

    merged = 0
    for run in list(_runs(model.graph, weights)):
        merged += len(run)
        split = _one_node(model.graph, run)
        if not _packed_attention(model.graph, split):
            _swiglu(model.graph, split)
    common.RemoveUnusedNodesPass()(model)
    return merged


def modules_of(node_name: str) -> list[str]:
    """The modules whose rows a node computes, in the order of its rows."""
    return node_name.split(JOIN)


def _runs(graph: ir.Graph, weights: Path) -> Iterator[list[ir.Node]]:
    """Linears of one input and one kind whose tensors follow one another in the file, in that order."""
    groups: dict[Any, list[tuple[int, ir.Node]]] = {}
    for node in graph:
        if node.op_type in LINEARS and node.domain in (DOMAIN, STOCK_DOMAIN):
            alike = [(name, a.value) for name, a in sorted(node.attributes.items()) if name != "N"]
            if weight := _stored(node.inputs[1]):
                groups.setdefault((node.inputs[0], node.op_type, str(alike)), []).append((weight.offset, node))
    for found in groups.values():
        nodes = [node for _, node in sorted(found, key=lambda place: place[0])]
        run = nodes[:1]
        for before, node in pairwise(nodes):
            if not _follows(before, node, weights):
                yield from [run] if len(run) > 1 else []
                run = []
            run = [*run, node]
        yield from [run] if len(run) > 1 else []


def _stored(value: ir.Value | None) -> Stored | None:
    """The bytes of the file that a value is, in the file's dtype or behind one Cast."""
    import onnx_ir as ir

    if value is None:
        return None
    if node := value.producer():
        return _stored(node.inputs[0]) if node.op_type == "Cast" else None
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    shape = tuple(cast(int, d) for d in tensor.shape)
    return Stored(str(tensor.name), str(tensor.location), tensor.offset or 0, tensor.nbytes, tensor.dtype, shape)


def _follows(before: ir.Node, node: ir.Node, weights: Path) -> bool:
    """Whether the rows of `node` lie right behind those of `before`, and what is not of a row is the same."""
    if len(before.inputs) != len(node.inputs):
        return False
    for name, a, b in list(zip(LINEARS[node.op_type], before.inputs, node.inputs, strict=False))[1:]:
        if a is b and (a is None or name not in ROWS):
            continue
        first, second = _stored(a), _stored(b)
        if first is None or second is None or first.dtype != second.dtype or first.shape[1:] != second.shape[1:]:
            return False
        if name in ROWS and first.offset + first.length != second.offset:
            return False
        if name not in ROWS and _bytes(first, weights) != _bytes(second, weights):
            return False
    return True


def _bytes(stored: Stored, weights: Path) -> bytes:
    with weights.open("rb") as file:
        file.seek(stored.offset)
        return file.read(stored.length)


def _one_node(graph: ir.Graph, run: list[ir.Node]) -> ir.Node:
    """The Split behind one node in the place of several; its outputs are theirs."""
    import onnx_ir as ir

    first = run[0]
    rows = [weight.shape[0] for n in run if (weight := _stored(n.inputs[1]))]
    inputs = [
        _joined(graph, [n.inputs[i] for n in run]) if name in ROWS else first.inputs[i]
        for i, name in zip(range(len(first.inputs)), LINEARS[first.op_type], strict=False)
    ]
    attributes = {name: a.value for name, a in first.attributes.items()}
    if "N" in attributes:
        attributes["N"] = sum(rows)
    name = JOIN.join(n.name for n in run if n.name)  # what is no module of ours has none
    linear = ir.node(first.op_type, inputs, attributes, domain=first.domain, name=name)
    sizes = ir.node("Constant", [], {"value_ints": rows})
    split = ir.node("Split", [linear.outputs[0], sizes.outputs[0]], {"axis": -1}, num_outputs=len(run))
    graph.insert_before(next(n for n in graph if n in run), [linear, sizes, split])
    for node, part in zip(run, split.outputs, strict=True):
        node.outputs[0].replace_all_uses_with(part)
        graph.remove(node, safe=True)
    return split


def _joined(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value | None:
    """One initializer over the ranges of all, and behind the Cast that they have."""
    import onnx_ir as ir

    parts = [part for part in map(_stored, values) if part]
    if not parts:
        return None
    name, first = JOIN.join(part.name for part in parts), parts[0]
    if name not in graph.initializers:
        shape = ir.Shape([sum(part.shape[0] for part in parts), *first.shape[1:]])
        length = sum(part.length for part in parts)
        tensor = ir.ExternalTensor(first.location, first.offset, length, first.dtype, shape=shape, name=name)
        kind = ir.TensorType(first.dtype)
        graph.register_initializer(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    whole = graph.initializers[name]
    if values[0] is None or (made := values[0].producer()) is None:
        return whole
    again = ir.node("Cast", [whole], {"to": made.attributes["to"].value})
    graph.insert_before(graph[0], again)
    return again.outputs[0]


def _packed_attention(graph: ir.Graph, split: ir.Node) -> bool:
    """Give all parts at once to the attention that takes them as queries, keys and values, if that is who does."""
    users = [list(part.uses()) for part in split.outputs]
    if [len(u) for u in users] != [1, 1, 1]:
        return False
    attention = users[0][0].node
    if attention.op_type != "GroupQueryAttention" or list(attention.inputs[:3]) != list(split.outputs):
        return False
    for index, value in enumerate((split.inputs[0], None, None)):
        attention.replace_input_with(index, value)
    graph.remove(split, safe=True)
    return True


def _swiglu(graph: ir.Graph, split: ir.Node) -> None:
    """One node for silu(gate) · up, if that is all that becomes of two equal parts."""
    import onnx_ir as ir

    users = [list(part.uses()) for part in split.outputs]
    if [len(u) for u in users] != [1, 1]:
        return
    (silu, _), (product, _) = users[0][0], users[1][0]
    sizes = ir.convenience.get_const_tensor(split.inputs[1]) if split.inputs[1] else None
    alpha = silu.attributes.get_float("alpha", 0.0) if silu.op_type == "QuickGelu" else 0.0
    if (
        sizes is None
        or len(set(sizes.numpy().tolist())) != 1
        or alpha != 1.0
        or product.op_type != "Mul"
        or silu.outputs[0] not in product.inputs
    ):
        return
    node = ir.node("SwiGLU", [split.inputs[0]], domain=DOMAIN)
    graph.insert_before(product, node)
    product.outputs[0].replace_all_uses_with(node.outputs[0])
    graph.remove([product, silu, split], safe=True)
