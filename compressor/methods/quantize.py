"""Weights on a grid of 1, 2, 3, 4 or 8 bits, rounded to nearest or by GPTQ; activations on a grid of their own.

Options are the dataclass fields. Linears that read the same input share their NVFP4 global scales, because a
runtime that merges q/k/v or gate/up has room for one. Scales are chosen before anything is rounded
(scale_search.py), what is rounded how is grid.py and gptq.py. See docs/quantize.md for equations and figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration
from compressor.kernels import codec
from compressor.layers import Packed, attributes_of
from compressor.methods import gptq, guard, scale_search
from compressor.methods.guard import Guards
from compressor.sensitivity import Fisher
from compressor.statistics import AbsMax, BlockNoise, ChannelSquare, Gram, Statistic

WEIGHT_ONLY = "none"
# Which activation rules a runtime (or one of our ops) can pair with each weight format.
PAIRS: dict[str, tuple[str, ...]] = {
    "nvfp4": ("none", "nvfp4", "fp8", "int8", "int8_block"),
    "mxfp4": ("none", "mxfp4", "fp8", "int8", "int8_block"),
    "int1": ("none",),
    "int2": ("none",),
    "int3": ("none",),
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
    hessian: gptq.Hessian | None = field(default=None, repr=False)
    activations: str | None = None  # of a guarded input; None: the method's


@dataclass(frozen=True)
class Quantize:
    weights: Literal["nvfp4", "mxfp4", "int1", "int2", "int3", "int4", "int8", "fp8"] = "nvfp4"
    activations: Literal["none", "nvfp4", "mxfp4", "int8", "int8_block", "fp8"] = "none"
    group_size: int | None = None
    on_misfit: Literal["smaller", "pad", "keep"] = "smaller"
    scales: Literal["absmax", "four_over_six", "mse", "weighted"] = "weighted"
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = 0.01  # of GPTQ, relative to the mean of diag(H)
    sequential: bool = False  # each block is calibrated on what the compressed blocks before it compute
    four_over_six: bool = False  # of activations
    guard: float = 0.0  # share of the multiply-adds whose 4-bit inputs may stay at 8 bits, where that saves most
    guard_activations: Literal["fp8", "int8"] = "fp8"
    sensitivity: Literal["kl", "error"] = "kl"  # what "saves most" is measured in

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
        if self.scales == "four_over_six" and self.weights != "nvfp4":
            raise ValueError("scales 'four_over_six' need weights: nvfp4")
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} must be above 0; 0.01 is usual")
        if not 0 <= self.guard <= 1:
            raise ValueError(f"guard {self.guard:g} is not a share; give a number from 0 to 1")
        if self.guard and self.activations not in ("nvfp4", "mxfp4"):
            raise ValueError(f"guard keeps 4-bit inputs at 8 bits, and activations '{self.activations}' have none")

    def needs(self) -> set[type[Statistic]]:
        """Channel squares weight scales, Gram matrices are GPTQ's, the abs-max sets the static NVFP4 input scale."""
        wanted: set[type[Statistic]] = set()
        if self.rounding == "gptq":
            wanted.add(Gram)
        elif self.scales == "weighted":
            wanted.add(ChannelSquare)
        if self.activations == "nvfp4":
            wanted.add(AbsMax)
        return wanted

    def survey_needs(self) -> set[type[Statistic]]:
        """What guards are chosen by: rounding noise of every input, over the whole model before anything is packed."""
        return {BlockNoise, ChannelSquare} if self.guard else set()

    def survey(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None
    ) -> Guards:
        """The guarded inputs, from all layers of the step."""
        return guard.choose(layers, calibration, fisher, self.guard)

    def place(self, out_features: int, in_features: int) -> Placement:
        """Format, group and padding of a [out_features, in_features] weight."""
        fmt = codec.FORMATS[self.weights]
        group = fmt.block or self.group_size
        padding, note = 0, ""
        # Without a group the only constraint is that packed words hold whole rows.
        words = fmt.kind == "int_linear" and self.activations == "none"
        unit = group or (math.lcm(fmt.bits, 32) // fmt.bits if words else 1)
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

    def plan(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration | None, guards: Guards | None = None
    ) -> dict[str, LayerPlan]:
        """Placement of every layer, and what the linears of one site share: global scales, importance, Hessian."""
        guarded = guards.names if guards else set()
        shared: dict[str, dict[str, Any]] = {}
        for site in calibration.sites if calibration is not None else ():
            if names := [n for n in site.names if n in layers]:
                assert calibration is not None
                shared |= dict.fromkeys(names, self._site(names, layers, calibration))
        return {
            name: LayerPlan(
                self.place(*layer.weight.shape),
                activations=self.guard_activations if name in guarded else None,
                **shared.get(name, {}),
            )
            for name, layer in layers.items()
        }

    def _site(self, names: list[str], layers: Mapping[str, nn.Linear], calibration: Calibration) -> dict[str, Any]:
        found: dict[str, Any] = {}
        device = layers[names[0]].weight.device
        if self.weights == "nvfp4":
            amax = torch.stack([layers[n].weight.detach().abs().amax() for n in names]).amax()
            found["weight_global_scale"] = codec.nvfp4_weight_divisor(amax)
        if self.activations == "nvfp4":
            found["input_global_scale"] = codec.nvfp4_input_divisor(calibration.value(names[0], AbsMax).to(device))
        if self.rounding == "gptq":
            gram = calibration.value(names[0], Gram)
            if padding := self.place(*layers[names[0]].weight.shape).padding:
                gram = nn.functional.pad(gram, (0, padding, 0, padding))
            found["importance"] = gram.diagonal().clone()
            found["hessian"] = gptq.factorize(gram, self.damping, names[0])
        elif self.scales == "weighted" and calibration.seen(names[0]):
            found["importance"] = calibration.value(names[0], ChannelSquare)
        return found

    def apply(self, layer: nn.Linear, plan: LayerPlan) -> Packed:
        """Pack one linear. weight [N, K] of any float dtype; nothing is written to the layer."""
        place = plan.placement
        weight = nn.functional.pad(layer.weight.detach().float(), (0, place.padding))
        importance = plan.importance
        if importance is not None:
            missing = weight.shape[1] - importance.numel()
            importance = nn.functional.pad(importance, (0, missing)).to(weight.device)
        divisor = plan.weight_global_scale
        if divisor is None and self.weights == "nvfp4":
            divisor = codec.nvfp4_weight_divisor(weight.abs().amax())
        grid = scale_search.choose(self.weights, weight, place.group_size, importance, self.scales, divisor)
        if plan.hessian is None:
            codes = grid.codes(weight)
        else:
            codes = gptq.round_columns(weight, plan.hessian, grid)
        rule = plan.activations or self.activations
        tensors = grid.pack(codes, words=rule == WEIGHT_ONLY)
        kind = codec.FORMATS[self.weights].kind
        attributes = {"activations": rule} | attributes_of(layer, place.padding)
        if kind == "fp4_linear":
            attributes |= {"format": self.weights, "four_over_six": self.four_over_six and rule == "nvfp4"}
        elif kind == "int_linear":
            attributes |= {"bits": codec.FORMATS[self.weights].bits, "group_size": place.group_size}
        if rule == "nvfp4" and plan.input_global_scale is not None:
            tensors["input_global_scale"] = plan.input_global_scale
        if layer.bias is not None:
            tensors["bias"] = layer.bias.detach().clone()
        return Packed(kind, tensors, attributes)


def _smaller_group(in_features: int, group: int) -> int | None:
    while group > SMALLEST_GROUP:
        group //= 2
        if in_features % group == 0:
            return group
    return None
