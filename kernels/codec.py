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

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Float:
    """A float of few bits: sign, E exponent bits with bias 2^(E-1) - 1, M mantissa bits, subnormals; `top` its largest.

    The code is sign << (bits - 1) | index; minus zero is never written.
    """

    name: str
    exponent: int
    mantissa: int
    top: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def lowest(self) -> int:
        """The exponent of its smallest normal value."""
        return 2 - 2 ** (self.exponent - 1)

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Values of index 0, 1, … up to `top`."""
        ones = 1 << self.mantissa
        found = []
        for index in range(1 << (self.exponent + self.mantissa)):
            binade, fraction = divmod(index, ones)
            exponent = self.lowest + max(binade, 1) - 1 - self.mantissa
            found.append(math.ldexp(fraction + (ones if binade else 0), exponent))
        return tuple(v for v in found if v <= self.top)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Of every code; NaN for those that E4M3 and E5M2 keep for Inf and NaN."""
        half = self.magnitudes
        half += (math.nan,) * ((1 << (self.bits - 1)) - len(half))
        return half + tuple(-v for v in half)


# The first of each width is what is used where nothing is searched. E1M2 is INT4 in [-7, 7], times 1/2.
FLOATS = {
    f.name: f
    for f in (
        Float("e2m1", 2, 1, 6.0),
        Float("e3m0", 3, 0, 16.0),
        Float("e1m2", 1, 2, 3.5),
        Float("e3m2", 3, 2, 28.0),
        Float("e2m3", 2, 3, 7.5),
        Float("e4m3", 4, 3, 448.0),  # E4M3FN: no Inf, one NaN
        Float("e5m2", 5, 2, 57344.0),
    )
}
E2M1 = FLOATS["e2m1"]
E2M1_MAX, E2M1_VALUES = E2M1.top, E2M1.magnitudes
E4M3_MAX = FLOATS["e4m3"].top


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
        Format("int1", "int_linear", 1, None, 16),  # -1 and +1
        Format("int2", "int_linear", 2, None, 16),
        Format("int3", "int_linear", 3, None, 16),
        Format("int4", "int_linear", 4, None, 16),
        Format("int6", "int_linear", 6, None, 16),  # never packed into words: its codes are stored as int8
        Format("int8", "int_linear", 8, None, 16),
        Format("fp8", "fp8_linear", 8, None, 16),
    )
}


# --- floats of few bits ------------------------------------------------------------------------------


def round_float(x: Tensor, format: Float) -> Tensor:
    """The nearest value of the format, float32, ties to an even multiple of the step, saturating. Any shape."""
    x = x.float().clamp(-format.top, format.top)
    # The step is 2^-M times the power of two at or below |x|, which its exponent bits alone spell.
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**format.lowest)
    step = power.mul_(2.0**-format.mantissa)
    return (x / step).round_().mul_(step)


def float_codes(values: Tensor, format: Float) -> Tensor:
    """Codes (uint8) of values that already lie on the format's grid."""
    grid = torch.tensor(format.magnitudes, device=values.device)
    index = torch.bucketize(values.abs(), grid).to(torch.uint8)
    return index | ((values < 0).to(torch.uint8) << (format.bits - 1))


def float_values(codes: Tensor, format: Float) -> Tensor:
    """float32 values of codes (uint8)."""
    return torch.tensor(format.values, device=codes.device)[codes.int()]


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value of each element, float32, saturating at ±6. Any shape."""
    return round_float(x, E2M1)


def e2m1_codes(values: Tensor) -> Tensor:
    """4-bit codes (uint8) of values that already lie on the E2M1 grid."""
    return float_codes(values, E2M1)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 values of 4-bit codes (uint8)."""
    return float_values(codes, E2M1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] -> uint8 [N, K/2], even k in the low nibble. K must be even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> uint8 codes [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] of 4, 6 or 8 bits -> uint8 [N, K*b/8]: element k from bit k*b of the row, little endian.

    K must be divisible by 2 for 4 bits and by 4 for 6, where four codes share three bytes.
    """
    if bits == 8:
        return codes
    if bits == 4:
        return pack_nibbles(codes)
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=-1).flatten(-2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """uint8 [N, K*b/8] -> uint8 codes [N, K]."""
    if bits == 8:
        return packed
    if bits == 4:
        return unpack_nibbles(packed)
    a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack((a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2), dim=-1).flatten(-2)


# --- scales -----------------------------------------------------------------------------------------


def to_e4m3(x: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn, saturating at ±448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def nvfp4_weight_divisor(amax: Tensor, top: float = E2M1_MAX) -> Tensor:
    """The float32 [1] `weight_global_scale`: 448 * top / amax rounded DOWN to a power of two.

    Then scale / divisor and code * scale / divisor are exact even in bf16, so runtimes that load the divisor or
    decode in bf16 get the same weights bit for bit, and no block scale saturates. The price is at most one of
    E4M3's fifteen binades, at the bottom, which weights do not reach.
    """
    return _truncated_divisor(amax, 0x7F800000, top)


def nvfp4_input_divisor(amax: Tensor) -> Tensor:
    """The float32 [1] `input_global_scale`: 448 * 6 / amax rounded DOWN to a bf16 value.

    Activations do reach the bottom of E4M3 (one massive token sets amax), so no whole binade is given away.
    """
    return _truncated_divisor(amax, 0x7FFF0000, E2M1_MAX)


def _truncated_divisor(amax: Tensor, mask: int, top: float) -> Tensor:
    scale = (E4M3_MAX * top / amax.float()).reshape(1)
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


def int_values(bits: int) -> range:
    """The value of every code: offset binary, value + 2^(b-1); of one bit, which has no zero, -1 and +1."""
    return range(-1, 2, 2) if bits == 1 else range(-(1 << (bits - 1)), 1 << (bits - 1))


def pack_int(values: Tensor, bits: int) -> Tensor:
    """Values [N, K] of `int_values` -> int32 words [N, ceil(K*b/32)], little endian.

    Element i occupies the bits from i*b, over the end of a word where 32 is no multiple of b. bits is 1, 2, 3, 4 or 8.
    """
    span = math.lcm(bits, 32)  # bits after which an element begins with a word again
    codes = values.to(torch.int64)
    codes = (codes + 1) // 2 if bits == 1 else codes + (1 << (bits - 1))
    count = -(-codes.shape[1] * bits // 32)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (span // bits))).unflatten(-1, (-1, span // bits))
    words = codes.new_zeros(*codes.shape[:-1], span // 32)
    for i, start in enumerate(range(0, span, bits)):
        w, at = divmod(start, 32)
        words[..., w] |= (codes[..., i] << at) & 0xFFFFFFFF
        if at + bits > 32:
            words[..., w + 1] |= codes[..., i] >> (32 - at)
    words = words.flatten(-2)[:, :count]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int(words: Tensor, bits: int, in_features: int) -> Tensor:
    """int32 words [N, ceil(K*b/32)] -> int8 values [N, K]."""
    span = math.lcm(bits, 32)
    parts = torch.nn.functional.pad(words, (0, -words.shape[1] % (span // 32))).unflatten(-1, (-1, span // 32))
    codes = []
    for start in range(0, span, bits):
        w, at = divmod(start, 32)
        code = (parts[..., w] >> at) & ((1 << min(bits, 32 - at)) - 1)
        if at + bits > 32:
            code = code | (parts[..., w + 1] & ((1 << (at + bits - 32)) - 1)) << (32 - at)
        codes.append(code)
    values = torch.stack(codes, dim=-1).flatten(-2)[:, :in_features]
    return (2 * values - 1 if bits == 1 else values - (1 << (bits - 1))).to(torch.int8)


def blocks_of(x: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., K/size, size]. K must be divisible by size."""
    return x.unflatten(-1, (-1, size))
