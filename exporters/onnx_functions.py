"""What the nodes of compressed modules compute: a body of standard ops for each, as a model-local function.

A kernel library that registers the op takes the node; without one the runtime inlines the body. Bodies are
specialised: a function's `overload` names the attribute values and optional inputs it was written for, so a body has
no dead branches, and nodes that agree share one.

Bodies use opset 21 and neither bfloat16 nor FLOAT4E2M1 (CPU runtimes lack them): a table holds the values in each
byte of codes. They follow `kernels/*.py` operation by operation, so quantized activations have the same bits.

A runtime that folds constants decodes a weight when it loads the graph, and onnxruntime keeps every intermediate of
every layer until all are folded. So each is counted in bytes a weight: scales of a row multiply the result instead of
the weight, and the last change of shape is left to the run, where it is free (`_rows_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressor.exporters.onnx_nodes import (
    ATTRIBUTES,
    DOMAIN,
    FLOAT,
    FLOAT8E4M3FN,
    FLOAT8E5M2,
    INPUTS,
    INT32,
    LOWEST,
    OPSET,
    OPTIONAL,
    SHAPE,
    STOCK_DOMAIN,
)
from compressor.kernels.activations import STATIC_BITS, STATIC_FLOATS, TOKEN_BITS
from compressor.kernels.codec import E2M1, E2M1_MAX, E2M1_VALUES, E4M3_MAX, FLOATS, Float, int_values

if TYPE_CHECKING:
    import onnx_ir as ir

STOCK_OPS = {"MatMulNBits", "QMoE", "GroupQueryAttention", "RotaryEmbedding"}  # of onnxruntime's own that bodies use
HALF_STEPS = np.array([2 * e for e in E2M1_VALUES] + [-2 * e for e in E2M1_VALUES])  # E2M1 in integers, -12 … 12


class Body:
    """The nodes of a body while they are written: `op.Mul(a, 2.0)`; Python and numpy operands become constants."""

    def __init__(self) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.nodes: list[ir.Node] = []

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def add(*inputs: Any, **attributes: Any) -> ir.Value:
            values = [v if v is None or isinstance(v, self.ir.Value) else self.constant(v) for v in inputs]
            return self.several(1, op_type, *values, **attributes)[0]

        return add

    def several(self, outputs: int, op_type: str, *values: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """All outputs of a node."""
        domain = STOCK_DOMAIN if op_type in STOCK_OPS else ""
        node = self.ir.node(op_type, values, attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs

    def attribute(self, name: str) -> ir.Attr:
        """The function's own integer attribute, handed on under its name."""
        return self.ir.RefAttr(name, name, self.ir.AttributeType.INT)

    def constant(self, value: Any) -> ir.Value:
        """Python floats become float32 and ints int64; arrays keep their dtype."""
        if not isinstance(value, np.ndarray):
            first = value[0] if isinstance(value, (list, tuple)) else value
            value = np.array(value, np.float32 if isinstance(first, float) else np.int64)
        node = self.ir.node("Constant", [], {"value": self.ir.tensor(value)})
        self.nodes.append(node)
        return node.outputs[0]


def _flat(op: Body, values: ir.Value) -> ir.Value:
    return op.Reshape(values, [0, -1])


def _lookup(op: Body, packed: ir.Value, values: Sequence[float] | np.ndarray, dtype: type = np.float32) -> ir.Value:
    """uint8 [..., B] -> `dtype` [..., B, elements of a byte], for the values of all codes; low bits first.

    One table of 256 bytes instead of shifts and masks: a runtime that folds the body at load time makes one pass.
    """
    bits = (len(values) - 1).bit_length()
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (len(values) - 1)
    return op.Gather(np.array(values, dtype)[codes], op.Cast(packed, to=INT32))


def _rows_of(op: Body, weight: ir.Value, x: ir.Value) -> ir.Value:
    """weight [N, …] -> [N, K] when the model runs: a shape that takes a size of x cannot be folded, so no copy is kept.

    onnxruntime's Reshape hands on its input. 4 bytes a weight less at load, for two nodes on one number.
    """
    return op.Reshape(weight, op.Min(op.Shape(x, start=0, end=1), [0, -1]))


def _matmul(
    op: Body, x: ir.Value, weight: ir.Value, bias: ir.Value | None, row_scale: ir.Value | None = None
) -> ir.Value:
    """x [..., K] · weight [N, K]ᵀ, times row_scale [N, 1], + bias."""
    inside = bias is not None and row_scale is None
    y = op.Gemm(op.Flatten(x, axis=-1), weight, *([bias] if inside else []), transB=1)
    if row_scale is not None:
        y = op.Mul(y, op.Transpose(row_scale, perm=[1, 0]))
        y = y if bias is None else op.Add(y, bias)
    return op.Reshape(y, op.Concat(op.Shape(x, start=0, end=-1), [-1], axis=0))


def _round_float(op: Body, x: ir.Value, element: Float) -> ir.Value:
    """Steps by comparing with every power of two of the format; eight bits have too many, and casts that saturate."""
    if element.bits == 8:
        kind = {"e4m3": FLOAT8E4M3FN, "e5m2": FLOAT8E5M2}[element.name]
        return op.Cast(op.Cast(x, to=kind), to=FLOAT)
    magnitude = op.Min(op.Abs(x), element.top)
    step: Any = 2.0 ** (element.lowest - element.mantissa)
    for exponent in range(element.lowest + 1, element.lowest + 2**element.exponent - 1):
        step = op.Where(op.Less(magnitude, 2.0**exponent), step, 2.0 ** (exponent - element.mantissa))
    return op.Mul(op.Mul(op.Round(op.Div(magnitude, step)), step), op.Sign(x))


def _round_e2m1(op: Body, x: ir.Value) -> ir.Value:
    return _round_float(op, x, E2M1)


def _to_e4m3(op: Body, x: ir.Value) -> ir.Value:
    """Rounded to the E4M3 grid, as float32; the cast saturates."""
    return op.Cast(op.Cast(x, to=FLOAT8E4M3FN), to=FLOAT)


def _amax(op: Body, x: ir.Value) -> ir.Value:
    return op.ReduceMax(op.Abs(x), [-1], keepdims=1)


def _with_blocks(op: Body, x: ir.Value, size: int, rule: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """Apply `rule` to x [..., K] seen as [tokens * K / size, size]."""
    return op.Reshape(rule(op.Reshape(x, [-1, size])), op.Shape(x))


def _rotated(op: Body, x: ir.Value, block: int) -> ir.Value:
    """x [..., K] in blocks times H / √block, in the order of additions of kernels/activations.py; 0: x as it is."""
    y, half = x, block // 2
    while half:
        pairs = op.Reshape(y, [-1, 2, half])
        a, b = op.Slice(pairs, [0], [1], [1]), op.Slice(pairs, [1], [2], [1])
        y = op.Concat(op.Add(a, b), op.Sub(a, b), axis=1)
        half //= 2
    return op.Mul(op.Reshape(y, op.Shape(x)), block**-0.5) if block else x


def _nvfp4(op: Body, x: ir.Value, global_scale: ir.Value, four_over_six: bool) -> ir.Value:
    def scaled(blocks: ir.Value, amax: ir.Value, top: float) -> ir.Value:
        scale = _to_e4m3(op, op.Mul(global_scale, op.Div(amax, top)))
        step = op.Div(op.Where(op.Equal(scale, 0.0), 0.125, scale), global_scale)
        return op.Mul(_round_e2m1(op, op.Div(blocks, step)), step)

    def error(blocks: ir.Value, quantized: ir.Value) -> ir.Value:
        distance = op.Sub(quantized, blocks)
        errors = op.Mul(distance, distance)
        for half in (8, 4, 2, 1):
            errors = op.Add(op.Slice(errors, [0], [half], [1]), op.Slice(errors, [half], [2 * half], [1]))
        return errors

    def rule(blocks: ir.Value) -> ir.Value:
        amax = _amax(op, blocks)
        six = scaled(blocks, amax, E2M1_MAX)
        if not four_over_six:
            return six
        four = scaled(blocks, amax, 4.0)
        return op.Where(op.Less(error(blocks, four), error(blocks, six)), four, six)

    return _with_blocks(op, x, 16, rule)


def _e4m3_values() -> np.ndarray:
    """float32 [256]: what each byte means as E4M3."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def _e8m0_values(op: Body, codes: ir.Value) -> ir.Value:
    table = np.array([2.0 ** (code - 127) for code in range(255)] + [np.inf], np.float32)
    return op.Gather(table, op.Cast(codes, to=INT32))


def _mxfp4(op: Body, x: ir.Value) -> ir.Value:
    def rule(blocks: ir.Value) -> ir.Value:
        # The code is the smallest c with amax < 7 * 2^(c - 127). A logarithm finds it to within one, two exact
        # comparisons correct it; an amax of zero is lifted to the smallest normal number, whose code is 0 as well.
        amax = op.Max(_amax(op, blocks), float(np.finfo(np.float32).tiny))
        guess = op.Ceil(op.Div(op.Log(op.Div(amax, 7.0)), float(np.log(2.0))))
        guess = op.Clip(op.Add(guess, 127.0), 1.0, 253.0)
        above = op.GreaterOrEqual(amax, op.Mul(_e8m0_values(op, guess), 7.0))
        below = op.Less(amax, op.Mul(_e8m0_values(op, op.Sub(guess, 1.0)), 7.0))
        code = op.Add(guess, op.Sub(op.Cast(above, to=FLOAT), op.Cast(below, to=FLOAT)))
        step = _e8m0_values(op, op.Clip(code, 0.0, 253.0))
        return op.Mul(_round_e2m1(op, op.Div(blocks, step)), step)

    return _with_blocks(op, x, 32, rule)


def _token_scale(op: Body, x: ir.Value, top: float) -> ir.Value:
    scale = op.Div(_amax(op, x), top)
    return op.Where(op.Equal(scale, 0.0), float(np.finfo(np.float32).eps), scale)


def _per_token(op: Body, x: ir.Value, rule: str) -> ir.Value:
    """x rounded with one scale a token; rule "none" leaves it as it is."""
    if rule == "none":
        return x
    if rule in TOKEN_BITS:
        step = _token_scale(op, x, 2 ** (TOKEN_BITS[rule] - 1) - 0.5)
        return op.Mul(_int_codes(op, x, step, TOKEN_BITS[rule]), step)
    step = _token_scale(op, x, E4M3_MAX)
    return op.Mul(_to_e4m3(op, op.Div(x, step)), step)


def _int_codes(op: Body, x: ir.Value, step: ir.Value, bits: int) -> ir.Value:
    """float32 in [-2^(b-1), 2^(b-1) - 1]."""
    top = 2.0 ** (bits - 1)
    return op.Clip(op.Round(op.Div(x, step)), -top, top - 1)


def _fp4_linear(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    if a["format"] == "nvfp4":
        step = op.Div(op.Cast(v["weight_scale"], to=FLOAT), v["weight_global_scale"])
    else:
        step = _e8m0_values(op, v["weight_scale"])
    x = _rotated(op, v["x"], a["hadamard"])
    if a["activations"] == "int8_block":
        return _fp4_times_int8(op, x, v, step, a)
    weight = _fp4_blocks(op, v["weight_packed"], step, a["block_size"])
    if a["activations"] == "nvfp4":
        x = _nvfp4(op, x, v["input_global_scale"], bool(a["four_over_six"]))
    elif a["activations"] == "mxfp4":
        x = _mxfp4(op, x)
    else:
        x = _per_token(op, x, a["activations"])
    return _matmul(op, x, _rows_of(op, weight, x), v["bias"])


def _fp4_times_int8(op: Body, x: ir.Value, v: Mapping[str, Any], step: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    """MatMulNBits, whose accuracy level 4 rounds inputs as `int8_block` does, of bytes that are half steps above -12.

    One byte a weight is held, and read for a token, instead of four; the offset is small, so that two products
    fit into 16 bits.
    """
    size = a["block_size"]
    codes = op.Reshape(_lookup(op, v["weight_packed"], HALF_STEPS + 12, np.uint8), [0, -1, size])
    offset = op.Expand(np.array([[12]], np.uint8), op.Shape(step))
    return op.MatMulNBits(
        x, codes, op.Mul(step, 0.5), offset, None, v["bias"], bits=8, block_size=size, accuracy_level=4,
        **{name: op.attribute(name) for name in SHAPE},
    )  # fmt: skip


def _fp4_blocks(op: Body, packed: ir.Value, step: ir.Value, block_size: int) -> ir.Value:
    """uint8 [N, K/2], float32 steps [N, K/block] -> float32 [N, K/block, block/2, 2]."""
    blocks = op.Reshape(packed, [0, -1, block_size // 2])
    values = _lookup(op, blocks, E2M1_VALUES + tuple(-e for e in E2M1_VALUES))
    return op.Mul(values, op.Unsqueeze(step, [-1, -2]))


def _int_codes_of(op: Body, packed: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    """Packed uint8 [N, bytes] -> float32 codes [N, K]."""
    bits, features = a["bits"], a["in_features"]
    if bits == 3:
        return _three_bits(op, packed, features)
    values = _flat(op, _lookup(op, packed, int_values(bits)))
    return op.Slice(values, [0], [features], [1]) if features * bits % 32 else values  # the last word may be padded


def _three_bits(op: Body, packed: ir.Value, features: int) -> ir.Value:
    """uint8 [N, bytes] -> float32 [N, K]: eight codes are three bytes."""
    whole, held = 3 * -(-features // 8), 4 * -(-3 * features // 32)
    if whole > held:
        packed = op.Pad(packed, [0, 0, 0, whole - held])  # the last word ends before the last three bytes do
    packed = op.Slice(packed, [0], [whole], [1])  # without the rest of the last word
    codes = _cells(op, op.Reshape(packed, [0, -1, 3]), 3)
    values = _flat(op, op.Sub(op.Cast(codes, to=FLOAT), 4.0))
    return op.Slice(values, [0], [features], [1]) if features % 8 else values


def _cells(op: Body, cells: ir.Value, bits: int) -> ir.Value:
    """uint8 [..., 3], little endian -> the int32 codes [..., 24/b] in it."""
    word = op.ReduceSum(op.Mul(op.Cast(cells, to=INT32), np.array([1, 1 << 8, 1 << 16], np.int32)), [-1], keepdims=1)
    return op.Mod(op.Div(word, 1 << np.arange(0, 24, bits, dtype=np.int32)), np.array([1 << bits], np.int32))


def _int_rows(op: Body, packed: ir.Value, scale: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    """Offset binary uint8 [N, bytes], float32 scales [N, groups] -> float32 [N, K]."""
    size, features = a["group_size"], a["in_features"]
    if size:
        repeated = op.Expand(op.Unsqueeze(scale, [-1]), [1, 1, size])
        scale = op.Slice(_flat(op, repeated), [0], [features], [1])
    return op.Mul(_int_codes_of(op, packed, a), scale)


def _int_linear(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    x, scale, rule = _rotated(op, v["x"], a["hadamard"]), v["weight_scale"], a["activations"]
    if v["input_offset"] is not None:
        x = op.Sub(x, v["input_offset"])
    if rule != "none":
        bits = {**TOKEN_BITS, **STATIC_BITS}[rule]
        step = v["input_scale"] if rule in STATIC_BITS else _token_scale(op, x, 2 ** (bits - 1) - 0.5)
        x = op.Mul(_int_codes(op, x, step, bits), step)
    if a["packed"] and a["group_size"]:
        return _matmul(op, x, _int_rows(op, v["weight"], scale, a), v["bias"])
    # Codes as floats: onnxruntime's MatMulInteger takes four times as long for one token (docs/onnx.md).
    codes = _int_codes_of(op, v["weight"], a) if a["packed"] else op.Cast(v["weight"], to=FLOAT)
    return _matmul(op, x, codes, v["bias"], scale)


def _fp8_linear(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    x = _per_token(op, _rotated(op, v["x"], a["hadamard"]), a["activations"])
    return _matmul(op, x, op.Cast(v["weight"], to=FLOAT), v["bias"], v["weight_scale"])


def _float_linear(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    x, element, rule = v["x"], FLOATS[a["format"]], a["activations"]
    if v["input_shift"] is not None:
        powers = np.exp2(np.arange(32, dtype=np.float32))
        x = op.Mul(x, op.Gather(powers, op.Cast(v["input_shift"], to=INT32)))
    if rule != "none":
        x = op.Mul(_round_float(op, op.Div(x, v["input_scale"]), STATIC_FLOATS[rule]), v["input_scale"])
    values = _float_values(op, v["weight_packed"], element, a["block_size"])
    if not a["block_size"]:
        return _matmul(op, x, _rows_of(op, values, x), v["bias"], v["weight_scale"])
    step = op.Div(op.Cast(v["weight_scale"], to=FLOAT), v["weight_global_scale"])
    weight = op.Mul(values, op.Unsqueeze(step, [-1, -2]))
    return _matmul(op, x, _rows_of(op, weight, x), v["bias"])


def _float_values(op: Body, packed: ir.Value, element: Float, block: int) -> ir.Value:
    """uint8 [N, K*b/8] -> float32 [N, blocks, cells, elements of a cell]; a cell is a byte, or three for six bits.

    block 0: all of a row.
    """
    if element.bits != 6:
        return _lookup(
            op, op.Reshape(packed, [0, -1, block * element.bits // 8] if block else [0, 1, -1]), element.values
        )
    cells = op.Reshape(packed, [0, -1, block // 4, 3] if block else [0, 1, -1, 3])
    return op.Gather(np.array(element.values, np.float32), _cells(op, cells, 6))


def _fp4_embedding(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    ids = op.Reshape(v["ids"], [-1])
    codes = op.Gather(v["weight_scale"], ids)  # bytes: Gather takes no float8, and only rows in use are decoded
    if a["format"] == "nvfp4":
        step = op.Div(op.Gather(_e4m3_values(), op.Cast(codes, to=INT32)), v["weight_global_scale"])
    else:
        step = _e8m0_values(op, codes)
    rows = _fp4_blocks(op, op.Gather(v["weight_packed"], ids), step, a["block_size"])
    return op.Reshape(rows, op.Concat(op.Shape(v["ids"]), [a["in_features"]], axis=0))


def _int_embedding(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    ids = op.Reshape(v["ids"], [-1])
    rows = _int_rows(op, op.Gather(v["weight_packed"], ids), op.Gather(v["weight_scale"], ids), a)
    return op.Reshape(rows, op.Concat(op.Shape(v["ids"]), [a["in_features"]], axis=0))


def _low_rank(op: Body, x: ir.Value, v: Mapping[str, Any], prefix: str = "") -> ir.Value:
    """x times the linear whose inputs begin with `prefix`: down, then up where there is one. Factors may be bf16."""
    down, up, bias = (v[prefix + name] for name in ("down", "up", "bias"))
    if up is None:
        return _matmul(op, x, op.Cast(down, to=FLOAT), bias)
    z = op.Gemm(op.Flatten(x, axis=-1), op.Cast(down, to=FLOAT), transB=1)
    y = op.Gemm(z, op.Cast(up, to=FLOAT), *([] if bias is None else [bias]), transB=1)
    return op.Reshape(y, op.Concat(op.Shape(x, start=0, end=-1), [-1], axis=0))


def _lowrank_linear(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    order = v["order"]
    if order is None:
        return _low_rank(op, v["x"], v)
    z = _matmul(op, v["x"], op.Cast(v["down"], to=FLOAT), v["down_bias"])
    return op.Gather(op.Concat(z, _matmul(op, z, op.Cast(v["up"], to=FLOAT), v["bias"]), axis=-1), order, axis=-1)


def _activated(op: Body, x: ir.Value, activation: str) -> ir.Value:
    if activation == "relu":
        return op.Relu(x)
    if activation == "silu":
        return op.Mul(x, op.Sigmoid(x))
    if activation == "gelu":
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, 2**-0.5)), 1.0))
    cube = op.Mul(op.Mul(x, x), x)
    inner = op.Mul(op.Add(x, op.Mul(cube, 0.044715)), (2 / np.pi) ** 0.5)
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def _lowrank_ffn(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    hidden = _activated(op, _low_rank(op, v["x"], v, "in_"), a["activation"])
    if v["mul_down"] is not None:
        hidden = op.Mul(hidden, _low_rank(op, v["x"], v, "mul_"))
    return _low_rank(op, hidden, v, "out_")


def _lowrank_attention(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    heads, groups = a["heads"], a["kv_heads"]

    def lifted(name: str, count: int) -> ir.Value:  # [B, count, S, E]
        x = v[name]
        if v[f"{name}_up"] is not None:
            x = _matmul(op, x, op.Cast(v[f"{name}_up"], to=FLOAT), v[f"{name}_bias"])
        return op.Transpose(op.Reshape(x, [0, 0, count, -1]), perm=[0, 2, 1, 3])

    def repeated(x: ir.Value) -> ir.Value:  # [B, G, P, E] -> [B, H, P, E]
        if groups == heads:
            return x
        size = op.Shape(x, start=2)
        wide = op.Expand(op.Unsqueeze(x, [2]), op.Concat([1, 1, heads // groups], size, axis=0))
        return op.Reshape(wide, op.Concat([0, heads], size, axis=0))

    q, k, value = lifted("query", heads), repeated(lifted("key", groups)), repeated(lifted("value", groups))
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), float(a["scale"]))
    if v["mask"] is not None:
        scores = op.Add(scores, v["mask"])
    if a["causal"]:
        queries, keys = (op.Squeeze(op.Shape(x, start=2, end=3)) for x in (q, k))
        last = op.Add(op.Range(0, queries, 1), op.Sub(keys, queries))
        seen = op.LessOrEqual(op.Range(0, keys, 1), op.Unsqueeze(last, [-1]))
        scores = op.Max(op.Add(scores, op.Where(seen, 0.0, LOWEST)), LOWEST)
    y = op.Transpose(op.MatMul(op.Softmax(scores, axis=-1), value), perm=[0, 2, 1, 3])
    return op.Reshape(y, [0, 0, -1])


def _sparsify(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    x = v["x"]
    if a["tokens"] == "none":
        return op.Identity(x)
    length = op.Shape(x, start=-2, end=-1)
    dense = op.Greater(length, [1])  # longer rows: all of their tokens, or the first
    if a["tokens"] == "all":
        places = op.Unsqueeze(op.Range(0, op.Squeeze(length), 1), [-1])
        dense = op.And(op.Equal(places, 0), dense)
    return op.Where(op.Or(op.Greater(op.Abs(x), v["threshold"]), dense), x, 0.0)


def _sparse_linear(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    """The mask, then what the inner linear computes."""
    x, weight, scale = _sparsify(op, v, a), v["weight"], v["weight_scale"]
    if a["format"] == "float":
        return _matmul(op, x, op.Cast(weight, to=FLOAT), v["bias"])
    if a["format"] == "int4":
        shape = {name: op.attribute(name) for name in SHAPE}
        return op.MatMulNBits(x, weight, scale, None, None, v["bias"], bits=4, block_size=a["block_size"], **shape)
    inner = {**v, "x": x, "weight_packed": weight, "input_global_scale": None}
    return _fp4_linear(op, inner, {**a, "activations": "none", "hadamard": 0})


def _mixed_bit_moe(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    from compressor.exporters import onnx_moe  # which is written with the functions above

    return onnx_moe.body(op, v, a)


def _swiglu(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> ir.Value:
    size = op.Shape(v["x"], start=-1)
    half = op.Div(size, [2])
    gate, up = op.Slice(v["x"], [0], half, [-1]), op.Slice(v["x"], half, size, [-1])
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


def _attention(op: Body, v: Mapping[str, Any], a: Mapping[str, Any]) -> Sequence[ir.Value]:
    """The stock operator behind stock rotations: its own would turn all texts of a batch by the angles of the first."""
    query, key, value, cos, sin, rows = (
        v[name] for name in ("query", "key", "value", "cos_cache", "sin_cache", "position_ids")
    )
    if key is None:
        sizes = [a["num_heads"] * a["head_size"], *[a["kv_num_heads"] * a["head_size"]] * 2]
        query, key, value = op.several(3, "Split", query, op.constant(sizes), axis=-1)
    if a["do_rotary"]:
        query, key = (op.RotaryEmbedding(x, rows, cos, sin) for x in (query, key))
    lengths, bias = (v["seqlens_k"], v["total_sequence_length"]), v["attention_bias"]
    kept = {name: a[name] for name in ("num_heads", "kv_num_heads", "scale", "softcap")}
    inputs = (query, key, value, v["past_key"], v["past_value"], *lengths, None, None, None, bias)
    return op.several(3, "GroupQueryAttention", *inputs, **kept)


BODIES: dict[str, Callable[[Body, Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "FP4Linear": _fp4_linear,
    "IntLinear": _int_linear,
    "FP8Linear": _fp8_linear,
    "FloatLinear": _float_linear,
    "FP4Embedding": _fp4_embedding,
    "IntEmbedding": _int_embedding,
    "LowRankLinear": _lowrank_linear,
    "LowRankFFN": _lowrank_ffn,
    "LowRankAttention": _lowrank_attention,
    "Sparsify": _sparsify,
    "SparseLinear": _sparse_linear,
    "MixedBitMoE": _mixed_bit_moe,
    "SwiGLU": _swiglu,
    "GroupQueryAttention": _attention,
}


def body(op_type: str, attributes: Mapping[str, Any], present: set[str]) -> ir.Function:
    """The function of one op with these attribute values and these optional inputs."""
    import onnx_ir as ir

    op = Body()
    inputs = [ir.Value(name=name) for name in INPUTS[op_type]]
    given = {str(v.name): v if v.name in present or v.name not in OPTIONAL else None for v in inputs}
    made = BODIES[op_type](op, given, attributes)
    results = [made] if isinstance(made, ir.Value) else list(made)
    for index, value in enumerate(v for node in op.nodes for v in node.outputs):
        value.name = f"v{index}"
    for index, value in enumerate(results):
        value.name = f"y{index or ''}"
    for node in op.nodes:
        node.name = None
    imports = {"": OPSET} | {node.domain: 1 for node in op.nodes if node.domain}
    graph = ir.Graph(inputs, results, nodes=op.nodes, opset_imports=imports)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in ATTRIBUTES[op_type]]
    return ir.Function(DOMAIN, op_type, overload(op_type, attributes, present), graph=graph, attributes=declared)


def overload(op_type: str, attributes: Mapping[str, Any], present: set[str]) -> str:
    """Which specialisation: attribute values in order, then the optional inputs that are there."""
    values = [f"{name}={attributes[name]}" for name in ATTRIBUTES[op_type] if name not in SHAPE]
    return ",".join(values + [name for name in INPUTS[op_type] if name in OPTIONAL & present])


def attach_bodies(model: ir.Model) -> None:
    """Give every node of the domain its overload, and the model exactly the functions that its nodes use."""
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        del model.functions[key]
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        attributes = {name: node.attributes[name].value for name in ATTRIBUTES[node.op_type]}
        present = {name for name, v in zip(INPUTS[node.op_type], node.inputs, strict=False) if v is not None}
        node.overload = overload(node.op_type, attributes, present)
        if node.op_identifier() not in model.functions:
            function = body(node.op_type, attributes, present)
            model.functions[function.identifier()] = function
            model.graph.opset_imports.update(function.opset_imports)
