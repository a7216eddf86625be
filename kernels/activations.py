"""Dynamic quantization of activations, written as quantize-then-dequantize in float32.

What every fused kernel and every ONNX body must reproduce for the same input. Each rule equals what the
compressed-tensors runtimes compute, except `four_over_six`, which only our own ops offer: a block may
scale its largest value to 4 instead of 6 where that lowers its squared error (Cook et al., "Four Over
Six", 2025). All functions take x [..., K] of any float dtype and return float32 of the same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels import codec

ACTIVATIONS = ("none", "nvfp4", "mxfp4", "int8", "fp8")


def quantize(x: Tensor, rule: str, input_global_scale: Tensor | None = None, four_over_six: bool = False) -> Tensor:
    """Apply one rule of ACTIVATIONS. `nvfp4` needs the float32 [1] divisor `input_global_scale`."""
    x = x.float()
    if rule == "none":
        return x
    if rule == "nvfp4":
        assert input_global_scale is not None
        return nvfp4(x, input_global_scale, four_over_six)
    return {"mxfp4": mxfp4, "int8": int8_per_token, "fp8": fp8_per_token}[rule](x)


def nvfp4(x: Tensor, global_scale: Tensor, four_over_six: bool = False) -> Tensor:
    """Blocks of 16 along K, E4M3 block scales from the block's abs-max, one static global divisor."""
    blocks = codec.blocks_of(x, 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    best = _nvfp4_with(blocks, codec.nvfp4_block_scale(amax, global_scale), global_scale)
    if four_over_six:
        other = _nvfp4_with(blocks, codec.nvfp4_block_scale(amax, global_scale, top=4.0), global_scale)
        better = (other - blocks).square().sum(-1, keepdim=True) < (best - blocks).square().sum(-1, keepdim=True)
        best = torch.where(better, other, best)
    return best.flatten(-2)


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
    step = token_scale(x, 127.5)
    return torch.round(x / step).clamp(-128, 127) * step


def fp8_per_token(x: Tensor) -> Tensor:
    """One scale a token: amax / 448, E4M3 codes."""
    step = token_scale(x, codec.E4M3_MAX)
    return codec.to_e4m3(x / step).float() * step


def token_scale(x: Tensor, top: float) -> Tensor:
    """[..., 1] float32 amax / top; a token of zeros gets float32's epsilon, as in compressed-tensors."""
    scale = x.abs().amax(-1, keepdim=True) / top
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
