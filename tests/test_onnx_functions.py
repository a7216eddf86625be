"""Every body, run by stock onnxruntime, against the op's reference on the same input."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from compressor.exporters import onnx_functions, onnx_nodes
from compressor.kernels import codec
from compressor.kernels.activations import STATIC_FLOATS
from compressor.kernels.float_linear import reference as float_linear
from compressor.kernels.fp4_embedding import reference as fp4_embedding
from compressor.kernels.fp4_linear import reference as fp4_linear
from compressor.kernels.fp8_linear import reference as fp8_linear
from compressor.kernels.int_embedding import reference as int_embedding
from compressor.kernels.int_linear import reference as int_linear
from compressor.kernels.lowrank_attention import reference as lowrank_attention
from compressor.kernels.lowrank_ffn import ACTIVATIONS
from compressor.kernels.lowrank_ffn import reference as lowrank_ffn
from compressor.kernels.lowrank_linear import reference as lowrank_linear

K, N = 96, 40
INPUT_DIVISOR = torch.tensor([23.5])
# float32 sums of 96 products in another order; a wrong code or scale is off by a thousand times this.
TOLERANCE = 3e-6


def as_onnx(tensor: Tensor) -> np.ndarray:
    """The same bytes as an array of the ONNX dtype."""
    import ml_dtypes

    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def runner(op_type: str, attributes: dict[str, Any], tensors: dict[str, Tensor | None]) -> Callable[[Tensor], Tensor]:
    """x -> y of a model that is one node; `tensors` are the other inputs by name."""
    names = onnx_nodes.INPUTS[op_type]
    if "hadamard" in onnx_nodes.ATTRIBUTES[op_type]:
        attributes = {"hadamard": 0} | attributes
    kind = ir.DataType.INT64 if names[0] == "ids" else ir.DataType.FLOAT
    x = ir.Value(name=names[0], type=ir.TensorType(kind))
    values: list[ir.Value | None] = [x]
    for name in names[1:]:
        tensor = tensors.get(name)
        values.append(None if tensor is None else ir.val(name, const_value=ir.tensor(as_onnx(tensor), name=name)))
    node = ir.node(op_type, values, attributes, domain=onnx_nodes.DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": onnx_nodes.OPSET, onnx_nodes.DOMAIN: onnx_nodes.VERSION}
    constants = [v for v in values[1:] if v is not None]
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one_node")
    model = ir.Model(graph, ir_version=10)
    onnx_functions.attach_bodies(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {names[0]: given.numpy()})[0])


def activations() -> Iterator[Tensor]:
    """Awkward token counts and batch dims; wide ranges, zero blocks and tokens, ties, huge and subnormal values, and
    the abs-max 7 * 2^n from which MXFP4 takes the next scale."""
    generator = torch.Generator().manual_seed(1)
    for shape in [(1, K), (3, K), (65, K), (2, 3, K), (1, 1, K)]:
        normal = torch.randn(shape, generator=generator)
        wide = normal * torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
        wide[..., :32] = 0
        yield wide
        yield torch.zeros(shape)
        yield torch.randint(-13, 13, shape, generator=generator) * 0.25
        tokens = (*shape[:-1], 1)
        yield normal * torch.exp2(torch.randint(-140, 100, tokens, generator=generator).float())
        power = torch.exp2(torch.randint(-3, 3, tokens, generator=generator).float())
        yield torch.cat((7 * power, normal[..., 1:32].clamp(-1, 1) * power, 7 * power, normal[..., 33:]), dim=-1)


def same_bits(found: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]) -> None:
    for x in activations():
        assert torch.equal(found(x), expected(x))


def close(
    found: Callable[[Tensor], Tensor],
    expected: Callable[[Tensor], Tensor],
    zero: float = torch.finfo(torch.float32).tiny,
) -> None:
    """Token by token, so that large ones do not hide small ones; inputs up to `zero` need not count."""
    for x in activations():
        y, reference = found(x), expected(x)
        assert ((y - reference).abs().amax(-1) <= TOLERANCE * reference.abs().amax(-1) + zero * K).all()


def fp4_weight(format: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed, scales, divisor) of a weight."""
    if format == "mxfp4":
        blocks = codec.blocks_of(weight, 32)
        scale = codec.mxfp4_block_exponent(blocks.abs().amax(-1))
        step, divisor = codec.e8m0_values(scale), None
    else:
        blocks = codec.blocks_of(weight, 16)
        divisor = codec.nvfp4_weight_divisor(weight.abs().max())
        scale = codec.to_e4m3(codec.nvfp4_block_scale(blocks.abs().amax(-1), divisor))
        step = scale.float() / divisor
    codes = codec.e2m1_codes(codec.round_e2m1(blocks / step.unsqueeze(-1)))
    return codec.pack_nibbles(codes.flatten(-2)), scale, divisor


FP4_RULES = [("none", False), ("nvfp4", False), ("nvfp4", True), ("mxfp4", False), ("fp8", False), ("int8", False)]


def fp4(
    format: str, rule: str, four_over_six: bool, weight: Tensor, bias: Tensor | None, hadamard: int = 0
) -> tuple[Any, Any]:
    packed, scale, divisor = fp4_weight(format, weight)
    given = INPUT_DIVISOR if rule == "nvfp4" else None
    attributes = {
        "format": format,
        "activations": rule,
        "four_over_six": int(four_over_six),
        "block_size": 16 if format == "nvfp4" else 32,
        "K": weight.shape[1],
        "N": weight.shape[0],
        "hadamard": hadamard,
    }
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": divisor,
        "input_global_scale": given,
        "bias": bias,
    }
    ours = runner("FP4Linear", attributes, tensors)
    return ours, lambda x: fp4_linear(x, packed, scale, divisor, given, bias, format, rule, four_over_six, hadamard)


@pytest.mark.parametrize(("rule", "four_over_six"), FP4_RULES)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_quantizes_activations_to_the_same_bits(format: str, rule: str, four_over_six: bool) -> None:
    # A weight of ones on the diagonal hands the quantized activations through.
    same_bits(*fp4(format, rule, four_over_six, torch.eye(K), None))


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, N)])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_times_int8_in_blocks_is_what_the_stock_op_computes(format: str, bias: Tensor | None) -> None:
    """Rounding included: one code of 96 that rounds the other way is a thousand times the tolerance."""
    torch.manual_seed(0)
    zero = 127 / torch.finfo(torch.float32).max  # the stock op has other bits where 127 / amax is infinite, ours has 0
    for hadamard in (0, 32):
        close(*fp4(format, "int8_block", False, torch.randn(N, K), bias, hadamard), zero=zero)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_rotated_activations_have_the_same_bits(format: str, block: int) -> None:
    """Which a matrix product, whose order of additions is the runtime's own, does not give."""
    for rule in ("none", format, "fp8", "int8"):
        same_bits(*fp4(format, rule, False, torch.eye(K), None, hadamard=block))


@pytest.mark.parametrize("block", [16, 32])
def test_other_ops_rotate_too(block: int) -> None:
    torch.manual_seed(0)
    eye, ones, bias = torch.eye(K, dtype=torch.int8), torch.ones(K, 1), torch.randn(K)
    attributes = {"bits": 8, "group_size": 0, "packed": 0, "in_features": K, "hadamard": block}
    same_bits(
        runner("IntLinear", attributes | {"activations": "int8"}, {"weight": eye, "weight_scale": ones}),
        lambda x: int_linear(x, eye, ones, None, 8, 0, "int8", hadamard=block),
    )
    values = torch.randint(-8, 8, (K, K))
    packed = {"weight": words(values, 4), "weight_scale": ones, "bias": bias}
    close(
        runner("IntLinear", attributes | {"bits": 4, "packed": 1, "activations": "none"}, packed),
        lambda x: int_linear(x, codec.pack_int(values, 4), ones, bias, 4, 0, "none", hadamard=block),
    )
    fp8 = eye.to(torch.float8_e4m3fn)
    same_bits(
        runner("FP8Linear", {"activations": "fp8", "hadamard": block}, {"weight": fp8, "weight_scale": ones}),
        lambda x: fp8_linear(x, fp8, ones, None, "fp8", block),
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_multiplies(format: str, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(N, K) * torch.exp2(torch.randn(N, 1) * 4), torch.randn(N) if has_bias else None
    close(*fp4(format, "none", False, weight, bias))
    close(*fp4(format, format, False, weight, bias))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_rows(format: str) -> None:
    """Every byte of codes and every scale that is written: E4M3 0 to 448, E8M0 0 to 254."""
    generator = torch.Generator().manual_seed(0)
    block = 16 if format == "nvfp4" else 32
    packed = torch.arange(256, dtype=torch.uint8).repeat(N, 1)
    scale = torch.randint(0, 127 if format == "nvfp4" else 255, (N, 512 // block), generator=generator).to(torch.uint8)
    divisor = torch.tensor([37.5]) if format == "nvfp4" else None
    attributes = {"format": format, "block_size": block, "in_features": 512}
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}
    rows = runner("FP4Embedding", attributes, tensors)
    stored = scale.view(torch.float8_e4m3fn) if format == "nvfp4" else scale
    for shape in [(1, 1), (2, 7), (5,)]:
        ids = torch.randint(0, N, shape, generator=generator)
        assert torch.equal(rows(ids), fp4_embedding(ids, packed, stored, divisor, format))


def words(values: Tensor, bits: int) -> Tensor:
    """Packed as the file stores them, seen as bytes."""
    return codec.pack_int(values, bits).view(torch.uint8)


@pytest.mark.parametrize(("features", "group"), [(96, 0), (96, 24), (50, 0), (50, 5)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_int_weights_that_the_stock_op_cannot_read(bits: int, features: int, group: int) -> None:
    torch.manual_seed(0)
    if bits == 3 and features % 8:
        features, group = 56, group and 7  # eight of three bits are whole bytes, and a step takes no other layer
    values = torch.tensor(codec.int_values(bits))[torch.randint(1 << bits, (N, features))]
    scale = torch.rand(N, features // group if group else 1) + 0.5
    packed, bias = codec.pack_int(values, bits), torch.randn(N)
    attributes = {"bits": bits, "group_size": group, "in_features": features}
    linear = attributes | {"activations": "none", "packed": 1}
    found = runner("IntLinear", linear, {"weight": words(values, bits), "weight_scale": scale, "bias": bias})
    x = torch.randn(3, features)
    expected = int_linear(x, packed, scale, bias, bits, group, "none")
    assert (found(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    if bits not in (2, 4, 8):
        return  # no table has them
    rows = runner("IntEmbedding", attributes, {"weight_packed": words(values, bits), "weight_scale": scale})
    for shape in [(1, 1), (2, 7), (5,)]:
        ids = torch.randint(0, N, shape)
        assert torch.equal(rows(ids), int_embedding(ids, packed, scale, bits, group, features))


@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_activations(has_bias: bool) -> None:
    torch.manual_seed(0)
    attributes = {"bits": 8, "group_size": 0, "activations": "int8", "packed": 0, "in_features": K}
    eye, ones = torch.eye(K, dtype=torch.int8), torch.ones(K, 1)
    same_bits(
        runner("IntLinear", attributes, {"weight": eye, "weight_scale": ones}),
        lambda x: int_linear(x, eye, ones, None, 8, 0, "int8"),
    )
    values, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N, 1) + 0.5
    bias = torch.randn(N) if has_bias else None
    for rule in ("int8", "none"):
        tensors = {"weight": values, "weight_scale": scale, "bias": bias}
        close(
            runner("IntLinear", attributes | {"activations": rule}, tensors),
            lambda x, rule=rule: int_linear(x, values, scale, bias, 8, 0, rule),
        )


STATIC = [(rule, offset) for rule in ("int8_static", "int6_static", "int6") for offset in (False, True)]


@pytest.mark.parametrize(("rule", "offset"), STATIC)
def test_static_integers_and_offsets(rule: str, offset: bool) -> None:
    """Rounding has the same bits, clipped values included; without rounding the offset is still subtracted."""
    torch.manual_seed(0)
    attributes = {"bits": 8, "group_size": 0, "activations": rule, "packed": 0, "in_features": K}
    scale = torch.tensor([0.25]) if rule.endswith("static") else None
    shift = torch.randn(K) if offset else None
    eye, ones = torch.eye(K, dtype=torch.int8), torch.ones(K, 1)
    inputs = {"input_scale": scale, "input_offset": shift}
    same_bits(
        runner("IntLinear", attributes, {"weight": eye, "weight_scale": ones, **inputs}),
        lambda x: int_linear(x, eye, ones, None, 8, 0, rule, scale, shift),
    )
    values, steps, bias = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N, 1) + 0.5, torch.randn(N)
    tensors = {"weight": values, "weight_scale": steps, "bias": bias, **inputs}
    x = torch.randn(2, 3, K) * 20
    for used in (rule, "none"):
        found = runner("IntLinear", attributes | {"activations": used}, tensors)(x)
        expected = int_linear(x, values, steps, bias, 8, 0, used, scale, shift)
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    plain = int_linear(x, values, steps, bias, 8, 0, "none", scale, None)
    assert offset != torch.equal(expected, plain)


@pytest.mark.parametrize("rule", ["none", "fp8"])
def test_fp8(rule: str) -> None:
    torch.manual_seed(0)
    eye, ones = torch.eye(K).to(torch.float8_e4m3fn), torch.ones(K, 1)
    same_bits(
        runner("FP8Linear", {"activations": rule}, {"weight": eye, "weight_scale": ones}),
        lambda x: fp8_linear(x, eye, ones, None, rule),
    )
    values, scale, bias = codec.to_e4m3(torch.randn(N, K) * 100), torch.rand(N, 1) + 0.5, torch.randn(N)
    close(
        runner("FP8Linear", {"activations": rule}, {"weight": values, "weight_scale": scale, "bias": bias}),
        lambda x: fp8_linear(x, values, scale, bias, rule),
    )


def floats(format: str, rule: str, weight: Tensor, block: int, shift: Tensor | None, bias: Tensor | None) -> Any:
    """(ours, the op) on `weight` [N, K] in blocks, or in rows (0), and an input scale that is no power of two."""
    element = codec.FLOATS[format]
    blocks = codec.blocks_of(weight, block or K)
    amax = blocks.abs().amax(-1)
    if block:
        divisor = codec.nvfp4_weight_divisor(weight.abs().amax(), element.top)
        scale = codec.to_e4m3(codec.nvfp4_block_scale(amax, divisor, element.top))
        step = scale.float() / divisor
    else:
        scale, divisor = amax / element.top, None
        step = scale
    codes = codec.float_codes(codec.round_float(blocks / step.unsqueeze(-1), element).flatten(-2), element)
    packed = codec.pack_codes(codes, element.bits)
    given = None if rule == "none" else torch.tensor([0.37])
    attributes = {"format": format, "activations": rule, "block_size": block}
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": divisor,
        "input_scale": given,
        "input_shift": shift,
        "bias": bias,
    }
    ours = runner("FloatLinear", attributes, tensors)
    return ours, lambda x: float_linear(x, packed, scale, divisor, given, shift, bias, format, rule)


@pytest.mark.parametrize("rule", ["none", *STATIC_FLOATS])
@pytest.mark.parametrize("shifted", [False, True])
def test_static_floats_have_the_same_bits(rule: str, shifted: bool) -> None:
    shift = torch.arange(K).remainder(32).to(torch.int8) if shifted else None
    same_bits(*floats("e2m1", rule, torch.eye(K) * 6, 0, shift, None))


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("format", codec.FLOATS)
def test_floats_multiply(format: str, block: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K) * torch.exp2(torch.randn(N, 1) * 4)
    close(*floats(format, "none", weight, block, torch.arange(K).remainder(4).to(torch.int8), torch.randn(N)))
    close(*floats(format, f"{format}_static", weight, block, None, None))


def test_every_byte_of_a_table_is_read_right() -> None:
    for bits in (2, 4, 8):
        every = torch.arange(256, dtype=torch.uint8).repeat(1, 1)
        values = every.view(torch.int32)
        scale = torch.ones(1, 1)
        features = 256 * 8 // bits
        attributes = {"bits": bits, "group_size": 0, "in_features": features}
        rows = runner("IntEmbedding", attributes, {"weight_packed": every, "weight_scale": scale})
        ids = torch.zeros(1, dtype=torch.int64)
        assert torch.equal(rows(ids), codec.unpack_int(values, bits, features).float())


def test_overloads_tell_specialisations_apart() -> None:
    named = set()
    for (rule, four_over_six), format in itertools.product(FP4_RULES, ["nvfp4", "mxfp4"]):
        attributes = {"format": format, "activations": rule, "four_over_six": int(four_over_six), "block_size": 16}
        attributes |= {"hadamard": 0, "K": 64, "N": 8}
        for present in (set(), {"bias"}):
            named.add(onnx_functions.overload("FP4Linear", attributes, present))
    assert len(named) == 2 * 2 * len(FP4_RULES)


@pytest.mark.parametrize(
    ("features", "group", "block"),
    [(576, 64, 64), (576, 0, 64), (1536, 0, 256), (96, 48, 16), (96, 24, None), (50, 0, None)],
)
def test_stock_op_reads_any_multiple_of_16(features: int, group: int, block: int | None) -> None:
    assert onnx_nodes.stock_block(features, group) == block


def low_rank(n: int, k: int, rank: int, prefix: str = "", bias: bool = True) -> dict[str, Tensor | None]:
    """rank 0: a dense matrix. Factors are stored as bfloat16, or as float32 where there is no bias."""
    dtype = torch.bfloat16 if bias else torch.float32
    return {
        f"{prefix}down": (torch.randn(rank or n, k) / k**0.5).to(dtype),
        f"{prefix}up": (torch.randn(n, rank) / rank**0.5).to(dtype) if rank else None,
        f"{prefix}bias": torch.randn(n) if bias else None,
    }


@pytest.mark.parametrize("bias", [False, True])
def test_lowrank_linear(bias: bool) -> None:
    torch.manual_seed(0)
    tensors = low_rank(N, K, 7, bias=bias)
    close(runner("LowRankLinear", {}, tensors), lambda x: lowrank_linear(x, *tensors.values()))


@pytest.mark.parametrize("bias", [False, True])
def test_lowrank_linear_whose_outputs_are_partly_its_ranks(bias: bool) -> None:
    torch.manual_seed(0)
    tensors = low_rank(N - 7, K, 7, bias=bias)
    tensors |= {"down_bias": torch.randn(7) if bias else None, "order": torch.randperm(N)}
    expected = lambda x: lowrank_linear(x, *tensors.values())  # noqa: E731
    close(runner("LowRankLinear", {}, tensors), expected)
    moved = {**tensors, "order": tensors["order"].roll(1)}
    with pytest.raises(AssertionError):
        close(runner("LowRankLinear", {}, moved), expected)


@pytest.mark.parametrize(("gated", "ranks"), [(False, (8, 0, 5)), (True, (8, 9, 5)), (True, (0, 9, 0))])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lowrank_ffn(activation: str, gated: bool, ranks: tuple[int, int, int]) -> None:
    """On inputs of ordinary size: an activation takes a value that is off by a rounding of its largest part."""
    torch.manual_seed(0)
    tensors = low_rank(64, K, ranks[0], "in_", bias=gated)
    tensors |= low_rank(64, K, ranks[1], "mul_") if gated else dict.fromkeys(("mul_down", "mul_up", "mul_bias"))
    tensors |= low_rank(N, 64, ranks[2], "out_", bias=not gated)
    found = runner("LowRankFFN", {"activation": activation}, tensors)
    for shape in [(1, K), (3, K), (65, K), (2, 3, K)]:
        x = torch.randn(shape)
        expected = lowrank_ffn(x, *tensors.values(), activation)
        assert (found(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(("groups", "ranked"), [(4, "qkv"), (2, "v"), (1, "")])
def test_lowrank_attention(groups: int, ranked: str, causal: int) -> None:
    """The query is the input; all else is constant. A mask that is added, with padding on the left."""
    torch.manual_seed(0)
    rows, keys, heads, size = 2, 9, 4, 8
    names = ("query", "key", "value")
    width = [12 if n[0] in ranked else count * size for n, count in zip(names, (heads, groups, groups), strict=True)]
    counts = (heads, groups, groups)
    ups = [torch.randn(c * size, 12) / 3 if n[0] in ranked else None for n, c in zip(names, counts, strict=True)]
    biases = [None if up is None else torch.randn(len(up)) for up in ups]
    key, value = (torch.randn(rows, keys, w) for w in width[1:])
    mask = torch.zeros(rows, 1, 1, keys)
    mask[0, ..., :3] = onnx_nodes.LOWEST
    rest = [key, value, *ups, *biases, mask]
    attributes = {"heads": heads, "kv_heads": groups, "scale": size**-0.5, "causal": causal}
    tensors = dict(zip(onnx_nodes.INPUTS["LowRankAttention"][1:], rest, strict=True))
    found = runner("LowRankAttention", attributes, tensors)
    for queries in (1, 5, 9):
        x = torch.randn(rows, queries, width[0])
        expected = lowrank_attention(x, *rest, heads, groups, size**-0.5, bool(causal))
        assert (found(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
