"""The single home of stored byte layouts: element grids, block scales, bit packing.

Every function is plain torch, runs on any device and is the specification that fused kernels are tested
against. Rounding is to nearest, ties to even, everywhere. What is left out: which scale to choose
(methods/scale_search.py) and how layers combine tensors (the op files beside this one).

Scale direction: block scales MULTIPLY (value = code * scale); the two `*_global_scale` tensors of NVFP4
DIVIDE (value = code * block_scale / global_scale), as in the compressed-tensors dialect.

Shapes: N out-features, K in-features, G group size. Weights are [N, K]; two FP4 codes share a byte, the
even k in the low nibble. Sources: OCP Microscaling v1.0 (E2M1, E8M0), the compressed-tensors file format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
# The code is sign << 3 | index; minus zero (code 8) is never written.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored. `block` is fixed by the format, or None where the recipe chooses."""

    name: str
    kind: str  # the op and layer that reads it
    bits: int
    block: int | None
    scale_bits: int


FORMATS = {
    f.name: f
    for f in (
        Format("nvfp4", "fp4_linear", 4, 16, 8),
        Format("mxfp4", "fp4_linear", 4, 32, 8),
        Format("int2", "int_linear", 2, None, 16),
        Format("int4", "int_linear", 4, None, 16),
        Format("int6", "int_linear", 6, None, 16),  # never packed into words: its codes are stored as int8
        Format("int8", "int_linear", 8, None, 16),
        Format("fp8", "fp8_linear", 8, None, 16),
    )
}


# --- E2M1 -------------------------------------------------------------------------------------------


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value of each element, float32, saturating at ±6. Any shape."""
    x = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    # The step is half the power of two at or below |x|, which its exponent bits alone spell, and 0.5 below 1.
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(0.5)
    return (x / step).round_().mul_(step)


def e2m1_codes(values: Tensor) -> Tensor:
    """4-bit codes (uint8) of values that already lie on the E2M1 grid."""
    grid = torch.tensor(E2M1_VALUES, device=values.device)
    index = torch.bucketize(values.abs(), grid).to(torch.uint8)
    return index | ((values < 0).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 values of 4-bit codes (uint8)."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return table[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] -> uint8 [N, K/2], even k in the low nibble. K must be even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> uint8 codes [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


# --- scales -----------------------------------------------------------------------------------------


def to_e4m3(x: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn, saturating at ±448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def nvfp4_weight_divisor(amax: Tensor) -> Tensor:
    """The float32 [1] `weight_global_scale`: 448 * 6 / amax rounded DOWN to a power of two.

    Then scale / divisor and code * scale / divisor are exact even in bf16, so runtimes that load the divisor or
    decode in bf16 get the same weights bit for bit, and no block scale saturates. The price is at most one of
    E4M3's fifteen binades, at the bottom, which weights do not reach.
    """
    return _truncated_divisor(amax, 0x7F800000)


def nvfp4_input_divisor(amax: Tensor) -> Tensor:
    """The float32 [1] `input_global_scale`: 448 * 6 / amax rounded DOWN to a bf16 value.

    Activations do reach the bottom of E4M3 (one massive token sets amax), so no whole binade is given away.
    """
    return _truncated_divisor(amax, 0x7FFF0000)


def _truncated_divisor(amax: Tensor, mask: int) -> Tensor:
    scale = (E4M3_MAX * E2M1_MAX / amax.float()).reshape(1)
    truncated = (scale.view(torch.int32) & mask).view(torch.float32)
    return torch.where(truncated.isfinite() & (truncated > 0), truncated, torch.ones_like(truncated))


def nvfp4_block_scale(amax: Tensor, global_scale: Tensor, top: float = E2M1_MAX) -> Tensor:
    """Block scales on the E4M3 grid, as float32: amax * global_scale / top; a zero becomes 0.125."""
    scale = to_e4m3(global_scale * (amax.float() / top)).float()
    return torch.where(scale == 0, 0.125, scale)


def mxfp4_block_exponent(amax: Tensor) -> Tensor:
    """E8M0 codes (uint8, value 2^(code - 127)): the power of two that puts amax into (3, 7] after division.

    amax with a mantissa of 1.75 or more takes the next power, so at most amax in (6, 7) saturates
    (the rule of compressed-tensors; OCP's own floor rule would saturate (6, 8)).
    """
    bits = amax.float().contiguous().view(torch.int32)
    exponent = (bits + (1 << 21)) >> 23
    return (exponent - 2).clamp(0, 254).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """float32 2^(code - 127) of uint8 codes, exact; code 0 is the subnormal 2^-127."""
    return torch.where(codes == 0, 2.0**-127, (codes.int() << 23).view(torch.float32))


# --- integers ---------------------------------------------------------------------------------------


def pack_int(values: Tensor, bits: int) -> Tensor:
    """Signed values [N, K] in [-2^(b-1), 2^(b-1)) -> int32 words [N, ceil(K*b/32)], little endian.

    Stored offset binary (value + 2^(b-1)); element i occupies the bits from i*b. bits is 2, 4 or 8.
    """
    per_word = 32 // bits
    codes = values.to(torch.int32) + (1 << (bits - 1))
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    shifts = torch.arange(0, 32, bits, device=values.device, dtype=torch.int32)
    lanes = codes.reshape(codes.shape[0], -1, per_word) << shifts
    # Lanes do not overlap, so the wrapping int32 sum is their bitwise or.
    return lanes.sum(-1, dtype=torch.int32)


def unpack_int(words: Tensor, bits: int, in_features: int) -> Tensor:
    """int32 words [N, ceil(K*b/32)] -> int8 values [N, K]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).to(torch.int8).flatten(-2)[:, :in_features]


def blocks_of(x: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., K/size, size]. K must be divisible by size."""
    return x.unflatten(-1, (-1, size))
