"""Linears that read the same value, as one node: q, k and v; gate and up.

A runtime pays for every node: its start, a second thread, and rounding of an input that was rounded already. Rows of
one output matrix may belong to several modules, so the merged node is the op that they had, with more rows, and its
weight is the range of the file in which theirs lie side by side (safetensors_file.py orders them so): no byte more.
Behind it a Split hands out the parts, unless attention takes them packed or SwiGLU takes both.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.exporters.onnx_nodes import DOMAIN, INPUTS, STOCK_DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

JOIN = "+"  # between the names of modules that share a node
ROWS = {"weight", "weight_packed", "weight_scale", "bias"}  # one row, or one number, for each output
LINEARS = {name: inputs for name, inputs in INPUTS.items() if name.endswith("Linear") and name != "LowRankLinear"}
LINEARS["MatMulNBits"] = ("x", "weight", "weight_scale", "zero_points", "g_idx", "bias")


def merge(model: ir.Model, weights: Path) -> dict[str, int]:
    """Merge in place, after every weight points into the file `weights`; how many linears share a node, and SwiGLUs."""
    graph, merged, gated = model.graph, 0, 0
    for run in list(_runs(graph, weights)):
        merged += len(run)
        split = _one_node(graph, run)
        if not _packed_attention(graph, split):
            gated += _swiglu(graph, split)
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return {"merged linears": merged, "SwiGLU": gated} if merged else {}


def modules_of(node_name: str) -> list[str]:
    """The modules whose rows a node computes, in the order of its rows."""
    return node_name.split(JOIN)


def _runs(graph: ir.Graph, weights: Path) -> Iterator[list[ir.Node]]:
    """Linears of one input and one kind whose tensors follow one another in the file, in that order."""
    groups: dict[Any, list[ir.Node]] = {}
    for node in graph:
        if node.op_type in LINEARS and node.domain in (DOMAIN, STOCK_DOMAIN) and node.name:
            alike = [(name, a.value) for name, a in sorted(node.attributes.items()) if name != "N"]
            groups.setdefault((node.inputs[0], node.op_type, str(alike)), []).append(node)
    for nodes in groups.values():
        stored = [n for n in nodes if _stored(n.inputs[1]) is not None]
        stored.sort(key=lambda n: _stored(n.inputs[1]).offset)
        run = stored[:1]
        for before, node in pairwise(stored):
            if not _follows(before, node, weights):
                yield from [run] if len(run) > 1 else []
                run = []
            run = [*run, node]
        yield from [run] if len(run) > 1 else []


def _stored(value: ir.Value | None) -> ir.ExternalTensor | None:
    """The bytes of the file that a value is, in the file's dtype or behind one Cast."""
    import onnx_ir as ir

    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return _stored(node.inputs[0]) if node.op_type == "Cast" else None
    return value.const_value if isinstance(value.const_value, ir.ExternalTensor) else None


def _follows(before: ir.Node, node: ir.Node, weights: Path) -> bool:
    names = LINEARS[node.op_type]
    if len(before.inputs) != len(node.inputs):
        return False
    for name, a, b in list(zip(names, before.inputs, node.inputs, strict=False))[1:]:
        first, second = _stored(a), _stored(b)
        if a is b and name not in ROWS:
            continue
        if first is None or second is None:
            return a is None and b is None
        if first.dtype != second.dtype or tuple(first.shape)[1:] != tuple(second.shape)[1:]:
            return False
        if name in ROWS and first.offset + first.length != second.offset:
            return False
        if name not in ROWS and _bytes(first, weights) != _bytes(second, weights):
            return False
    return True


def _bytes(tensor: ir.ExternalTensor, weights: Path) -> bytes:
    with weights.open("rb") as file:
        file.seek(tensor.offset or 0)
        return file.read(tensor.length or 0)


def _one_node(graph: ir.Graph, run: list[ir.Node]) -> ir.Node:
    """The Split behind one node in the place of several; its outputs are theirs."""
    import onnx_ir as ir

    first = run[0]
    rows = [int(_stored(n.inputs[1]).shape[0]) for n in run]
    inputs = [
        _joined(graph, [n.inputs[i] for n in run]) if name in ROWS else first.inputs[i]
        for i, name in zip(range(len(first.inputs)), LINEARS[first.op_type], strict=False)
    ]
    attributes = {name: a.value for name, a in first.attributes.items()}
    if "N" in attributes:
        attributes["N"] = sum(rows)
    name = JOIN.join(n.name for n in run if n.name)
    linear = ir.node(first.op_type, inputs, attributes, domain=first.domain, name=name)
    sizes = ir.node("Constant", [], {"value_ints": rows})
    split = ir.node("Split", [linear.outputs[0], sizes.outputs[0]], {"axis": -1}, num_outputs=len(run))
    earliest = next(n for n in graph if n in run)
    graph.insert_before(earliest, [linear, sizes, split])
    for node, part in zip(run, split.outputs, strict=True):
        node.outputs[0].replace_all_uses_with(part)
        graph.remove(node, safe=True)
    return split


def _joined(graph: ir.Graph, values: list[ir.Value | None]) -> ir.Value | None:
    """One initializer over the ranges of all, and behind the Cast that they have."""
    import onnx_ir as ir

    parts = [_stored(v) for v in values]
    if parts[0] is None:
        return None
    name = JOIN.join(str(p.name) for p in parts)
    if name not in graph.initializers:
        shape = ir.Shape([sum(int(p.shape[0]) for p in parts), *tuple(parts[0].shape)[1:]])
        length = sum(p.length for p in parts)
        tensor = ir.ExternalTensor(parts[0].location, parts[0].offset, length, parts[0].dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
    whole = graph.initializers[name]
    cast = values[0].producer()
    if cast is None:
        return whole
    again = ir.node("Cast", [whole], {"to": cast.attributes["to"].value})
    graph.insert_before(graph[0], again)
    return again.outputs[0]


def _packed_attention(graph: ir.Graph, split: ir.Node) -> bool:
    """Give all parts at once to the attention that takes them as queries, keys and values, if that is who does."""
    users = [part.uses() for part in split.outputs]
    if len(users) != 3 or any(len(u) != 1 for u in users):
        return False
    (attention, _), *_ = [next(iter(u)) for u in users]
    if attention.op_type != "GroupQueryAttention" or list(attention.inputs[:3]) != list(split.outputs):
        return False
    attention.replace_input_with(0, split.inputs[0])
    for index in (1, 2):
        attention.replace_input_with(index, None)
    graph.remove(split, safe=True)
    return True


def _swiglu(graph: ir.Graph, split: ir.Node) -> int:
    """One node for silu(gate) · up, if that is all that becomes of two equal parts; how many were made."""
    import onnx_ir as ir

    gate, up = split.outputs[0], split.outputs[-1]
    users = [list(part.uses()) for part in (gate, up)]
    if len(split.outputs) != 2 or [len(u) for u in users] != [1, 1]:
        return 0
    silu, product = users[0][0].node, users[1][0].node
    sizes = ir.convenience.get_const_tensor(split.inputs[1]).numpy().tolist()
    alpha = silu.attributes.get_float("alpha", 0.0) if silu.op_type == "QuickGelu" else 0.0
    if sizes[0] != sizes[1] or alpha != 1.0 or product.op_type != "Mul" or silu.outputs[0] not in product.inputs:
        return 0
    node = ir.node("SwiGLU", [split.inputs[0]], domain=DOMAIN)
    graph.insert_before(product, node)
    product.outputs[0].replace_all_uses_with(node.outputs[0])
    graph.remove([product, silu, split], safe=True)
    return 1
