"""`experts: qmoe`: layers of experts by operators of stock onnxruntime, one com.microsoft::QMoE for each width.

    y = Σ_b QMoE_b(x, w_b, w_b)      w_b [T, E_b]: the weights of the experts of b bits; k = min(K, E_b)

QMoE chooses the k largest of w_b; where fewer experts of the bucket were chosen, the others have weight 0 and are
skipped. Codes are cut out of the file's bytes (our words are its layout), rows of gate and up put in turn, and scales
made float32, all by operators that onnxruntime computes once, when it loads the graph.

Its kernels for a CPU (onnxruntime 1.32, moe_quantization_cpu.cc) round inputs to 8 bits by themselves in two of the
widths, and a node is then off by up to 2 % of its largest output: see `rounds`. `experts: mixed` computes what was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.errors import OutputError
from compressor.exporters import onnx_moe
from compressor.exporters.onnx_functions import Body
from compressor.exporters.onnx_nodes import ATTRIBUTES, STOCK_DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

OP = "QMoE"
WIDTHS = (2, 4, 8)  # that its kernel for float32 on a CPU reads
NAMED = ":"  # between the container and the width in a node's name
BLOCKS = (16, 32, 64, 128, 256)


def lower(model: ir.Model, top_k: Mapping[str, int]) -> int:
    """Every MixedBitMoE as QMoE nodes, in place, after their bytes are bound; how many nodes there are.

    top_k: container -> experts of a token. Raises OutputError for experts that the operator does not read.
    """
    graph, made = model.graph, 0
    for node in onnx_moe.nodes(graph):
        a = {name: node.attributes[name].value for name in ATTRIBUTES[onnx_moe.OP]}
        container = str(node.name)
        if reason := _refusal(a):
            raise OutputError(f"{container}: {reason}; set experts: mixed, or change the recipe's pmq step.")
        op = Body()
        x, weights, experts = node.inputs
        assert x is not None and weights is not None and experts is not None
        widths = sorted({*map(int, a["bits"])})
        parts = [_bucket(op, x, weights, experts, a, width, top_k[container]) for width in widths]
        y = op.Sum(*parts) if len(parts) > 1 else parts[0]
        for made_node in op.nodes:
            width = made_node.attributes["expert_weight_bits"].value if made_node.op_type == OP else None
            made_node.name = f"{container}{NAMED}{width}" if width else None
        graph.insert_before(node, op.nodes)
        node.outputs[0].replace_all_uses_with(y)
        graph.remove(node, safe=True)
        made += len(parts)
    if made:
        graph.opset_imports[STOCK_DOMAIN] = 1
    return made


def _bucket(
    op: Body, x: ir.Value, weights: ir.Value, experts: ir.Value, a: Mapping[str, Any], width: int, top_k: int
) -> ir.Value:
    members = [e for e, digit in enumerate(a["bits"]) if int(digit) == width]
    own = onnx_moe.pieces(op, experts, a, {*members})

    def in_turn(which: int) -> ir.Value:
        """Codes (0) or scales (1) of gate and up, row by row: [E_b, 2 I, .]."""
        pairs = [op.Concat(*(op.Unsqueeze(part[which], [1]) for part in e[:2]), axis=1) for e in own]
        return op.Concat(*(op.Reshape(p, [1, 2 * a["intermediate"], -1]) for p in pairs), axis=0)

    def down(which: int) -> ir.Value:
        return op.Concat(*(op.Unsqueeze(e[2][which], [0]) for e in own), axis=0)

    chosen = op.Gather(weights, members, axis=1)
    inputs = (x, chosen, in_turn(0), in_turn(1), None, down(0), down(1), *[None] * 7, chosen)
    return op.QMoE(
        *inputs, k=min(top_k, len(members)), expert_weight_bits=width, block_size=a["group_size"],
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=0,
    )  # fmt: skip


def rounds(node: Any) -> bool:
    """Whether onnxruntime rounds the inputs of this node of a graph to 8 bits.

    2 bits: its kernel of tables does, for groups of whole 32s; smaller groups are multiplied in float32. 4 bits: no.
    8 bits: there is no other kernel; the session option session.disable_prepacking makes it dequantize all weights.
    """
    if (node.domain, node.op_type) != (STOCK_DOMAIN, OP):
        return False
    a = {attribute.name: attribute.i for attribute in node.attribute}
    return a["expert_weight_bits"] == 8 or (a["expert_weight_bits"] == 2 and a["block_size"] % 32 == 0)


def _refusal(a: Mapping[str, Any]) -> str | None:
    if wrong := sorted({*map(int, a["bits"])} - {*WIDTHS}):
        return f"stock QMoE has no kernel for {wrong[0]} bits, only for 2, 4 and 8"
    if a["activation"] != "silu":
        return f"stock QMoE has no {a['activation']} between gate and up"
    size = a["group_size"]
    if size not in BLOCKS or a["down_group_size"] != size or a["hidden"] % size or a["intermediate"] % size:
        return f"stock QMoE reads one group size of 16, 32, 64, 128 or 256 that divides H and I, and it is {size}"
    return None
