"""Quantization of activations, written as quantize-then-dequantize in float32.

What every fused kernel and every ONNX body must reproduce for the same input. Each rule equals what the
compressed-tensors runtimes compute, except what only our own ops offer: `four_over_six`, by which a block may
scale its largest value to 4 instead of 6 where that lowers its squared error (Cook et al., "Four Over
Six", 2025), `int8_block`, which is what onnxruntime's MatMulNBits does to its inputs, an offset, and a rotation. The `_static` rules take one stored scale, all others find theirs when the
model runs.
All functions take x [..., K] of any float dtype and return float32 of the same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import codec

# Float rule -> format of its codes; one stored scale for all tokens.
STATIC_FLOATS = {f"{name}_static": format for name, format in codec.FLOATS.items()}
ACTIVATIONS = (
    "none", "nvfp4", "mxfp4", "int8", "int8_block", "int6", "int8_static", "int6_static", "fp8", *STATIC_FLOATS,
)  # fmt: skip
# Integer rule -> bits of its codes; one scale for all tokens, or one for each.
STATIC_BITS = {"int8_static": 8, "int6_static": 6}
TOKEN_BITS = {"int8": 8, "int6": 6}


def quantize(
    x: Tensor,
    rule: str,
    input_global_scale: Tensor | None = None,
    four_over_six: bool = False,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    input_shift: Tensor | None = None,
    hadamard: int = 0,
    block: int = 0,
) -> Tensor:
    """Apply one rule of ACTIVATIONS, under rule "none" too to x - input_offset where there is an offset [K], or to
    2^input_shift x where there is a shift, int8 [K].

    Where `hadamard` is not 0, x is rotated in blocks of that size before anything else.

    `nvfp4` needs the float32 [1] divisor `input_global_scale`, the static rules the multiplier `input_scale` [1],
    `int8_block` the block size of the weight.
    """
    x = x.float()
    if hadamard:
        x = rotate(x, hadamard)
    if input_offset is not None:
        x = x - input_offset.float()
    if input_shift is not None:
        x = x * codec.e8m0_values(input_shift.int() + 127)
    if rule == "none":
        return x
    if rule == "nvfp4":
        assert input_global_scale is not None
        return nvfp4(x, input_global_scale, four_over_six)
    if rule in STATIC_BITS:
        assert input_scale is not None
        return int_with(x, input_scale.float(), STATIC_BITS[rule])
    if rule in STATIC_FLOATS:
        assert input_scale is not None
        return float_with(x, input_scale.float(), STATIC_FLOATS[rule])
    if rule in TOKEN_BITS:
        return int_per_token(x, TOKEN_BITS[rule])
    if rule == "int8_block":
        return int8_blocks(x, block)
    return {"mxfp4": mxfp4, "fp8": fp8_per_token}[rule](x)


def rotate(x: Tensor, block: int) -> Tensor:
    """Each block of `block` (a power of two that divides K) times H / √block, H Sylvester's Hadamard matrix.

    H is symmetric, so rotating twice gives x back. float64 stays float64, all else becomes float32. The fast
    Walsh-Hadamard transform and not a product with a matrix, because its order of additions is part of the contract: a
    last bit that differs between runtimes would put elements on the other side of a rounding threshold.
    """
    y, half = x if x.dtype == torch.float64 else x.float(), block // 2
    y = codec.blocks_of(y, block).reshape(-1, block).T  # [block, M]: short halves would be short rows
    while half:
        a, b = y.reshape(block // half // 2, 2, half, y.shape[-1]).unbind(1)
        y = torch.stack((a + b, a - b), 1).flatten(0, 2)
        half //= 2
    return y.T.reshape(x.shape) * block**-0.5


def nvfp4(x: Tensor, global_scale: Tensor, four_over_six: bool = False) -> Tensor:
    """Blocks of 16 along K, E4M3 block scales from the block's abs-max, one static global divisor."""
    blocks = codec.blocks_of(x, 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    best = _nvfp4_with(blocks, codec.nvfp4_block_scale(amax, global_scale), global_scale)
    if four_over_six:
        other = _nvfp4_with(blocks, codec.nvfp4_block_scale(amax, global_scale, top=4.0), global_scale)
        best = torch.where(_error(other, blocks) < _error(best, blocks), other, best)
    return best.flatten(-2)


def _error(found: Tensor, blocks: Tensor) -> Tensor:
    """Squared error of each block [..., 16] -> [..., 1]. Halves are added until one is left: which order is part of the
    contract, because the two errors that are compared may differ by their last bit."""
    errors = (found - blocks).square()
    while (half := errors.shape[-1] // 2):
        errors = errors[..., :half] + errors[..., half:]
    return errors


def _nvfp4_with(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    step = scale / global_scale
    return codec.round_e2m1(blocks / step) * step


def mxfp4(x: Tensor) -> Tensor:
    """Blocks of 32 along K, power-of-two scales."""
    blocks = codec.blocks_of(x, 32)
    step = codec.e8m0_values(codec.mxfp4_block_exponent(blocks.abs().amax(-1, keepdim=True)))
    return (codec.round_e2m1(blocks / step) * step).flatten(-2)


def int8_per_token(x: Tensor) -> Tensor:
    """One scale a token: amax / 127.5, codes in [-128, 127]."""
    return int_per_token(x, 8)


def int_per_token(x: Tensor, bits: int) -> Tensor:
    """One scale a token: amax / (2^(b-1) - 0.5), codes in [-2^(b-1), 2^(b-1) - 1]."""
    return int_with(x, token_scale(x, 2 ** (bits - 1) - 0.5), bits)


def int8_blocks(x: Tensor, block: int) -> Tensor:
    """One scale for each `block` values along K: amax / 127, codes in [-127, 127], found by multiplying with 127 / amax.

    With the bits of MatMulNBits at accuracy level 4, so that a stock onnxruntime can multiply what was measured.
    """
    blocks = codec.blocks_of(x, block)
    amax = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(amax, 127) / amax  # 127 / amax would be a reciprocal, rounded once more
    inverse = torch.where(inverse.isinf(), 0, inverse)
    return (torch.round(blocks * inverse) * (amax / 127)).flatten(-2)


def int_with(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """A given step, broadcast against x; what lies outside of [-2^(b-1), 2^(b-1) - 1] steps is clipped."""
    top = 2 ** (bits - 1)
    return torch.round(x / step).clamp(-top, top - 1) * step


def float_with(x: Tensor, step: Tensor, format: codec.Float) -> Tensor:
    """A given step, broadcast against x; what lies beyond the format's largest value is clipped."""
    return codec.round_float(x / step, format) * step


def fp8_per_token(x: Tensor) -> Tensor:
    """One scale a token: amax / 448, E4M3 codes."""
    step = token_scale(x, codec.E4M3_MAX)
    return codec.to_e4m3(x / step).float() * step


def token_scale(x: Tensor, top: float) -> Tensor:
    """[..., 1] float32 amax / top; a token of zeros gets float32's epsilon, as in compressed-tensors."""
    scale = x.abs().amax(-1, keepdim=True) / top
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
