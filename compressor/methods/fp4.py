"""LLM-FP4: floats of few bits for weights and inputs, formats and ranges searched by what the layer computes.

    y = W x + b ≈ Q_w(2^-k W) · Q_a(2^k x) + b        Q_a: one static scale for all tokens and channels

The powers of two 2^k_j, one a channel, bring the channels of x to one range before they are rounded, and cost nothing:
they are exact, and folds.py moves them into whatever produces x; where it cannot, the op multiplies by them. W is
rounded after it has taken 2^-k, in blocks of 16 with scales of their own. What is searched is float_search.py.

Source: Liu et al., "LLM-FP4", EMNLP 2023 (arXiv 2310.16836). docs/llm_fp4.md has what differs, and figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration, Site
from compressor.folds import Fold, find_folds, fold_scale, share
from compressor.kernels import codec
from compressor.layers import Packed
from compressor.methods import float_search, gptq, scale_search
from compressor.methods.float_search import Found, Sample, power_of_two
from compressor.methods.quantize import Placement
from compressor.model import linears
from compressor.statistics import ChannelAbsMax, ChannelSquare, Gram, Statistic, TokenSample

Format = Literal["e2m1", "e3m0", "e1m2", "e3m2", "e2m3", "e4m3", "e5m2"]
BFLOAT = 16  # activation_bits of inputs that stay as they are


@dataclass(frozen=True)
class Choice:
    """What became of the input of `names`, and the format of each of their weights."""

    names: tuple[str, ...]
    formats: Mapping[str, str]
    found: Found = field(repr=False)
    kind: str  # of the fold that took the shift, "input_shift", or "none"

    @property
    def input_shift(self) -> Tensor | None:
        """k [K] where it is left to the op."""
        return self.found.input.shift if self.kind == "input_shift" else None

    def row(self) -> dict[str, object]:
        """JSON."""
        given = self.found.input
        return {
            "site": list(self.names),
            "input": given.format or "none",
            "weights": sorted(set(self.formats.values())),
            "maxval": round(given.top, 6),
            "shift": self.kind,
            "largest shift": 0 if given.shift is None else int(given.shift.max()),
            "error": round(self.found.error, 7),
            "error of abs-max": round(self.found.absmax_error, 7),
        }


@dataclass(frozen=True)
class Choices:
    sites: tuple[Choice, ...]

    def __or__(self, other: Choices) -> Choices:
        return Choices(self.sites + other.sites)

    def of(self, name: str) -> Choice:
        return next(site for site in self.sites if name in site.formats)

    def report(self) -> dict[str, object]:
        return {"sites": [site.row() for site in self.sites]}


@dataclass(frozen=True)
class LayerPlan:
    placement: Placement
    format: str
    choice: Choice
    divisor: Tensor | None = None  # of the block scales
    importance: Tensor | None = field(default=None, repr=False)  # [K] mean square of each channel of 2^k x
    hessian: gptq.Hessian | None = field(default=None, repr=False)
    detail: Mapping[str, object] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class FP4:
    """`formats` and `activation_formats`: auto, or those of the width that the search may choose from."""

    whole: ClassVar[bool] = False

    bits: Literal[4, 6, 8] = 4
    activation_bits: Literal[4, 6, 8, 16] = 4  # 16: inputs stay as they are
    formats: tuple[Format, ...] | Literal["auto"] = "auto"
    activation_formats: tuple[Format, ...] | Literal["auto"] = "auto"
    search: Literal["joint", "weights", "absmax"] = "joint"
    shift: bool = True
    block: Literal[16] | None = 16  # weights that share a scale; none: a row
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = 0.01
    sequential: bool = False

    def __post_init__(self) -> None:
        for option, bits in (("formats", self.bits), ("activation_formats", self.activation_bits)):
            given = getattr(self, option)
            allowed = _of_width(bits)
            if given != "auto" and (not given or not set(given) <= set(allowed)):
                found = ", ".join(given) or "empty"
                raise ValueError(f"{option} {found}: {bits} bits have {', '.join(allowed) or 'none'}")
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} must be above 0; 0.01 is usual")

    def place(self, out_features: int, in_features: int) -> Placement:
        """Any shape fits: the input is padded to whole blocks, or to the codes that share bytes."""
        padding = -in_features % (self.block or {4: 2, 6: 4, 8: 1}[self.bits])
        columns = in_features + padding
        scales = columns // self.block if self.block else 2  # a byte each, and a bf16 a row
        size = out_features * (columns * self.bits // 8 + scales)
        note = f"input padded by {padding}" if padding else ""
        return Placement(f"fp{self.bits}", self.block, padding, None, size, note)

    def fold_needs(self) -> set[type[Statistic]]:
        """Ranges of every token there is, and a sample to measure the errors of the choices on."""
        return {ChannelAbsMax, TokenSample}

    def fold(self, model: nn.Module, calibration: Calibration) -> Choices:
        """Search every site and fold its shifts; `model` computes the same afterwards."""
        shifted = self.shift and self.activation_bits != BFLOAT
        folds = find_folds(model, calibration.sites) if shifted else {}
        owner = {name: fold for fold in folds.values() for name in fold.site}
        together: dict[tuple[str, ...], list[Site]] = {}  # experts behind one norm are shifted together
        for site in calibration.sites:
            fold = owner.get(site.names[0])
            together.setdefault(fold.site if fold else site.names, []).append(site)
        return Choices(
            tuple(self._fold(model, owner.get(names[0]), sites, calibration) for names, sites in together.items())
        )

    def _fold(self, model: nn.Module, fold: Fold | None, sites: Sequence[Site], calibration: Calibration) -> Choice:
        layers = linears(model)
        samples = []
        for site in sites:
            weights = [layers[n].weight.detach().float() for n in site.names]
            samples.append(Sample.of(calibration.value(site.names[0], TokenSample).to(weights[0].device), weights))
        amax = torch.stack([calibration.value(site.names[0], ChannelAbsMax) for site in sites]).amax(0)
        amax = amax.to(samples[0].x.device)
        found = float_search.search(
            samples,
            amax if fold is None else share(fold, amax),
            _of_width(self.bits) if self.formats == "auto" else self.formats,
            _of_width(self.activation_bits) if self.activation_formats == "auto" else self.activation_formats,
            self.block,
            self.search,
            self.shift,
        )
        kind, shift = "none", found.input.shift
        if shift is not None and bool(shift.any()):
            kind = "input_shift" if fold is None else fold.kind
            if fold is not None:
                fold_scale(model, fold, power_of_two(-shift))
        names = [n for site in sites for n in site.names]
        formats = dict(zip(names, (f for of in found.formats for f in of), strict=True))
        return Choice(tuple(names), formats, found, kind)

    def survey_needs(self) -> set[type[Statistic]]:
        """Nothing: `fold` decides."""
        return set()

    def needs(self) -> set[type[Statistic]]:
        """Of the folded model: what weights are rounded by."""
        if self.rounding == "gptq":
            return {Gram}
        return set() if self.search == "absmax" else {ChannelSquare}

    def plan(self, layers: Mapping[str, nn.Linear], calibration: Calibration, choices: Choices) -> dict[str, LayerPlan]:
        """Importance or Hessian of every input, and the divisor of block scales, which the linears of a site share."""
        plans: dict[str, LayerPlan] = {}
        for site in calibration.sites:
            if not (names := [n for n in site.names if n in layers]):
                continue
            choice = choices.of(names[0])
            place = self.place(*layers[names[0]].weight.shape)
            given = self._second_order(names[0], calibration, choice, place.padding)
            amax = torch.stack([_shifted(layers[n], choice).abs().amax() for n in names]).amax()
            for name in names:
                format = choice.formats[name]
                divisor = codec.nvfp4_weight_divisor(amax, codec.FLOATS[format].top) if self.block else None
                detail = {"weights": format, "input": choice.found.input.format or "none"}
                place = self.place(*layers[name].weight.shape)
                plans[name] = LayerPlan(place, format, choice, divisor, detail=detail, **given)
        return plans

    def _second_order(self, name: str, calibration: Calibration, choice: Choice, padding: int) -> dict[str, Any]:
        def scaled(values: Tensor) -> Tensor:
            if choice.input_shift is None:
                return values
            power = power_of_two(choice.input_shift).to(values.device)
            return values * power * (power if values.dim() == 1 else power.unsqueeze(-1))

        if self.rounding == "gptq":
            gram = nn.functional.pad(scaled(calibration.value(name, Gram)), (0, padding, 0, padding))
            return {"importance": gram.diagonal().clone(), "hessian": gptq.factorize(gram, self.damping, name)}
        if self.search == "absmax":
            return {}
        return {"importance": nn.functional.pad(scaled(calibration.value(name, ChannelSquare)), (0, padding))}

    def apply(self, layer: nn.Linear, plan: LayerPlan) -> Packed:
        """Pack one linear of the folded model. weight [N, K] of any float dtype; nothing is written to the layer."""
        padding, given = plan.placement.padding, plan.choice.found.input
        weight = nn.functional.pad(_shifted(layer, plan.choice), (0, padding))
        importance = None if plan.importance is None else plan.importance.to(weight.device)
        rule = "absmax" if self.search == "absmax" else "weighted"
        grid = scale_search.choose(plan.format, weight, self.block, importance, rule, plan.divisor)
        codes = grid.codes(weight) if plan.hessian is None else gptq.round_columns(weight, plan.hessian, grid)
        tensors = grid.pack(codes)
        attributes: dict[str, object] = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "padding": padding,
        }
        if layer.bias is not None:
            tensors["bias"] = layer.bias.detach().clone()
        if given.format is None and plan.format == "e2m1" and self.block:  # NVFP4, which every runtime reads
            attributes |= {"format": "nvfp4", "activations": "none", "four_over_six": False}
            return Packed("fp4_linear", tensors, attributes)
        if given.format is not None:
            tensors["input_scale"] = torch.tensor([given.step], device=weight.device)
        if (shift := plan.choice.input_shift) is not None:
            tensors["input_shift"] = nn.functional.pad(shift, (0, padding)).to(torch.int8)
        attributes |= {"format": plan.format, "activations": f"{given.format}_static" if given.format else "none"}
        return Packed("float_linear", tensors, attributes)


def _of_width(bits: int) -> tuple[str, ...]:
    return tuple(f.name for f in codec.FLOATS.values() if f.bits == bits)


def _shifted(layer: nn.Linear, choice: Choice) -> Tensor:
    """2^-k W where the shift is the op's, float32 [N, K]."""
    weight = layer.weight.detach().float()
    return weight if choice.input_shift is None else choice.found.input.folded(weight)
