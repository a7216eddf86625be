"""The nodes of compressed modules: their names, inputs and attributes, and how the exporter comes to write them.

One torch op becomes one node `ai.compressor::FP4Linear` and so on, whose attributes are all that a kernel must know.
Weight-only integers go to the stock com.microsoft::MatMulNBits, whose layout is the stored one; IntLinear takes what
it cannot read. What is left out: what the nodes compute (onnx_functions.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compressor.kernels.codec import FLOATS, FORMATS

DOMAIN = "ai.compressor"
VERSION = 1
OPSET = 21
STOCK_DOMAIN = "com.microsoft"
STOCK_BLOCKS = (256, 128, 64, 32, 16)  # block sizes that MatMulNBits reads
STOCK_BITS = (2, 4, 8)

INPUTS = {
    "FP4Linear": ("x", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", "bias"),
    "IntLinear": ("x", "weight", "weight_scale", "bias", "input_scale", "input_offset"),
    "FP8Linear": ("x", "weight", "weight_scale", "bias"),
    "FloatLinear": (
        "x",
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "input_scale",
        "input_shift",
        "bias",
    ),
    "FP4Embedding": ("ids", "weight_packed", "weight_scale", "weight_global_scale"),
    "IntEmbedding": ("ids", "weight_packed", "weight_scale"),
    "LowRankLinear": ("x", "down", "up", "bias", "down_bias", "order"),
    "LowRankFFN": (
        *("x", "in_down", "in_up", "in_bias", "mul_down", "mul_up", "mul_bias"),
        *("out_down", "out_up", "out_bias"),
    ),
    "LowRankAttention": (
        *("query", "key", "value", "query_up", "key_up", "value_up"),
        *("query_bias", "key_bias", "value_bias", "mask"),
    ),
    "Sparsify": ("x", "threshold"),
    "SparseLinear": ("x", "threshold", "weight", "weight_scale", "weight_global_scale", "bias"),
    "MixedBitMoE": ("x", "weights", "experts"),
    "SwiGLU": ("x",),
    "GroupQueryAttention": (
        "query",
        "key",
        "value",
        "past_key",
        "past_value",
        "seqlens_k",
        "total_sequence_length",
        "cos_cache",
        "sin_cache",
        "position_ids",
        "attention_bias",
    ),
}
FACTORS = ("_down", "_up", "down", "up")  # how inputs end that are read in the dtype that the file has, bfloat16 too
EMBEDDINGS = ("FP4Embedding", "IntEmbedding")
OPTIONAL = {"weight_global_scale", "input_global_scale", "bias", "input_scale", "input_offset", "input_shift"}
OPTIONAL |= {"key", "value", "cos_cache", "sin_cache", "position_ids", "attention_bias"}
OPTIONAL |= {"in_up", "in_bias", "mul_down", "mul_up", "mul_bias", "out_up", "out_bias"}
OPTIONAL |= {*INPUTS["LowRankLinear"][3:], *INPUTS["LowRankAttention"][3:]}
SHAPE = ("K", "N")  # attributes that a body hands on: one body serves all shapes
ATTRIBUTES = {
    "FP4Linear": ("format", "activations", "four_over_six", "block_size", "hadamard", *SHAPE),
    "IntLinear": ("bits", "group_size", "activations", "packed", "in_features", "hadamard"),
    "FP8Linear": ("activations", "hadamard"),
    "FloatLinear": ("format", "activations", "block_size"),
    "FP4Embedding": ("format", "block_size", "in_features"),
    "IntEmbedding": ("bits", "group_size", "in_features"),
    "LowRankLinear": (),
    "LowRankFFN": ("activation",),
    "LowRankAttention": ("heads", "kv_heads", "scale", "causal"),
    "Sparsify": ("tokens",),
    "SparseLinear": ("format", "tokens", "block_size", *SHAPE),
    "MixedBitMoE": ("bits", "layout", "group_size", "down_group_size", "hidden", "intermediate", "activation"),
    "SwiGLU": (),
    "GroupQueryAttention": ("num_heads", "kv_num_heads", "head_size", "do_rotary", "scale", "softcap"),
}
FLOAT, INT32, FLOAT8E4M3FN, FLOAT8E5M2 = 1, 6, 17, 19  # onnx.TensorProto
LOWEST = -3.4028234663852886e38  # float32's, which masks add to what must not be attended to
TENSOR_TYPES = [f"tensor({t})" for t in ("float", "bfloat16", "float8e4m3fn", "uint8", "int8", "int32", "int64")]


def stock_block(features: int, group_size: int) -> int | None:
    """The block size with which MatMulNBits can read K = `features` in groups of `group_size` (0: one a row).

    A larger group is several blocks with the same scale, so any multiple of 16 fits. None where nothing does.
    """
    return next((b for b in STOCK_BLOCKS if features % b == 0 and (group_size or features) % b == 0), None)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """torch op -> the function that emits its node, for `torch.onnx.export(custom_translation_table=…)`."""
    import torch

    from compressor.exporters import onnx_attention
    from compressor.kernels import (  # noqa: F401  (they register the ops)
        float_linear,
        fp4_embedding,
        fp4_linear,
        fp8_linear,
        int_embedding,
        int_linear,
        lowrank_attention,
        lowrank_ffn,
        lowrank_linear,
        mixed_bit_moe,
        sparsify,
    )

    ops = torch.ops.compressor
    return {
        ops.fp4_linear.default: _emit_fp4_linear,
        ops.int_linear.default: _emit_int_linear,
        ops.fp8_linear.default: _emit_fp8_linear,
        ops.float_linear.default: _emit_float_linear,
        ops.fp4_embedding.default: _emit_fp4_embedding,
        ops.int_embedding.default: _emit_int_embedding,
        ops.lowrank_linear.default: _emit_lowrank_linear,
        ops.lowrank_ffn.default: _emit_lowrank_ffn,
        ops.lowrank_attention.default: _emit_lowrank_attention,
        ops.sparsify.default: _emit_sparsify,
        ops.mixed_bit_moe.default: _emit_mixed_bit_moe,
        ops.grouped_attention.default: onnx_attention.emit,
    }


def emit_node(
    op_type: str, inputs: tuple[Any, ...], attributes: dict[str, Any], domain: str = DOMAIN, outputs: int = 1
) -> Any:
    """One node in the graph being translated. The exporter wants a schema of every op that it records."""
    import onnx
    from onnxscript import values

    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT, str: schema.AttrType.STRING}
    described = schema(
        op_type,
        domain,
        VERSION,
        inputs=[schema.FormalParameter(f"i{n}", f"T{n}", param_option=optional) for n in range(len(inputs))],
        outputs=[schema.FormalParameter(f"y{n}", "T0") for n in range(outputs)],
        type_constraints=[(f"T{n}", TENSOR_TYPES, "") for n in range(len(inputs))],
        attributes=[schema.Attribute(name, kinds[type(value)]) for name, value in attributes.items()],
    )
    return values.Op(values.Opset(domain, VERSION), op_type, described)(*inputs, **attributes)


def _float(value: Any) -> Any:
    """Bodies take float32 scales and biases; the file may hold bfloat16."""
    from onnxscript import opset21

    return value if value is None or value.dtype.value == FLOAT else opset21.Cast(value, to=FLOAT)


# The parameters below are those of the torch ops, by name.


def _emit_fp4_linear(
    x: Any,
    weight_packed: Any,
    weight_scale: Any,
    weight_global_scale: Any,
    input_global_scale: Any,
    bias: Any,
    format: str,
    activations: str,
    four_over_six: bool,
    hadamard: int = 0,
) -> Any:
    attributes = {
        "format": format,
        "activations": activations,
        "four_over_six": int(four_over_six),
        "block_size": FORMATS[format].block,
        "K": weight_packed.shape[1] * 2,
        "N": weight_packed.shape[0],
        "hadamard": hadamard,
    }
    inputs = (x, weight_packed, weight_scale, weight_global_scale, input_global_scale, _float(bias))
    return emit_node("FP4Linear", inputs, attributes)


def _emit_int_linear(
    x: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    bits: int,
    group_size: int,
    activations: str,
    input_scale: Any = None,
    input_offset: Any = None,
    hadamard: int = 0,
) -> Any:
    from onnxscript import opset21

    op: Any = opset21  # its stubs do not know that the exporter takes lists
    features, rows = x.shape[-1], weight_scale.shape[0]
    packed = weight.dtype.value == INT32
    scale, bias = _float(weight_scale), _float(bias)
    stock = packed and bits in STOCK_BITS and activations == "none" and not hadamard
    block = stock_block(features, group_size) if stock else None
    if block is None:
        attributes = {
            "bits": bits,
            "group_size": group_size,
            "activations": activations,
            "packed": int(packed),
            "in_features": features,
            "hadamard": hadamard,
        }
        inputs = (x, weight, scale, bias, _float(input_scale), _float(input_offset))
        return emit_node("IntLinear", inputs, attributes)
    if repeats := (group_size or features) // block - 1:
        spread = op.Expand(op.Unsqueeze(scale, [-1]), [1, 1, repeats + 1])
        scale = op.Reshape(spread, [rows, features // block])
    attributes = {"K": features, "N": rows, "bits": bits, "block_size": block}
    return emit_node("MatMulNBits", (x, weight, scale, None, None, bias), attributes, STOCK_DOMAIN)


def _emit_fp8_linear(x: Any, weight: Any, weight_scale: Any, bias: Any, activations: str, hadamard: int = 0) -> Any:
    attributes = {"activations": activations, "hadamard": hadamard}
    return emit_node("FP8Linear", (x, weight, _float(weight_scale), _float(bias)), attributes)


def _emit_float_linear(
    x: Any,
    weight_packed: Any,
    weight_scale: Any,
    weight_global_scale: Any,
    input_scale: Any,
    input_shift: Any,
    bias: Any,
    format: str,
    activations: str,
) -> Any:
    block, scale = 0, weight_scale
    if weight_global_scale is None:
        scale = _float(weight_scale)
    else:
        block = weight_packed.shape[1] * 8 // FLOATS[format].bits // weight_scale.shape[1]
    attributes = {"format": format, "activations": activations, "block_size": block}
    inputs = (x, weight_packed, scale, weight_global_scale, input_scale, input_shift, _float(bias))
    return emit_node("FloatLinear", inputs, attributes)


def _emit_fp4_embedding(ids: Any, weight_packed: Any, weight_scale: Any, weight_global_scale: Any, format: str) -> Any:
    attributes = {
        "format": format,
        "block_size": FORMATS[format].block,
        "in_features": weight_packed.shape[1] * 2,
    }
    return emit_node("FP4Embedding", (ids, weight_packed, weight_scale, weight_global_scale), attributes)


def _emit_int_embedding(
    ids: Any, weight_packed: Any, weight_scale: Any, bits: int, group_size: int, in_features: int
) -> Any:
    attributes = {"bits": bits, "group_size": group_size, "in_features": in_features}
    return emit_node("IntEmbedding", (ids, weight_packed, _float(weight_scale)), attributes)


def _emit_sparsify(x: Any, threshold: Any, tokens: str) -> Any:
    return emit_node("Sparsify", (x, _float(threshold)), {"tokens": tokens})


def _emit_lowrank_linear(x: Any, down: Any, up: Any, bias: Any, down_bias: Any = None, order: Any = None) -> Any:
    return emit_node("LowRankLinear", (x, down, up, _float(bias), _float(down_bias), order), {})


def _emit_lowrank_ffn(x: Any, *given: Any, **named: Any) -> Any:
    values = dict(zip(("x", *INPUTS["LowRankFFN"][1:], "activation"), (x, *given), strict=False)) | named
    inputs = tuple(_float(v) if n.endswith("bias") else v for n, v in values.items() if n != "activation")
    return emit_node("LowRankFFN", inputs, {"activation": values["activation"]})


def _emit_mixed_bit_moe(*given: Any, **named: Any) -> Any:
    names = (*INPUTS["MixedBitMoE"], *ATTRIBUTES["MixedBitMoE"])
    v = dict(zip(names, given, strict=False)) | named
    attributes = {name: v[name] for name in ATTRIBUTES["MixedBitMoE"]}
    return emit_node("MixedBitMoE", tuple(v[n] for n in INPUTS["MixedBitMoE"]), attributes)


def _emit_lowrank_attention(*given: Any, **named: Any) -> Any:
    """The mask becomes what is added to scores."""
    from onnxscript import opset21

    op: Any = opset21  # its stubs ask for types that the exporter knows later
    names = (*INPUTS["LowRankAttention"], *ATTRIBUTES["LowRankAttention"])
    v = dict(zip(names, given, strict=False)) | named
    mask = v["mask"]
    if mask is not None and mask.dtype.name == "BOOL":
        v["mask"] = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=LOWEST))
    inputs = tuple(_float(v[n]) if n.endswith("bias") else v[n] for n in INPUTS["LowRankAttention"])
    attributes = {"heads": v["heads"], "kv_heads": v["kv_heads"], "scale": v["scale"], "causal": int(v["causal"])}
    return emit_node("LowRankAttention", inputs, attributes)
