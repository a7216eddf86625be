"""Golden bytes of every stored layout, and the rounding rules at their edges."""

import pytest
import torch

from compressor.kernels import codec


def test_e2m1_rounds_to_nearest_even_and_saturates():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 1e9])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0])
    assert torch.equal(codec.round_e2m1(ties), expected)
    assert torch.equal(codec.round_e2m1(-ties), -expected)


def test_e2m1_rounding_picks_the_nearest_grid_value():
    grid = torch.tensor(codec.E2M1_VALUES)
    x = torch.linspace(0, 6, 4001)
    nearest = (x[:, None] - grid).abs().min(-1).values
    assert torch.allclose((x - codec.round_e2m1(x)).abs(), nearest)


def test_e2m1_codes_are_golden():
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -6.0])
    assert codec.e2m1_codes(values).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 15]
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(codec.e2m1_codes(codec.e2m1_values(codes))[1:8], codes[1:8])
    assert codec.e2m1_values(codes)[9:].tolist() == [-0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


GOLDEN = {  # magnitudes by code
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "e2m3": [*(i / 8 for i in range(16)), *(i / 4 for i in range(8, 16)), *(i / 2 for i in range(8, 16))],
    "e3m2": [
        *(i / 16 for i in range(8)),
        *(i * 2.0**e for e in range(-3, 3) for i in range(4, 8)),
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_float_codebooks_are_golden(name):
    """FP4 has 15 distinct values, FP6 63: two zeros, no Inf and no NaN."""
    element, half = codec.FLOATS[name], GOLDEN[name]
    assert list(element.magnitudes) == half and element.values == (*half, *(-v for v in half))
    assert max(half) == element.top and len({*element.values}) == 2**element.bits - 1


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_codes_are_those_of_torch(name, dtype):
    element, codes = codec.FLOATS[name], torch.arange(256, dtype=torch.uint8)
    expected = codes.view(dtype).float()
    finite = expected.isfinite()
    found = codec.float_values(codes, element)
    assert torch.equal(found[finite], expected[finite]) and found[~finite].isnan().all()
    assert element.top == torch.finfo(dtype).max
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 6, 100_000, 2.0)
    clipped = x.clamp(-element.top, element.top)
    assert torch.equal(codec.round_float(x, element), clipped.to(dtype).float())
    written = codec.float_codes(codec.round_float(x, element), element)
    assert torch.equal(codec.float_values(written, element), clipped.to(dtype).float())
    assert 128 not in written  # minus zero


@pytest.mark.parametrize("name", codec.FLOATS)
def test_floats_round_to_nearest_and_saturate(name):
    element = codec.FLOATS[name]
    grid = torch.tensor(element.magnitudes)
    x = torch.cat((torch.linspace(0, 8 * grid[1], 4001), torch.linspace(0, element.top, 4001)))
    rounded = codec.round_float(x, element)
    assert torch.equal((x - rounded).abs(), (x[:, None] - grid).abs().amin(-1))
    assert torch.equal(codec.round_float(rounded, element), rounded)
    assert torch.equal(codec.round_float(-x, element), -rounded)
    assert codec.round_float(torch.tensor([2 * element.top, -1e30]), element).tolist() == [element.top, -element.top]
    codes = codec.float_codes(grid, element)
    assert codes.tolist() == list(range(len(grid))) and torch.equal(codec.float_values(codes, element), grid)


def test_float_ties_go_to_even_multiples_of_the_step():
    for name, ties, expected in (
        ("e3m0", [0.125, 0.375, 0.75, 1.5, 12.0], [0.0, 0.5, 1.0, 2.0, 16.0]),
        ("e1m2", [0.25, 0.75, 1.25, 3.25], [0.0, 1.0, 1.0, 3.0]),
        ("e3m2", [0.03125, 1.125, 1.375, 26.0], [0.0, 1.0, 1.5, 24.0]),
        ("e2m3", [0.0625, 2.125, 2.375, 7.25], [0.0, 2.0, 2.5, 7.0]),
    ):
        assert codec.round_float(torch.tensor(ties), codec.FLOATS[name]).tolist() == expected


def test_e1m2_is_symmetric_int4():
    x = torch.linspace(-12, 12, 5001)
    assert torch.equal(codec.round_float(x / 2, codec.FLOATS["e1m2"]) * 2, torch.round(x).clamp(-7, 7))


def test_six_bit_codes_share_three_bytes():
    codes = torch.tensor([[0b000001, 0b100010, 0b011011, 0b111100]], dtype=torch.uint8)
    packed = codec.pack_codes(codes, 6)
    word = 1 | 0b100010 << 6 | 0b011011 << 12 | 0b111100 << 18
    assert packed.tolist() == [list(word.to_bytes(3, "little"))]
    for bits in (4, 6, 8):
        every = torch.arange(256).remainder(2**bits).to(torch.uint8).view(8, 32)
        packed = codec.pack_codes(every.flip(1), bits)
        assert packed.shape == (8, 32 * bits // 8) and torch.equal(codec.unpack_codes(packed, bits), every.flip(1))


def test_nibbles_put_even_k_low():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = codec.pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0x0F]]
    assert torch.equal(codec.unpack_nibbles(packed), codes)


def test_nvfp4_divisors_round_down():
    for amax, expected in ((1.0, 2048.0), (2688.0, 1.0), (2689.0, 0.5), (0.013, 131072.0)):
        weight = codec.nvfp4_weight_divisor(torch.tensor(amax))
        assert weight.dtype == torch.float32 and weight.tolist() == [expected]
        assert 224 <= codec.nvfp4_block_scale(torch.tensor([amax]), weight).item() <= 448
        activation = codec.nvfp4_input_divisor(torch.tensor(amax))
        assert torch.equal(activation.bfloat16().float(), activation)
        assert 2688 / amax * (1 - 2**-7) <= activation.item() <= 2688 / amax
    assert codec.nvfp4_weight_divisor(torch.tensor(0.0)).item() == 1.0


def test_nvfp4_weights_are_exact_in_bf16():
    codes = codec.e2m1_values(torch.arange(16, dtype=torch.uint8)).bfloat16()
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    divisor = codec.nvfp4_weight_divisor(torch.tensor(0.37))
    in_bf16 = codes * (scales.bfloat16()[:, None] / divisor.bfloat16())
    assert torch.equal(in_bf16.float(), codes.float() * (scales.float()[:, None] / divisor))


def test_nvfp4_block_scale_of_zeros_is_an_eighth():
    assert codec.nvfp4_block_scale(torch.zeros(2), torch.ones(1)).tolist() == [0.125, 0.125]


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(1.0, 125), (6.0, 127), (6.99, 127), (7.0, 128), (4.0, 127), (3.5, 127), (3.49, 126), (0.0, 0), (2.0**-126, 0)],
)
def test_mxfp4_exponents(amax, exponent):
    assert codec.mxfp4_block_exponent(torch.tensor([amax])).item() == exponent


def test_e8m0_values_are_powers_of_two():
    codes = torch.tensor([1, 126, 127, 128, 254], dtype=torch.uint8)
    assert codec.e8m0_values(codes).tolist() == [2.0**-126, 0.5, 1.0, 2.0, 2.0**127]


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (4, [-8, -7, 0, 1, 7, -1, 2, 3], [0xBA7F9810 - (1 << 32)]),
        (8, [-128, 127, 0, 1], [0x8180FF00 - (1 << 32)]),
        (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4 - (1 << 32)]),
        (1, [-1, 1, 1, -1] * 8, [0x66666666]),
        # Eleven codes of three bits: the last one begins with the two highest bits of the first word.
        (3, [-4, -3, -2, -1, 0, 1, 2, 3, -4, 3, -3], [0x78FAC688, 0]),
    ],
)
def test_int_words_are_golden(bits, values, words):
    values = torch.tensor([values], dtype=torch.int8)
    packed = codec.pack_int(values, bits)
    assert packed.dtype == torch.int32 and packed.tolist() == [words]
    assert torch.equal(codec.unpack_int(packed, bits, values.shape[1]), values)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 17, 64, 65])
def test_int_words_round_trip_at_awkward_widths(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    chosen = torch.randint(1 << bits, (5, columns), generator=generator)
    values = torch.tensor(codec.int_values(bits))[chosen].to(torch.int8)
    assert torch.equal(codec.unpack_int(codec.pack_int(values, bits), bits, columns), values)
