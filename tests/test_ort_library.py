"""The library of fused CPU ops: every op and attribute value against its torch reference, on odd sizes, for every
instruction set that this processor has; threads, onnxruntime, and what is said where it cannot be used."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compressor
from compressor.errors import CompressorError
from compressor.kernels import (
    codec,
    float_linear,
    fp4_embedding,
    fp4_linear,
    fp8_linear,
    int_embedding,
    int_linear,
    lowrank_ffn,
    lowrank_linear,
    native,
    sparsify,
)
from compressor.kernels.activations import STATIC_FLOATS

ISAS = ("portable", "avx2", "avx512vnni")
ROWS = {1: (129,), 33: (1, 2, 7, 31), 127: (1, 5)}  # N -> T
# Of the largest value: float32 sums in another order. A wrong code or scale is off by 1e-2 and more.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One node, its inputs beside x, and what torch computes."""

    op: str
    attributes: dict[str, Any]
    inputs: list[Tensor | None]
    reference: Callable[[Tensor], Tensor]
    columns: int
    rows: int

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        return native.run(self.op, self.attributes, [x, *self.inputs], (*x.shape[:-1], self.rows), threads)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 1009**i for i, n in enumerate(seed)))


def fp4_case(n: int, k: int, format: str, rule: str, better: bool = False, hadamard: int = 0, bias: bool = True):
    rng = generator(n, k)
    packed = torch.randint(0, 256, (n, k // 2), generator=rng).to(torch.uint8)
    scale, divisor = fp4_scale(rng, n, k, format)
    given = torch.tensor([23.5]) if rule == "nvfp4" else None
    b = torch.randn(n, generator=rng) if bias else None
    attributes = {"format": format, "activations": rule, "four_over_six": int(better), "hadamard": hadamard}
    return Case(
        "FP4Linear", attributes, [packed, scale, divisor, given, b],
        lambda x: fp4_linear.reference(x, packed, scale, divisor, given, b, format, rule, better, hadamard), k, n,
    )  # fmt: skip


def fp4_scale(rng: torch.Generator, n: int, k: int, format: str) -> tuple[Tensor, Tensor | None]:
    if format == "mxfp4":
        return torch.randint(120, 134, (n, k // 32), generator=rng).to(torch.uint8), None
    return torch.rand(n, k // 16, generator=rng).mul(400).to(torch.float8_e4m3fn), torch.tensor([37.5])


def int_case(n, k, bits, group, rule="none", packed=True, offset=False, hadamard=0, bias=True):
    rng = generator(n, k, bits)
    values = torch.tensor(codec.int_values(bits))[torch.randint(1 << bits, (n, k), generator=rng)].to(torch.int8)
    weight = codec.pack_int(values, bits) if packed else values
    scale = torch.rand(n, -(-k // group) if group else 1, generator=rng).add(0.1)
    b = torch.randn(n, generator=rng) if bias else None
    step = torch.tensor([0.03]) if rule.endswith("_static") else None
    z = torch.randn(k, generator=rng) if offset else None
    attributes = {
        "bits": bits, "group_size": group, "activations": rule, "packed": int(packed), "in_features": k,
        "hadamard": hadamard,
    }  # fmt: skip
    return Case(
        "IntLinear", attributes, [weight, scale, b, step, z],
        lambda x: int_linear.reference(x, weight, scale, b, bits, group, rule, step, z, hadamard), k, n,
    )  # fmt: skip


def finite_codes(rng: torch.Generator, n: int, k: int, element: codec.Float) -> Tensor:
    codes = torch.randint(0, len(element.magnitudes), (n, k), generator=rng)
    return (codes + (torch.randint(0, 2, (n, k), generator=rng) << (element.bits - 1))).to(torch.uint8)


def fp8_case(n: int, k: int, rule: str, hadamard: int = 0, bias: bool = True) -> Case:
    rng = generator(n, k)
    weight = finite_codes(rng, n, k, codec.FLOATS["e4m3"]).view(torch.float8_e4m3fn)
    scale = torch.rand(n, 1, generator=rng)
    b = torch.randn(n, generator=rng) if bias else None
    return Case(
        "FP8Linear", {"activations": rule, "hadamard": hadamard}, [weight, scale, b],
        lambda x: fp8_linear.reference(x, weight, scale, b, rule, hadamard), k, n,
    )  # fmt: skip


def float_case(n: int, k: int, format: str, rule: str, block: int = 0, shift: bool = False, bias: bool = True) -> Case:
    rng = generator(n, k)
    packed = codec.pack_codes(finite_codes(rng, n, k, codec.FLOATS[format]), codec.FLOATS[format].bits)
    scale, divisor = torch.rand(n, 1, generator=rng).add(0.1), None
    if block:
        scale = torch.rand(n, k // block, generator=rng).mul(400).to(torch.float8_e4m3fn)
        divisor = torch.tensor([64.0])
    step = None if rule == "none" else torch.tensor([0.07])
    powers = torch.randint(0, 6, (k,), generator=rng).to(torch.int8) if shift else None
    b = torch.randn(n, generator=rng) if bias else None
    return Case(
        "FloatLinear", {"format": format, "activations": rule, "block_size": block},
        [packed, scale, divisor, step, powers, b],
        lambda x: float_linear.reference(x, packed, scale, divisor, step, powers, b, format, rule), k, n,
    )  # fmt: skip


def factors(n: int, k: int, rank: int, dtype: torch.dtype, bias: bool = True) -> lowrank_linear.Factors:
    """rank 0: a dense matrix."""
    rng = generator(n, k, rank)
    down = (torch.randn(rank or n, k, generator=rng) / k**0.5).to(dtype)
    up = (torch.randn(n, rank, generator=rng) / rank**0.5).to(dtype) if rank else None
    return down, up, torch.randn(n, generator=rng) if bias else None


def lowrank_case(n: int, k: int, rank: int, dtype: torch.dtype, bias: bool = True) -> Case:
    down, up, b = factors(n, k, rank, dtype, bias)
    given = [down, up, b, None, None]
    return Case("LowRankLinear", {}, given, lambda x: lowrank_linear.reference(x, *given), k, n)  # type: ignore[arg-type]


def pivoted_case(n: int, k: int, rank: int, dtype: torch.dtype, bias: bool = True) -> Case:
    down, up, b = factors(n - rank, k, rank, dtype, bias)
    extra = [torch.randn(rank, generator=generator(rank)) if bias else None, torch.randperm(n, generator=generator(n))]
    given = [down, up, b, *extra]
    return Case("LowRankLinear", {}, given, lambda x: lowrank_linear.reference(x, *given), k, n)  # type: ignore[arg-type]


def ffn_case(n: int, k: int, activation: str, gated: bool, dtype: torch.dtype, ranks=(31, 33, 20), bias=True) -> Case:
    width = 127
    first, last = factors(width, k, ranks[0], dtype, bias), factors(n, width, ranks[2], dtype, bias)
    gate = factors(width, k, ranks[1], dtype, bias) if gated else (None, None, None)
    given = [*first, *gate, *last]
    return Case(
        "LowRankFFN", {"activation": activation}, given,
        lambda x: lowrank_ffn.reference(x, *given, activation), k, n,
    )  # fmt: skip


def sparse_case(
    n: int, k: int, format: str, tokens: str = "decode", dtype: torch.dtype = torch.float32, kept: float = 0.5
) -> Case:
    """`kept`: the share of normal inputs; 1: all but zeros. `case` tells kernels apart that keep a copy of a weight."""
    rng = generator(n, k)
    threshold = torch.full((k,), torch.tensor(1 - kept).erfinv().item() * 2**0.5)
    block = {"float": 0, "nvfp4": 16}.get(format, 32)
    attributes = {"format": format, "tokens": tokens, "block_size": block, "K": k, "N": n}
    if format == "float":
        weight, b = torch.randn(n, k, generator=rng).to(dtype), torch.randn(n, generator=rng)
        given, inner = [weight, None, None, b], lambda x: lowrank_linear.product(x, (weight, None, b))
    elif format == "int4":
        words, scale, b, *_ = int_case(n, k, 4, block).inputs
        given = [words.view(torch.uint8).view(n, k // block, block // 2), scale, None, b]
        inner = lambda x: int_linear.reference(x, words, scale, b, 4, block, "none", None, None, 0)  # noqa: E731
    else:
        case = fp4_case(n, k, format, "none")
        given, inner = [*case.inputs[:3], case.inputs[4]], case.reference
    return Case(
        "SparseLinear", attributes | {"constant": 1, "case": next(COUNTER)}, [threshold, *given],
        lambda x: inner(sparsify.reference(x, threshold, tokens)), k, n,
    )  # fmt: skip


COUNTER = itertools.count()
SPARSE = [("float", k) for k in (1, 31, 33, 127)] + [("int4", 96), ("nvfp4", 48), ("mxfp4", 800)]


def cases(n: int) -> Iterator[Case]:
    """Every attribute value; K odd where the format's blocks permit, and beyond one panel of 768 columns."""
    rules = [("none", False), ("nvfp4", False), ("nvfp4", True), ("mxfp4", False), ("int8", False), ("fp8", False)]
    rules.append(("int8_block", False))
    for (rule, better), (format, k) in itertools.product(rules, [("nvfp4", 48), ("nvfp4", 544), ("mxfp4", 1600)]):
        if k % 32 == 0 or rule != "mxfp4":
            yield fp4_case(n, k, format, rule, better, bias=k != 48)
    yield fp4_case(n, 256, "nvfp4", "nvfp4", hadamard=16)
    yield fp4_case(n, 256, "mxfp4", "none", hadamard=128)
    for bits, k in itertools.product((1, 2, 3, 4, 8), (1, 31, 33, 63, 127, 513)):
        yield int_case(n, k, bits, 0, bias=k != 33)
    for group, k in [(16, 80), (32, 96), (32, 100), (24, 96), (128, 1024), (7, 63), (64, 63)]:
        yield int_case(n, k, 4, group)
        yield int_case(n, k, 8, group, offset=True)
    for bits, (group, k) in itertools.product((1, 2, 3), ((32, 100), (24, 96), (128, 1024))):
        yield int_case(n, k, bits, group)
    yield int_case(n, 127, 8, 0, packed=False)
    for rule, k in itertools.product(("int8", "int6", "int8_static", "int6_static"), (1, 31, 33, 63, 127, 513)):
        yield int_case(n, k, 6 if "6" in rule else 8, 0, rule, packed=False, offset=k == 63, bias=k != 31)
    yield int_case(n, 192, 8, 0, "int8", packed=False, hadamard=64)
    for rule, k in itertools.product(("none", "fp8"), (1, 31, 33, 63, 127, 513, 1601)):
        yield fp8_case(n, k, rule, bias=k != 33)
    yield fp8_case(n, 64, "fp8", hadamard=32)
    for format, block in itertools.product(codec.FLOATS, (0, 16, 24)):
        yield float_case(n, 1008 if block else 260, format, "none", block, shift=block == 16)
    for rule in STATIC_FLOATS:
        yield float_case(n, 100, "e2m1", rule, shift=True)
    for dtype, (k, rank) in itertools.product((torch.float32, torch.bfloat16), ((1, 1), (33, 31), (513, 63))):
        yield lowrank_case(n, k, rank, dtype, bias=k != 33)
        if rank < n:
            yield pivoted_case(n, k, rank, dtype, bias=k != 33)
    for activation, gated in itertools.product(lowrank_ffn.ACTIVATIONS, (False, True)):
        yield ffn_case(n, 63, activation, gated, torch.bfloat16 if gated else torch.float32, bias=activation != "silu")
    yield ffn_case(n, 63, "gelu", True, torch.float32, ranks=(0, 5, 0))


def inputs(tokens: int, k: int) -> Iterator[Tensor]:
    """Wide ranges, a token of zeros, ties."""
    rng = generator(tokens, k)
    wide = torch.randn(tokens, k, generator=rng) * torch.exp2(torch.randint(-6, 6, (tokens, k), generator=rng).float())
    wide[tokens // 2, : max(k // 2, 1)] = 0
    yield wide
    yield torch.randint(-13, 13, (tokens, k), generator=rng) * 0.25


def close(found: Tensor, expected: Tensor) -> bool:
    """Of the first tokens of `expected`, whose largest value is the measure: a single sum may cancel."""
    return bool((found - expected[: len(found)]).abs().max() <= TOLERANCE * expected.abs().max() + 1e-30)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    try:
        native.library()
    except CompressorError as error:
        pytest.skip(str(error))


@pytest.fixture(params=ISAS)
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    if not native.use_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert native.use_isa(best)


@pytest.mark.parametrize("rows", ROWS)
def test_every_op_computes_what_its_reference_computes(chosen: str, rows: int) -> None:
    for case in cases(rows):
        for tokens in ROWS[rows]:
            for x in inputs(max(tokens, 16), case.columns):
                assert close(case(x[:tokens]), case.reference(x)), (case.op, case.attributes, tokens)


@pytest.mark.parametrize("rule", ["nvfp4", "four_over_six", "mxfp4", "int8", "int8_block", "fp8"])
def test_inputs_are_rounded_to_the_same_bits(chosen: str, rule: str) -> None:
    """An identity of exact ones hands the rounded input through; 192 columns of the input at a time."""
    k = 192
    packed = codec.pack_nibbles(torch.eye(k, dtype=torch.uint8) * 2)  # code 2 is 1.0
    ones, divisor = torch.ones(k, k // 16).to(torch.float8_e4m3fn), torch.ones(1)
    better, rule = rule == "four_over_six", "nvfp4" if rule == "four_over_six" else rule
    given = torch.tensor([23.5]) if rule == "nvfp4" else None
    for hadamard, tokens in itertools.product((0, 64), (1, 200)):
        attributes = {"format": "nvfp4", "activations": rule, "four_over_six": int(better), "hadamard": hadamard}
        for x in inputs(tokens, k):
            found = native.run("FP4Linear", attributes, [x, packed, ones, divisor, given], (tokens, k), 1)
            expected = fp4_linear.reference(x, packed, ones, divisor, given, None, "nvfp4", rule, better, hadamard)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 31])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_w4a4_sums_are_exact(chosen: str, format: str, tokens: int) -> None:
    """With all scales 1 the result is a sum of quarters, which neither order nor width may change."""
    n, k = 33, 512
    rng = generator(tokens)
    packed = torch.randint(0, 256, (n, k // 2), generator=rng).to(torch.uint8)
    block = 16 if format == "nvfp4" else 32
    scale = torch.ones(n, k // 16).to(torch.float8_e4m3fn) if block == 16 else torch.full((n, k // 32), 127).byte()
    x = codec.e2m1_values(torch.randint(0, 16, (tokens, k), generator=rng)).unflatten(-1, (-1, block))
    x[..., 0] = 6.0  # every block has scale 1
    x = x.flatten(-2)
    one = torch.ones(1) if block == 16 else None
    attributes = {"format": format, "activations": format, "four_over_six": 0, "hadamard": 0}
    found = native.run("FP4Linear", attributes, [x, packed, scale, one, one], (tokens, n), 1)
    weight = codec.e2m1_values(codec.unpack_nibbles(packed))
    assert torch.equal(found.double(), x.double() @ weight.double().T)


def test_integer_activations_are_exact(chosen: str) -> None:
    """Codes at both ends, -128 included: sums as in int64, then the two multiplications of the node's body."""
    n, k = 33, 513
    weight = torch.randint(-128, 128, (n, k), generator=generator(1)).to(torch.int8)
    weight[0] = -128
    scale, step = torch.rand(n, 1, generator=generator(2)), torch.tensor([0.5])
    x = torch.randint(-140, 140, (31, k), generator=generator(3)).float() * 0.5
    x[0] = -100.0
    codes = (x / step).round().clamp(-128, 127).long()
    expected = (codes @ weight.long().T).float() * step * scale.T
    attributes = {
        "bits": 8, "group_size": 0, "activations": "int8_static", "packed": 0, "in_features": k, "hadamard": 0,
    }  # fmt: skip
    for tokens in (1, 31):
        found = native.run("IntLinear", attributes, [x[:tokens], weight, scale, None, step], (tokens, n), 1)
        assert torch.equal(found, expected[:tokens])


def test_embeddings_have_the_same_bits(chosen: str) -> None:
    rng = generator(5)
    ids = torch.tensor([[0, 10, -1], [3, 3, 7]])
    for format, k in itertools.product(("nvfp4", "mxfp4"), (32, 96)):
        packed = torch.randint(0, 256, (11, k // 2), generator=rng).to(torch.uint8)
        scale, divisor = fp4_scale(rng, 11, k, format)
        found = native.run("FP4Embedding", {"format": format}, [ids, packed, scale, divisor], (2, 3, k), 1)
        assert torch.equal(found, fp4_embedding.reference(ids, packed, scale, divisor, format))
    for bits, (group, k) in itertools.product((2, 4, 8), ((0, 33), (16, 48), (24, 50))):
        words = codec.pack_int(torch.randint(-2, 2, (11, k), generator=rng).to(torch.int8), bits)
        scale = torch.rand(11, -(-k // group) if group else 1, generator=rng)
        attributes = {"bits": bits, "group_size": group, "in_features": k}
        found = native.run("IntEmbedding", attributes, [ids, words, scale], (2, 3, k), 1)
        assert torch.equal(found, int_embedding.reference(ids, words, scale, bits, group, k))


@pytest.mark.parametrize(("format", "k"), SPARSE)
def test_sparse_linears_read_what_is_large(chosen: str, format: str, k: int) -> None:
    """Few tokens and many, in one row or each its own; all channels, half of them, none; inputs at the threshold."""
    shapes = [(1, 1), (2, 1), (7, 1), (33, 1), (1, 2), (1, 7), (2, 33)]
    for n, kept, tokens in itertools.product((1, 33, 130), (1.0, 0.5, 0.0), ("decode", "all", "none")):
        case = sparse_case(n, k, format, tokens, kept=kept)
        threshold = case.inputs[0]
        for shape in shapes if kept == 0.5 else shapes[:2]:
            x = torch.randn(*shape, k, generator=generator(*shape, k))
            if kept == 0.5:
                x[..., ::3] = threshold[::3] * x[..., ::3].sign()  # left out
            expected = case.reference(x)
            measure = (x.abs() @ torch.ones(k)).max() * 20  # a single sum may cancel
            assert (case(x) - expected).abs().max() <= TOLERANCE * measure, (n, kept, tokens, shape)
            assert all(torch.equal(case(x), case(x, threads)) for threads in (2, 4))


def test_what_no_token_reads_is_not_touched(chosen: str) -> None:
    """NaN in the weights of small inputs: a product that reads them is NaN."""
    case = sparse_case(130, 64, "float", dtype=torch.bfloat16)
    threshold, weight, *_ = case.inputs
    assert threshold is not None and weight is not None
    weight[:, ::2], threshold[::2] = float("nan"), float("inf")
    for tokens in (1, 2, 3):
        assert case(torch.ones(tokens, 1, 64)).isfinite().all()
    assert case(torch.ones(4, 1, 64)).isnan().any()  # many tokens multiply all of them


def test_ten_runs_of_a_sparse_linear_give_the_same_bits() -> None:
    """With more weights than one task reads, and fewer tiles than tasks."""
    for format, k in (("float", 800), ("int4", 800), ("nvfp4", 800)):
        case = sparse_case(1100, k, format)
        x = torch.randn(1, 1, k, generator=generator(k))
        first = case(x, 2)
        assert close(first, case.reference(x))
        assert all(torch.equal(first, case(x, threads)) for threads in (1, 2, 4) * 4)


def test_the_number_of_threads_changes_no_bit(chosen: str) -> None:
    for case in (
        fp4_case(513, 1600, "nvfp4", "none"), fp4_case(513, 576, "nvfp4", "nvfp4"),
        int_case(513, 1025, 8, 0, "int8", packed=False), fp8_case(513, 1025, "fp8"),
        float_case(513, 1008, "e3m2", "none", 16), lowrank_case(513, 1025, 100, torch.bfloat16),
        pivoted_case(513, 1025, 100, torch.bfloat16),
        ffn_case(513, 1025, "gelu", True, torch.float32, ranks=(300, 100, 0)),
    ):  # fmt: skip
        for tokens in (1, 31, 200):
            x = next(inputs(tokens, case.columns))
            one = case(x)
            assert all(torch.equal(one, case(x, threads)) for threads in (2, 4)), (case.op, case.attributes, tokens)


def test_torch_ops_use_it_in_any_float_type_and_shape() -> None:
    case = fp4_case(40, 64, "nvfp4", "none")
    packed, scale, divisor, _, bias = case.inputs
    x = torch.randn(2, 3, 64, generator=generator(9))
    for given in (x, x.bfloat16(), x.transpose(0, 1), x[:0]):
        y = fp4_linear.fp4_linear(given, packed, scale, divisor, None, bias, "nvfp4", "none", False)
        expected = case.reference(given)
        assert y.dtype == given.dtype and y.shape == expected.shape
        assert torch.equal(y, native.linear("FP4Linear", case.attributes, given, case.inputs, 40))
        assert torch.allclose(y.float(), expected.float(), rtol=1e-2 if given.dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(
    ("op", "attributes", "sentence"),
    [
        ("FP4Linear", {"format": "nvfp9"}, "FP4Linear: format is 'nvfp9', this library knows nvfp4, mxfp4"),
        ("FP4Linear", {"activations": "int3"}, "activations is 'int3', this library knows none, nvfp4"),
        ("FP4Linear", {"activations": "none, int8"}, "activations is 'none, int8'"),
        ("FP4Linear", {"hadamard": 12}, "hadamard is '12', this library knows 0 and powers of two"),
        ("LowRankFFN", {"activation": "mish"}, "activation is 'mish', this library knows gelu, gelu_tanh, silu, relu"),
        ("SomeLinear", {}, "this library has no op SomeLinear"),
    ],
)
def test_what_it_does_not_know_is_one_sentence(op: str, attributes: dict[str, Any], sentence: str) -> None:
    case = fp4_case(4, 32, "nvfp4", "none")
    with pytest.raises(CompressorError, match=sentence):
        native.run(op, case.attributes | attributes, [torch.zeros(1, 32), *case.inputs], (1, 4), 1)


def test_tensors_that_do_not_fit_are_one_sentence() -> None:
    case = fp4_case(4, 32, "nvfp4", "none")
    packed, scale, divisor, _, _ = case.inputs
    assert packed is not None and scale is not None
    for wrong, sentence in [
        ([torch.zeros(1, 48), packed, scale, divisor], "x has 48 features, its weight 32"),
        ([torch.zeros(1, 32), packed, scale[:3], divisor], r"weight_scale has shape \[3, 2\], expected \[4, 2\]"),
        ([torch.zeros(1, 32), packed, scale, None], "weight_global_scale is missing"),
        ([torch.zeros(1, 32), packed, scale.float(), divisor], "weight_scale has element type 1"),
    ]:
        with pytest.raises(CompressorError, match=sentence):
            native.run("FP4Linear", case.attributes, wrong, (1, 4), 1)
    low, turned = lowrank_case(4, 32, 3, torch.float32), pivoted_case(9, 32, 3, torch.float32)
    wide = ffn_case(4, 32, "relu", False, torch.float32)
    for case, at, other, sentence in [
        (low, 1, torch.zeros(4, 5), r"up has shape \[4, 5\], expected \[any, 3\]"),
        (low, 0, torch.zeros(3, 32).half(), "down has element type 0"),
        (turned, 4, torch.arange(9) + 1, r"order\[8\] is 9; there are outputs 0 to 8"),
        (turned, 4, torch.arange(8), r"order has shape \[8\], expected \[9\]"),
        (turned, 4, None, "down_bias is of outputs that z holds, which `order` must name"),
        (wide, 6, torch.zeros(4, 99), "its linears are 127 x 32 and 4 x 99, which do not follow one another"),
    ]:
        tensors = [*case.inputs[:at], other, *case.inputs[at + 1 :]]
        tensors = [*tensors[:-2], None, None] if case is wide else tensors
        with pytest.raises(CompressorError, match=sentence):
            native.run(case.op, case.attributes, [torch.zeros(1, 32), *tensors], (1, 4), 1)
    with pytest.raises(CompressorError, match="id 9 is not one of the table's 4 rows"):
        native.run("FP4Embedding", {"format": "nvfp4"}, [torch.tensor([9]), packed, scale, divisor], (1, 32), 1)


# --- in onnxruntime ---------------------------------------------------------------------------------------------------


def as_onnx(tensor: Tensor) -> Any:
    """The same bytes as an array of the ONNX dtype."""
    import ml_dtypes

    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def session(case: Case, threads: int = 1, library: bool = True, body: bool = True) -> Any:
    """A session on a model of one node, with its body or without."""
    import onnx_ir as ir
    import onnxruntime

    from compressor.exporters import onnx_functions, onnx_nodes

    names = onnx_nodes.INPUTS[case.op]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    values: list[Any] = [x]
    for name, tensor in zip(names[1:], case.inputs, strict=True):
        values.append(None if tensor is None else ir.val(name, const_value=ir.tensor(as_onnx(tensor), name=name)))
    attributes = {name: case.attributes.get(name, 16) for name in onnx_nodes.ATTRIBUTES[case.op]}
    node = ir.node(case.op, values, attributes, domain=onnx_nodes.DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    constants = [v for v in values[1:] if v is not None]
    opsets = {"": onnx_nodes.OPSET, onnx_nodes.DOMAIN: onnx_nodes.VERSION}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one_node")
    model = ir.Model(graph, ir_version=10)
    if body:
        onnx_functions.attach_bodies(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        compressor.register_ops(options)
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


IN_ONNXRUNTIME = [
    fp4_case(65, 96, "nvfp4", "none"), fp4_case(65, 96, "mxfp4", "mxfp4"), int_case(65, 63, 4, 16),
    int_case(65, 63, 8, 0, "int8_static", packed=False, offset=True), fp8_case(65, 63, "fp8"),
    float_case(65, 64, "e3m2", "e4m3_static", shift=True), lowrank_case(65, 63, 20, torch.bfloat16),
    pivoted_case(65, 63, 20, torch.bfloat16),
    ffn_case(65, 63, "gelu", True, torch.bfloat16), ffn_case(65, 63, "silu", False, torch.float32, bias=False),
]  # fmt: skip


@pytest.mark.parametrize("case", IN_ONNXRUNTIME, ids=lambda case: case.op)
def test_onnxruntime_runs_the_node_itself(case: Case) -> None:
    """Without a body only the library can run it; with one, the library is preferred and gives the same bits."""
    x = next(inputs(31, case.columns))
    expected = case(x)
    assert close(expected, case.reference(x))
    for threads, body in itertools.product((1, 2, 4), (True, False)):
        found = session(case, threads, body=body).run(None, {"x": x.reshape(1, 31, -1).numpy()})[0]
        assert torch.equal(torch.from_numpy(found)[0], expected)
    with pytest.raises(Exception, match=case.op):
        session(case, library=False, body=False)


@pytest.mark.parametrize("format", ["float", "int4", "nvfp4", "mxfp4"])
def test_a_sparse_linear_in_onnxruntime_with_and_without_the_library(format: str) -> None:
    for tokens, dtype in (("decode", torch.bfloat16), ("all", torch.float32)):
        case = sparse_case(65, 96, format, tokens, dtype)
        with_library, body = session(case, 2), session(case, library=False)
        for shape in ((1, 1), (2, 1), (1, 7), (7, 1), (1, 33)):
            x = torch.randn(*shape, 96, generator=generator(*shape))
            found = torch.from_numpy(with_library.run(None, {"x": x.numpy()})[0])
            assert torch.equal(found, case(x))
            other = torch.from_numpy(body.run(None, {"x": x.numpy()})[0])
            assert close(found, case.reference(x)) and close(other, case.reference(x))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_words_may_come_as_the_bytes_that_a_graph_declares(bits: int) -> None:
    case = int_case(65, 12, bits, 0)
    words, *rest = case.inputs
    assert words is not None
    x = next(inputs(31, 12))
    read = Case(case.op, case.attributes, [words.view(torch.uint8), *rest], case.reference, 12, 65)
    found = session(read, body=False).run(None, {"x": x.numpy()})[0]
    assert torch.equal(torch.from_numpy(found), case(x))


def test_the_same_file_runs_without_the_library() -> None:
    case = IN_ONNXRUNTIME[0]
    x = next(inputs(31, case.columns))
    assert close(torch.from_numpy(session(case, library=False).run(None, {"x": x.numpy()})[0]), case.reference(x))


def test_an_unknown_value_stops_the_session_and_a_wrong_shape_the_run() -> None:
    case = IN_ONNXRUNTIME[0]
    attributes = case.attributes | {"activations": "int3"}
    with pytest.raises(Exception, match="activations is 'int3', this library knows none, nvfp4"):
        session(Case(case.op, attributes, case.inputs, case.reference, case.columns, case.rows), body=False)
    with pytest.raises(Exception, match="x has 64 features, its weight 96"):
        session(case).run(None, {"x": torch.zeros(1, 64).numpy()})


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnxruntime

    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(CompressorError, match="was not built; install g"):
        compressor.register_ops(onnxruntime.SessionOptions())
    (tmp_path / native.NAME).write_bytes(b"not a library")
    with pytest.raises(CompressorError, match=r"onnxruntime refuses .*; models run without it"):
        compressor.register_ops(onnxruntime.SessionOptions())


def test_a_runtime_that_is_too_old_is_one_sentence(tmp_path: Path) -> None:
    """A stand-in whose newest API is 16, as in onnxruntime 1.16: only its first slot is used."""
    source = tmp_path / "old.cc"
    source.write_text(OLD_RUNTIME.replace("LIBRARY", str(native.path())))
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "old"), "-ldl"], check=True)
    run = subprocess.run([str(tmp_path / "old")], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "The compressor ops need onnxruntime 1.17 or newer and this is 1.16.3; update it, or leave the library out: "
        "the model runs without it."
    )


OLD_RUNTIME = """
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>
struct Status;
struct Api { Status* (*create)(int, const char*); };
struct Base { const Api* (*api)(uint32_t); const char* (*version)(); };
static Status* create(int, const char* message) { std::printf("%s", message); return nullptr; }
static const Api first = {create};
int main() {
  void* library = dlopen("LIBRARY", RTLD_NOW);
  auto add = reinterpret_cast<Status* (*)(void*, const Base*)>(dlsym(library, "RegisterCustomOps"));
  const Base base = {[](uint32_t version) { return version <= 16 ? &first : nullptr; }, [] { return "1.16.3"; }};
  add(nullptr, &base);
}
"""


# --- beside a model ---------------------------------------------------------------------------------------------------


def test_place_and_remove_leave_a_folder_that_verifies(tmp_path: Path) -> None:
    from compressor import ops
    from compressor.folder import MANIFEST_FORMAT, sha256
    from compressor.verify import check_files

    config = {"model": {"decoder": {"session_options": {"log_id": "x"}}}}
    (tmp_path / ops.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    before = (tmp_path / ops.CONFIG).read_bytes()
    files = {ops.CONFIG: sha256(tmp_path / ops.CONFIG)}
    manifest = {"format": MANIFEST_FORMAT, "files": files, "tensors": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")

    def verified() -> list[str]:
        extra = {"model.safetensors": sha256(tmp_path / "model.safetensors")}
        stored = json.loads((tmp_path / "manifest.json").read_text())
        return [row.status for row in check_files(tmp_path, {**stored, "files": stored["files"] | extra})]

    assert ops.place(tmp_path).read_bytes() == native.path().read_bytes()
    named = json.loads((tmp_path / ops.CONFIG).read_text())["model"]["decoder"]["session_options"]
    assert named == {"log_id": "x", "custom_ops_library": native.NAME} and verified() == ["ok"]
    ops.remove(tmp_path)
    assert (tmp_path / ops.CONFIG).read_bytes() == before and not (tmp_path / native.NAME).exists()
    assert verified() == ["ok"]


def test_compress_ops_says_where_it_is() -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "compressor", "ops", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert said("--path").strip() == str(native.path())
    assert native.isa() in said()
