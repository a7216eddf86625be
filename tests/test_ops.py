"""Every op against an independent element-by-element reading of its stored bytes, and its fake against the real one."""

import pytest
import torch

from compressor.kernels import activations as act
from compressor.kernels import codec
from compressor.kernels.float_linear import dequantize as dequantize_float
from compressor.kernels.float_linear import float_linear
from compressor.kernels.fp4_embedding import fp4_embedding
from compressor.kernels.fp4_linear import dequantize as dequantize_fp4
from compressor.kernels.fp4_linear import fp4_linear
from compressor.kernels.fp8_linear import fp8_linear
from compressor.kernels.int_embedding import int_embedding
from compressor.kernels.int_linear import int_linear

N, K = 5, 64


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)


def fp4_tensors(rng, format):
    packed = torch.randint(0, 256, (N, K // 2), generator=rng).to(torch.uint8)
    if format == "mxfp4":
        return packed, torch.randint(120, 134, (N, K // 32), generator=rng).to(torch.uint8), None
    scale = torch.rand(N, K // 16, generator=rng).mul(400).add(1).to(torch.float8_e4m3fn)
    return packed, scale, torch.tensor([37.5])


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_weights_decode_by_hand(rng, format):
    packed, scale, divisor = fp4_tensors(rng, format)
    found = dequantize_fp4(packed, scale, divisor)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for n in range(N):
        for k in range(K):
            code = (int(packed[n, k // 2]) >> (4 * (k % 2))) & 15
            value = values[code & 7] * (-1 if code & 8 else 1)
            step = float(scale[n, k // 16]) / 37.5 if format == "nvfp4" else 2.0 ** (int(scale[n, k // 32]) - 127)
            assert found[n, k].item() == pytest.approx(value * step, rel=1e-6)


@pytest.mark.parametrize("tokens", [(1,), (3,), (2, 65)])
def test_fp4_linear_multiplies_and_adds_bias(rng, tokens):
    packed, scale, divisor = fp4_tensors(rng, "nvfp4")
    x, bias = torch.randn(*tokens, K, generator=rng), torch.randn(N, generator=rng)
    y = fp4_linear(x, packed, scale, divisor, None, bias, "nvfp4", "none", False)
    assert torch.allclose(y, x @ dequantize_fp4(packed, scale, divisor).T + bias, atol=1e-4)
    assert fp4_linear(x.bfloat16(), packed, scale, divisor, None, bias, "nvfp4", "none", False).dtype == torch.bfloat16


def test_int_linear_by_group_and_by_row(rng):
    values = torch.randint(-8, 8, (N, K), generator=rng).to(torch.int8)
    x = torch.randn(3, K, generator=rng)
    for group, columns in ((16, K // 16), (0, 1)):
        scale = torch.rand(N, columns, generator=rng).bfloat16()
        dense = values.float() * scale.float().repeat_interleave(K // columns, dim=1)
        y = int_linear(x, codec.pack_int(values, 4), scale, None, 4, group, "none")
        assert torch.allclose(y, x @ dense.T, atol=1e-4)


def test_int_embedding_gathers_rows(rng):
    values = torch.randint(-128, 128, (11, 32), generator=rng).to(torch.int8)
    scale = torch.rand(11, 2, generator=rng).bfloat16()
    ids = torch.tensor([[0, 10], [3, 3]])
    rows = int_embedding(ids, codec.pack_int(values, 8), scale, 8, 16, 32)
    assert torch.equal(rows, (values.float() * scale.float().repeat_interleave(16, 1))[ids])
    assert int_embedding(ids[0], codec.pack_int(values, 8), scale, 8, 16, 32).shape == (2, 32)


def test_static_rules_by_hand():
    """Codes of 0.5 steps: ties to even, both ends clipped, the offset subtracted before anything is rounded."""
    x = torch.tensor([[1.25, 1.75, -90.0, 90.0, 0.2]])
    scale, offset = torch.tensor([0.5]), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    found = act.quantize(x, "int8_static", input_scale=scale)
    assert found.tolist() == [[1.0, 2.0, -64.0, 63.5, 0.0]]
    assert act.quantize(x, "int6_static", input_scale=scale).tolist() == [[1.0, 2.0, -16.0, 15.5, 0.0]]
    moved = act.quantize(x, "int8_static", input_scale=scale, input_offset=offset)
    assert moved.tolist() == [[1.0, 2.0, -64.0, 63.5, -1.0]]
    assert act.quantize(x, "none", input_offset=offset)[0, 4].item() == pytest.approx(-0.8)


def test_six_bits_per_token_use_both_ends():
    x = torch.tensor([[31.5, -31.5, 1.4]])
    assert act.quantize(x, "int6").tolist() == [[31.0, -32.0, 1.0]]


def float_tensors(rng, format, blocks):
    """(packed, scale, divisor) of random finite codes."""
    element = codec.FLOATS[format]
    codes = torch.randint(0, len(element.magnitudes), (N, K), generator=rng)
    codes += torch.randint(0, 2, (N, K), generator=rng) << (element.bits - 1)
    packed = codec.pack_codes(codes.to(torch.uint8), element.bits)
    if not blocks:
        return packed, torch.rand(N, 1, generator=rng).add(0.5).bfloat16(), None
    return packed, torch.rand(N, K // 16, generator=rng).mul(400).add(1).to(torch.float8_e4m3fn), torch.tensor([64.0])


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("format", codec.FLOATS)
def test_float_weights_decode_by_hand(rng, format, blocks):
    """Bit strings read with Python's integers, and every code by the definition of a float."""
    packed, scale, divisor = float_tensors(rng, format, blocks)
    found = dequantize_float(packed, scale, divisor, format)
    e, m = int(format[1]), int(format[3])
    for n in range(N):
        row = int.from_bytes(bytes(packed[n].tolist()), "little")
        for k in range(K):
            code = row >> (k * (1 + e + m)) & (2 ** (1 + e + m) - 1)
            sign, binade, fraction = code >> (e + m), code >> m & (2**e - 1), code & (2**m - 1)
            bias = 2 ** (e - 1) - 1
            value = (fraction / 2**m + bool(binade)) * 2.0 ** (max(binade, 1) - bias)
            step = float(scale[n, k // 16]) / 64.0 if blocks else float(scale[n, 0])
            assert found[n, k].item() == pytest.approx((-value if sign else value) * step, rel=1e-6)


def test_float_linear_shifts_rounds_multiplies_and_adds(rng):
    packed, scale, divisor = float_tensors(rng, "e2m3", True)
    x, bias = torch.randn(2, 3, K, generator=rng), torch.randn(N, generator=rng)
    shift = torch.randint(0, 6, (K,), generator=rng).to(torch.int8)
    step, dense = torch.tensor([0.3]), dequantize_float(packed, scale, divisor, "e2m3")
    moved = x * 2.0 ** shift.float()
    y = float_linear(x, packed, scale, divisor, None, shift, bias, "e2m3", "none")
    assert torch.allclose(y, moved @ dense.T + bias, rtol=1e-5, atol=1e-3)
    rounded = codec.round_float(moved / step, codec.FLOATS["e3m0"]) * step
    y = float_linear(x, packed, scale, divisor, step, shift, bias, "e2m3", "e3m0_static")
    assert torch.allclose(y, rounded @ dense.T + bias, rtol=1e-5, atol=1e-3)
    half = float_linear(x.bfloat16(), packed, scale, divisor, step, None, None, "e2m3", "e4m3_static")
    assert half.dtype == torch.bfloat16 and half.shape == (2, 3, N)


def test_fp4_embedding_on_golden_bytes():
    # Row 0: codes 1..8 twice, low nibble first. Row 1: +6 and -6 alternating. Row 2: 0.5 and -0.5.
    packed = torch.tensor([[0x21, 0x43, 0x65, 0x87] * 2, [0xF7] * 8, [0x91] * 8], dtype=torch.uint8).repeat(1, 2)
    row = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0]
    ids = torch.tensor([[2, 0, 0], [1, 2, 1]])
    # E4M3: 0x38 is 1, 0x40 is 2, 0x7E is 448; the divisor 4 makes 0.25, 0.5, 112.
    scale = torch.tensor([[0x38, 0x40], [0x40, 0x7E], [0x7E, 0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = torch.tensor(
        [
            [0.25 * v for v in row * 2] + [0.5 * v for v in row * 2],
            [3.0, -3.0] * 8 + [672.0, -672.0] * 8,
            [56.0, -56.0] * 8 + [0.125, -0.125] * 8,
        ]
    )
    assert torch.equal(fp4_embedding(ids, packed, scale, torch.tensor([4.0]), "nvfp4"), expected[ids])
    assert torch.equal(fp4_embedding(ids[0], packed, scale, torch.tensor([4.0]), "nvfp4"), expected[ids[0]])
    # E8M0: 126 is a half, 127 is 1, 130 is 8; one scale for all 32.
    exponents = torch.tensor([[127], [130], [126]], dtype=torch.uint8)
    expected = torch.tensor([row * 4, [48.0, -48.0] * 16, [0.25, -0.25] * 16])
    assert torch.equal(fp4_embedding(ids, packed, exponents, None, "mxfp4"), expected[ids])
    assert fp4_embedding(ids[:, :0], packed, exponents, None, "mxfp4").shape == (2, 0, 32)


OPS = ["fp4", "fp4 rotated", "int8", "static", "fp8", "fp8 rotated", "float", "embedding"]
OPS += ["fp4 embedding nvfp4", "fp4 embedding mxfp4"]


@pytest.mark.parametrize("op", OPS)
def test_registrations_are_consistent(rng, op):
    x = torch.randn(2, 3, K, generator=rng)
    if op == "fp4":
        args = (x, *fp4_tensors(rng, "nvfp4"), torch.tensor([100.0]), None, "nvfp4", "nvfp4", True)
        function = fp4_linear
    elif op == "fp4 rotated":
        args, function = (x, *fp4_tensors(rng, "mxfp4"), None, None, "mxfp4", "mxfp4", False, 32), fp4_linear
    elif op == "int8":
        weight = torch.randint(-128, 128, (N, K), generator=rng).to(torch.int8)
        args = (x, weight, torch.rand(N, 1, generator=rng).bfloat16(), torch.zeros(N), 8, 0, "int8")
        function = int_linear
    elif op == "static":
        weight = torch.randint(-32, 32, (N, K), generator=rng).to(torch.int8)
        args = (x, weight, torch.rand(N, 1, generator=rng).bfloat16(), None, 6, 0, "int6_static")
        args, function = (*args, torch.tensor([0.5]), torch.randn(K, generator=rng)), int_linear
    elif op in ("fp8", "fp8 rotated"):
        weight = torch.randn(N, K, generator=rng).to(torch.float8_e4m3fn)
        args, function = (x, weight, torch.rand(N, 1, generator=rng).bfloat16(), None, "fp8"), fp8_linear
        args = (*args, 16) if op.endswith("rotated") else args
    elif op == "float":
        shift, rule = torch.ones(K, dtype=torch.int8), "e3m0_static"
        args = (x, *float_tensors(rng, "e3m2", True), torch.tensor([0.5]), shift, None, "e3m2", rule)
        function = float_linear
    elif op.startswith("fp4 embedding"):
        format, ids = op.rpartition(" ")[2], torch.randint(0, N, (2, 3), generator=rng)
        args, function = (ids, *fp4_tensors(rng, format), format), fp4_embedding
    else:
        table = codec.pack_int(torch.zeros(7, 32, dtype=torch.int8), 4)
        args, function = (
            (torch.zeros(2, 3, dtype=torch.int64), table, torch.ones(7, 1).bfloat16(), 4, 0, 32),
            int_embedding,
        )
    # test_schema compares inputs with allclose, which float8 does not have.
    torch.library.opcheck(function, args, test_utils=("test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("tokens", [(1,), (3,), (2, 65)])
def test_rotation_against_its_matrix(rng, block, tokens):
    """Sylvester's matrix entry by entry: minus where the bits that row and column share are an odd number."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.tensor(signs, dtype=torch.float64) / block**0.5
    x = torch.randn(*tokens, 192, generator=rng)
    expected = (x.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    assert torch.allclose(act.rotate(x, block).double(), expected, atol=1e-6)
    assert torch.allclose(act.rotate(x.double(), block), expected, atol=1e-14)
    assert act.rotate(x.bfloat16(), block).dtype == torch.float32
    assert act.rotate(x.flatten(0, -2)[:0], block).shape == (0, 192)  # an expert that no token chose
    with pytest.raises(RuntimeError):  # and no block reaches from one token into the next
        act.rotate(torch.randn(4, 8), block)


@pytest.mark.parametrize("rule", ["none", "int8", "mxfp4"])
def test_ops_rotate_before_they_round(rng, rule):
    x = torch.randn(3, K, generator=rng) * torch.logspace(0, 2, K)
    rotated = act.rotate(x, 32)
    packed, scale, divisor = fp4_tensors(rng, "mxfp4")
    plain = [packed, scale, divisor, None, None, "mxfp4", rule, False]
    found = fp4_linear(x, *plain, 32)
    assert torch.equal(found, fp4_linear(rotated, *plain)) and not torch.equal(found, fp4_linear(x, *plain))
    weight = torch.randint(-128, 128, (N, K), generator=rng).to(torch.int8)
    if rule != "mxfp4":
        given = (weight, torch.ones(N, 1), None, 8, 0, rule)
        offset = torch.randn(K, generator=rng)  # of what is rotated already
        found = int_linear(x, *given, None, offset, 32)
        assert torch.equal(found, int_linear(rotated, *given, None, offset))


class TestActivations:
    def test_nvfp4_by_hand(self):
        # amax 12 and divisor 4: scale e4m3(4 * 12 / 6) = 8, step 2.
        x = torch.tensor([[12.0, -5.0, 1.0, 0.4] + [0.0] * 12])
        assert act.nvfp4(x, torch.tensor([4.0]))[0, :4].tolist() == [12.0, -4.0, 1.0, 0.0]

    def test_zero_blocks_stay_zero(self):
        x = torch.zeros(2, 64)
        for rule in ("nvfp4", "mxfp4", "int8", "fp8"):
            assert torch.equal(act.quantize(x, rule, torch.tensor([3.0])), x)

    def test_four_over_six_is_never_worse_and_often_better(self, rng):
        x = torch.randn(200, 64, generator=rng)
        divisor = codec.nvfp4_input_divisor(x.abs().amax())
        plain = (act.nvfp4(x, divisor) - x).square().unflatten(-1, (-1, 16)).sum(-1)
        chosen = (act.nvfp4(x, divisor, four_over_six=True) - x).square().unflatten(-1, (-1, 16)).sum(-1)
        assert (chosen <= plain).all() and (chosen < plain).float().mean() > 0.2

    def test_values_are_on_their_grids(self, rng):
        x = torch.randn(9, 64, generator=rng) * 3
        x[0, 0] = 1e4
        step = act.token_scale(x, 127.5)
        codes = act.int8_per_token(x) / step
        assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.min() >= -128.001 and codes.max() <= 127.001
        assert (act.int8_per_token(x) - x).abs().max(-1).values.le(step[:, 0] * 0.51).all()
        relative = ((act.fp8_per_token(x) - x).abs() / x.abs()).median()
        assert 0.005 < relative < 0.04
        blocks = act.mxfp4(x).unflatten(-1, (-1, 32))
        scale = codec.e8m0_values(codec.mxfp4_block_exponent(x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)))
        assert set((blocks / scale).abs().unique().tolist()) <= set(codec.E2M1_VALUES)
