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
    ],
)
def test_int_words_are_golden(bits, values, words):
    values = torch.tensor([values], dtype=torch.int8)
    packed = codec.pack_int(values, bits)
    assert packed.dtype == torch.int32 and packed.tolist() == [words]
    assert torch.equal(codec.unpack_int(packed, bits, values.shape[1]), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 17, 64, 65])
def test_int_words_round_trip_at_awkward_widths(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    values = torch.randint(low, high, (5, columns), generator=generator).to(torch.int8)
    assert torch.equal(codec.unpack_int(codec.pack_int(values, bits), bits, columns), values)
