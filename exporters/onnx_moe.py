"""MixedBitMoE in a graph: what the node computes in standard ops, and where its bytes lie in the weight file.

Its body is the sum over all experts, each on every token, times a weight that is mostly zero: right in any runtime, for
E / K times the arithmetic of the fused kernel (kernels/ort/mixed_bit_moe.cc), which touches the chosen experts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import OutputError
from compressor.exporters import onnx_functions as functions
from compressor.exporters.onnx_nodes import DOMAIN, INT32
from compressor.kernels.mixed_bit_moe import matrices

if TYPE_CHECKING:
    import onnx_ir as ir

OP = "MixedBitMoE"
MODULE = "packed_experts"  # the name of PackedExperts in its layer while a graph is captured


def body(op: functions.Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    total: ir.Value | None = None
    for e, own in enumerate(pieces(op, v["experts"], a)):
        bits = int(a["bits"][e])
        dense: list[ir.Value] = []
        for (packed, scale), columns in zip(own, (a["hidden"], a["hidden"], a["intermediate"]), strict=True):
            group = a["down_group_size" if len(dense) == 2 else "group_size"]
            inside = {"bits": bits, "group_size": group, "in_features": columns}
            dense.append(functions._int_rows(op, packed, scale, inside))
        gate, up, down = dense
        hidden = functions._activated(op, op.Gemm(v["x"], gate, transB=1), a["activation"])
        y = op.Gemm(op.Mul(hidden, op.Gemm(v["x"], up, transB=1)), down, transB=1)
        y = op.Mul(y, op.Slice(v["weights"], [e], [e + 1], [1]))
        total = y if total is None else op.Add(total, y)
    assert total is not None
    return total


def pieces(
    op: functions.Body, experts: ir.Value, a: Mapping[str, Any], only: set[int] | None = None
) -> list[list[tuple[ir.Value, ir.Value]]]:
    """Of each expert (codes uint8 [N, bytes of a row], scales float32 [N, groups]) of gate, up and down, cut out."""
    sizes = (a[name] for name in ("group_size", "down_group_size", "intermediate", "hidden"))
    found = []
    for e, rows in enumerate(matrices(a["bits"], a["layout"], *sizes)):
        if only is not None and e not in only:
            continue
        found.append(
            [
                (
                    op.Reshape(op.Slice(experts, [codes], [codes + n * row_bytes], [0]), [n, row_bytes]),
                    _bfloat16(op, op.Slice(experts, [scales], [scales + 2 * n * groups], [0]), n, groups),
                )
                for codes, row_bytes, scales, groups, n, _ in rows
            ]
        )
    return found


def _bfloat16(op: functions.Body, raw: ir.Value, n: int, groups: int) -> ir.Value:
    """uint8 [2 N G], little endian -> float32 [N, G]: no operator reinterprets bytes, so two tables are multiplied.

    Exact for normal numbers and zero: the upper byte is a sign and an even exponent, the lower its last bit and 1.m.
    """
    upper, lower = np.arange(256) & 127, np.arange(256)
    power = np.where(upper == 0, 0.0, np.exp2(2.0 * upper - 127)) * np.where(np.arange(256) < 128, 1.0, -1.0)
    tables = np.concatenate([np.exp2(lower >> 7) * (1 + (lower & 127) / 128), power]).astype(np.float32)
    pairs = op.Add(op.Cast(op.Reshape(raw, [n, groups, 2]), to=INT32), np.array([0, 256], np.int32))
    return op.ReduceProd(op.Gather(tables, pairs), [-1], keepdims=0)


def nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP)]


def bind(graph: ir.Graph, weights: Path, index: Mapping[str, list[list[int]]]) -> None:
    """Point the bytes of every node into the file `weights`, in place, and name node and bytes as their container.

    index: the manifest's `expert_index`. Raises OutputError where the file does not hold what the node was traced with.
    """
    import onnx_ir as ir

    for node in nodes(graph):
        layer = str(node.name).removesuffix(f".{MODULE}")
        own = next((c for c in index if c.rpartition(".")[0] == layer), "")
        traced = node.inputs[2]
        assert traced is not None and traced.const_value is not None and traced.name is not None
        offset = index[own][0][0] if own else 0
        kept = traced.const_value.numpy().tobytes()
        with weights.open("rb") as file:
            file.seek(offset)
            if not own or file.read(len(kept)) != kept:
                raise OutputError(
                    f"{weights.name}: the experts of '{layer}' are not there as the ONNX graph reads them; this is a "
                    f"fault of compressor, not of the model: please report it."
                )
        graph.initializers.pop(traced.name)
        kind, shape = ir.DataType.UINT8, ir.Shape([len(kept)])
        tensor = ir.ExternalTensor(weights.name, offset, len(kept), kind, shape=shape, name=own)
        value = ir.Value(name=own, type=ir.TensorType(kind), shape=shape, const_value=tensor)
        graph.register_initializer(value)
        node.replace_input_with(2, value)
        node.name = own
