"""The values that one weight matrix can be stored as once its scales are chosen: an element grid times a step a group.

    W ≈ step · code        code on the element grid, step [N, B] one for each row and group of K / B columns

Everything that rounds (to nearest, GPTQ) works on a Grid and does not know formats; everything that packs takes the
codes back to stored tensors. Which step a group gets is scale_search.py's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.kernels import codec

# Format -> its element grid: float32 to the nearest code, float32, ties to even, saturating. What it is given is a
# quotient that nobody else holds, and may be overwritten: memory is most of the time of a scale search.
ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nvfp4": codec.round_e2m1,
    "mxfp4": codec.round_e2m1,
    "fp8": lambda x: codec.to_e4m3(x).float(),
    "int1": lambda x: torch.where(x < 0, -1.0, 1.0),
    "int2": lambda x: x.round_().clamp_(-2, 1),
    "int3": lambda x: x.round_().clamp_(-4, 3),
    "int4": lambda x: x.round_().clamp_(-8, 7),
    "int6": lambda x: x.round_().clamp_(-32, 31),
    "int8": lambda x: x.round_().clamp_(-128, 127),
    **{name: partial(codec.round_float, format=element) for name, element in codec.FLOATS.items()},
}

_FLOATS = codec.FLOATS | {"nvfp4": codec.E2M1, "mxfp4": codec.E2M1, "fp8": codec.FLOATS["e4m3"]}
# The same grids as kernels take them: lowest and highest code, smallest binade (0: integers), spacing over binade. Not
# among them: int1, which has no zero.
LIMITS = {name: (-f.top, f.top, 2.0**f.lowest, 2.0**-f.mantissa) for name, f in _FLOATS.items()} | {
    f"int{b}": (-(2.0 ** (b - 1)), 2.0 ** (b - 1) - 1, 0.0, 1.0) for b in (2, 3, 4, 6, 8)
}


@dataclass(frozen=True)
class Grid:
    """step [N, B] float32, exactly as decoded from what is stored; negative where that turns an integer's range around.

    divisor: the global scale [1] of nvfp4, and of floats in blocks.
    """

    format: str
    step: Tensor
    divisor: Tensor | None = None

    def codes(self, weight: Tensor, step: Tensor | None = None) -> Tensor:
        """Nearest codes of weight [N, K], float32; or of any columns, given a step that broadcasts against them."""
        if step is not None:
            return ELEMENTS[self.format](weight / step)
        blocks = codec.blocks_of(weight, weight.shape[1] // self.step.shape[1])
        return ELEMENTS[self.format](blocks / self.step.unsqueeze(-1)).flatten(-2)

    def columns(self, in_features: int) -> Tensor:
        """The step of every weight, [N, K]."""
        return self.step.repeat_interleave(in_features // self.step.shape[1], dim=1)

    def pack(self, codes: Tensor, words: bool = True) -> dict[str, Tensor]:
        """The stored tensors of codes [N, K] (docs/formats.md); `words` packs integers, else they are int8."""
        if self.format == "nvfp4":
            assert self.divisor is not None
            scale = codec.to_e4m3(self.step * self.divisor)  # exact: the divisor is a power of two
            return {
                "weight_packed": codec.pack_nibbles(codec.e2m1_codes(codes)),
                "weight_scale": scale,
                "weight_global_scale": self.divisor,
            }
        if self.format == "mxfp4":
            exponent = (torch.log2(self.step) + 127).round().to(torch.uint8)
            return {"weight_packed": codec.pack_nibbles(codec.e2m1_codes(codes)), "weight_scale": exponent}
        if self.format in codec.FLOATS:
            element = codec.FLOATS[self.format]
            packed = codec.pack_codes(codec.float_codes(codes, element), element.bits)
            if self.divisor is None:
                return {"weight_packed": packed, "weight_scale": self.step.bfloat16()}
            scale = codec.to_e4m3(self.step * self.divisor)
            return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": self.divisor}
        if self.format == "fp8":
            return {"weight": codec.to_e4m3(codes), "weight_scale": self.step.bfloat16()}
        if not words:
            return {"weight": codes.to(torch.int8), "weight_scale": self.step.bfloat16()}
        return {
            "weight_packed": codec.pack_int(codes.to(torch.int8), codec.FORMATS[self.format].bits),
            "weight_scale": self.step.bfloat16(),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
