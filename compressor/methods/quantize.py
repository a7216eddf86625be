"""Round to nearest on a 4- or 8-bit grid, with a per-block scale search. The baseline every other method builds on.

Options are the dataclass fields. Linears that read the same input share their NVFP4 global scales, because a
runtime that merges q/k/v or gate/up has room for one. See docs/quantize.md for the equation and the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration
from compressor.kernels import codec
from compressor.layers import Packed
from compressor.methods import scale_search
from compressor.statistics import AbsMax, ChannelSquare, Statistic

WEIGHT_ONLY = "none"
# Which activation rules a runtime (or one of our ops) can pair with each weight format.
PAIRS: dict[str, tuple[str, ...]] = {
    "nvfp4": ("none", "nvfp4"),
    "mxfp4": ("none", "mxfp4"),
    "int2": ("none",),
    "int4": ("none",),
    "int8": ("none", "int8"),
    "fp8": ("none", "fp8"),
}
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Placement:
    """What happens to one layer, known from its shape alone. `kept` is the reason it stays as it is, or None."""

    format: str | None = None
    group_size: int | None = None  # None: one scale a row
    padding: int = 0  # zeros appended to the input's last dim
    kept: str | None = None
    size_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class LayerPlan:
    placement: Placement
    weight_global_scale: Tensor | None = None
    input_global_scale: Tensor | None = None
    importance: Tensor | None = field(default=None, repr=False)  # [K] mean square of each input channel


@dataclass(frozen=True)
class Quantize:
    weights: Literal["nvfp4", "mxfp4", "int2", "int4", "int8", "fp8"] = "nvfp4"
    activations: Literal["none", "nvfp4", "mxfp4", "int8", "fp8"] = "none"
    group_size: int | None = None
    on_misfit: Literal["smaller", "pad", "keep"] = "smaller"
    scale_search: bool = True
    four_over_six: bool = False

    def __post_init__(self) -> None:
        if self.activations not in PAIRS[self.weights]:
            raise ValueError(
                f"activations '{self.activations}' do not go with weights '{self.weights}'; "
                f"allowed: {', '.join(PAIRS[self.weights])}"
            )
        block = codec.FORMATS[self.weights].block
        if block and self.group_size not in (None, block):
            raise ValueError(
                f"group_size {self.group_size} is not possible with {self.weights}, whose blocks are {block}"
            )
        if self.group_size is not None and (
            self.group_size < SMALLEST_GROUP or self.group_size & (self.group_size - 1)
        ):
            raise ValueError(f"group_size {self.group_size} must be a power of two from {SMALLEST_GROUP}")
        if self.group_size is not None and (self.weights == "fp8" or self.activations == "int8"):
            raise ValueError(
                f"weights '{self.weights}' with activations '{self.activations}' take one scale a row; drop group_size"
            )
        if self.four_over_six and self.activations != "nvfp4":
            raise ValueError("four_over_six needs activations: nvfp4")

    def needs(self) -> set[type[Statistic]]:
        """Channel squares weight the scale search; the abs-max sets the static NVFP4 input scale."""
        wanted: set[type[Statistic]] = set()
        if self.scale_search:
            wanted.add(ChannelSquare)
        if self.activations == "nvfp4":
            wanted.add(AbsMax)
        return wanted

    def place(self, out_features: int, in_features: int) -> Placement:
        """Format, group and padding of a [out_features, in_features] weight."""
        fmt = codec.FORMATS[self.weights]
        group = fmt.block or self.group_size
        padding, note = 0, ""
        # Without a group the only constraint is that packed words hold whole rows.
        unit = group or (32 // fmt.bits if fmt.kind == "int_linear" and self.activations == "none" else 1)
        if in_features % unit:
            found = f"{unit} does not divide in_features {in_features}"
            if self.on_misfit == "keep":
                return Placement(kept=f"{found}; on_misfit is keep", size_bytes=0)
            smaller = None if fmt.block or group is None else _smaller_group(in_features, group)
            if self.on_misfit == "smaller" and smaller:
                group, note = smaller, f"group {smaller}: {found}"
            elif self.on_misfit == "smaller" and group is not None and not fmt.block:
                return Placement(kept=f"{found}, and no smaller group from {SMALLEST_GROUP} does")
            elif self.on_misfit == "smaller":
                return Placement(kept=f"{found}, and {self.weights} has no smaller group; on_misfit: pad would fit it")
            else:
                padding = -in_features % unit
                note = f"input padded by {padding}: {found}"
        columns = in_features + padding
        scales = columns // group if group else 1
        size = out_features * (columns * fmt.bits + scales * fmt.scale_bits) // 8
        return Placement(self.weights, group, padding, None, size, note)

    def plan(self, layers: Mapping[str, nn.Linear], calibration: Calibration | None) -> dict[str, LayerPlan]:
        """Placement of every layer, and the global scales that the linears of one site share."""
        shared: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        if self.weights == "nvfp4" and calibration is not None:
            for site in calibration.sites:
                names = [n for n in site.names if n in layers]
                if not names:
                    continue
                amax = torch.stack([layers[n].weight.detach().abs().amax() for n in names]).amax()
                weight_scale = codec.nvfp4_weight_divisor(amax)
                input_scale = None
                if self.activations == "nvfp4":
                    input_scale = codec.nvfp4_input_divisor(calibration.value(names[0], AbsMax))
                shared.update({n: (weight_scale, input_scale) for n in names})
        plans = {}
        for name, layer in layers.items():
            importance = None
            if self.scale_search and calibration is not None and calibration.seen(name):
                importance = calibration.value(name, ChannelSquare)
            placement = self.place(*layer.weight.shape)
            plans[name] = LayerPlan(placement, *shared.get(name, (None, None)), importance)
        return plans

    def apply(self, layer: nn.Linear, plan: LayerPlan) -> Packed:
        """Pack one linear. weight [N, K] of any float dtype; nothing is written to the layer."""
        place = plan.placement
        weight = layer.weight.detach().float()
        importance = None if plan.importance is None else plan.importance.to(weight.device)
        if place.padding:
            weight = nn.functional.pad(weight, (0, place.padding))
            importance = None if importance is None else nn.functional.pad(importance, (0, place.padding))
        attributes: dict[str, object] = {
            "activations": self.activations,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "padding": place.padding,
        }
        kind = codec.FORMATS[self.weights].kind
        if kind == "fp4_linear":
            tensors = self._fp4(weight, importance, plan)
            attributes |= {"format": self.weights, "four_over_six": self.four_over_six}
        elif kind == "int_linear":
            bits = codec.FORMATS[self.weights].bits
            tensors = pack_int_weight(
                weight, bits, place.group_size, importance, self.scale_search, words=self.activations == "none"
            )
            attributes |= {"bits": bits, "group_size": place.group_size}
        else:
            tensors = self._fp8(weight, importance)
        if layer.bias is not None:
            tensors["bias"] = layer.bias.detach().clone()
        return Packed(kind, tensors, attributes)

    def _fp4(self, weight: Tensor, importance: Tensor | None, plan: LayerPlan) -> dict[str, Tensor]:
        size = plan.placement.group_size
        assert size is not None
        blocks = codec.blocks_of(weight, size)
        h = None if importance is None else codec.blocks_of(importance, size)
        if self.weights == "mxfp4":
            exponents = scale_search.by_rows(blocks, lambda b: self._mxfp4_exponents(b, h))
            step = codec.e8m0_values(exponents).unsqueeze(-1)
            stored = {"weight_scale": exponents}
        else:
            divisor = plan.weight_global_scale
            if divisor is None:
                divisor = codec.nvfp4_weight_divisor(weight.abs().amax())
            scale = scale_search.by_rows(blocks, lambda b: self._nvfp4_scales(b, h, divisor))
            step = (scale / divisor).unsqueeze(-1)
            stored = {"weight_scale": codec.to_e4m3(scale), "weight_global_scale": divisor}
            if plan.input_global_scale is not None:
                stored["input_global_scale"] = plan.input_global_scale
        codes = codec.e2m1_codes(codec.round_e2m1(blocks / step)).flatten(-2)
        return {"weight_packed": codec.pack_nibbles(codes), **stored}

    def _nvfp4_scales(self, blocks: Tensor, h: Tensor | None, divisor: Tensor) -> Tensor:
        """float32 scales on the E4M3 grid, [N, B]."""
        base = codec.nvfp4_block_scale(blocks.abs().amax(-1), divisor)

        def candidates() -> Iterator[Tensor]:
            yield base
            if self.scale_search:
                code = codec.to_e4m3(base).view(torch.uint8).int()
                for d in scale_search.E4M3_STEPS:
                    if d:
                        # 1 is the smallest positive code, 126 is 448.
                        yield (code + d).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()

        return scale_search.best_scale(
            blocks, h, candidates(), lambda b, s: codec.round_e2m1(b / (s / divisor)) * (s / divisor)
        )

    def _mxfp4_exponents(self, blocks: Tensor, h: Tensor | None) -> Tensor:
        base = codec.mxfp4_block_exponent(blocks.abs().amax(-1)).int()
        steps = (0, *scale_search.E8M0_STEPS) if self.scale_search else (0,)
        scales = (codec.e8m0_values((base + d).clamp(1, 254)) for d in steps)
        best = scale_search.best_scale(blocks, h, scales, lambda b, s: codec.round_e2m1(b / s) * s)
        return (torch.log2(best) + 127).round().to(torch.uint8)

    def _fp8(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        def scales(rows: Tensor) -> Tensor:
            top = _positive(rows.abs().amax(-1, keepdim=True) / codec.E4M3_MAX)
            ratios = (1.0, *scale_search.RATIOS) if self.scale_search else (1.0,)
            h = None if importance is None else importance.unsqueeze(0)
            return scale_search.best_scale(
                rows.unsqueeze(1),
                h,
                (_bf16_up(top * r) for r in ratios),
                lambda b, s: codec.to_e4m3(b / s).float() * s,
            )

        step = scale_search.by_rows(weight, scales)
        return {"weight": codec.to_e4m3(weight / step), "weight_scale": step.bfloat16()}


def pack_int_weight(
    weight: Tensor, bits: int, group_size: int | None, importance: Tensor | None, search: bool, words: bool
) -> dict[str, Tensor]:
    """Symmetric integers with bf16 scales: weight [N, K] float32 -> the stored tensors (`words` packed, else int8).

    The abs-max scale is amax / (2^(b-1) - 0.5), which uses both ends of the two's complement range.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    blocks = codec.blocks_of(weight, group_size) if group_size else weight.unsqueeze(1)
    h = None if importance is None else importance.reshape(blocks.shape[1:])

    def round_trip(b: Tensor, s: Tensor) -> Tensor:
        return torch.round(b / s).clamp_(low, high) * s

    def scales(rows: Tensor) -> Tensor:
        top = _positive(rows.abs().amax(-1) / (high + 0.5))
        ratios = (1.0, *scale_search.RATIOS) if search else (1.0,)
        return scale_search.best_scale(rows, h, (top.mul(r).bfloat16().float() for r in ratios), round_trip)

    step = scale_search.by_rows(blocks, scales)
    values = torch.round(blocks / step.unsqueeze(-1)).clamp(low, high).to(torch.int8).flatten(-2)
    if not words:
        return {"weight": values, "weight_scale": step.bfloat16()}
    return {
        "weight_packed": codec.pack_int(values, bits),
        "weight_scale": step.bfloat16(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _smaller_group(in_features: int, group: int) -> int | None:
    while group > SMALLEST_GROUP:
        group //= 2
        if in_features % group == 0:
            return group
    return None


def _positive(scale: Tensor) -> Tensor:
    """A scale to divide by: rows and blocks that are zero, or below bf16's normal range, get 1."""
    return torch.where(scale < torch.finfo(torch.bfloat16).tiny, 1.0, scale)


def _bf16_up(scale: Tensor) -> Tensor:
    """bf16 values not below `scale`, so that FP8's largest value does not saturate."""
    rounded = scale.bfloat16().float()
    return torch.where(rounded < scale, rounded * (1 + 2.0**-7), rounded).bfloat16().float()
