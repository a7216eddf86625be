"""OutlierTune: static INT8 or INT6 inputs with one scale a channel that costs nothing at run time.

    x ≈ s q + z      y = W x + b ≈ (W diag(s)) q + (W z + b)      one integer product, one scale a row

The channel scales s move into whatever produces x and into W (folds.py), the shift z into the producer and b; what is
left to the op is a division by one stored power of two. Where the producer cannot take z (an RMSNorm has no bias), the
op can subtract it. Where x cannot be scaled, where one scale a token is much better, and in the second linear of an
MLP, whose heavy tails no calibration text shows, the input keeps one scale a token, rotated first where the recipe
allows it and the error is smaller for it. docs/outlier_tune.md has figures.

Source: Wang et al., "OutlierTune", 2024 (arXiv 2406.18832).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration, Site
from compressor.folds import Fold, bf16_scale, find_folds, fold_scale, fold_shift, share
from compressor.kernels import activations as act
from compressor.layers import HadamardLinear, Packed, attributes_of, hadamard_of
from compressor.methods import gptq, scale_search
from compressor.methods import static_input as static
from compressor.methods.quantize import Placement
from compressor.model import linears
from compressor.statistics import ChannelMean, ChannelMinMax, ChannelSquare, Gram, Statistic, TokenSample

ALPHAS = (1.0, 0.9, 0.8, 0.65, 0.5)  # of static scales; the paper's first
TOKEN_ALPHAS = (0.0, 0.25, 0.5)  # of inputs that keep one scale a token: nothing folded first


@dataclass(frozen=True)
class Input:
    """What became of one input. `error` is relative to the layer's output, `token_error` that of one scale a token."""

    names: tuple[str, ...]
    rule: str
    alpha: float
    shifted: Literal["no", "producer", "input_offset"]
    error: float
    token_error: float
    spread: float  # of s: 99th percentile over median, before the shift
    shrunk: float  # sum of s with the shift over sum of s without
    multiply_adds: int
    hadamard: int = 0  # block size of a rotation that this step added
    scale: Tensor | None = field(default=None, repr=False)  # [1]
    offset: Tensor | None = field(default=None, repr=False)  # [K], of what arrives

    def row(self) -> dict[str, object]:
        """JSON."""
        return {
            "site": list(self.names),
            "input": self.rule,
            "alpha": self.alpha,
            "shift": self.shifted,
            "hadamard": self.hadamard,
            "error": round(self.error, 7),
            "error with a scale a token": round(self.token_error, 7),
            "spread of scales": round(self.spread, 3),
            "sum of scales after the shift": round(self.shrunk, 4),
        }


@dataclass(frozen=True)
class Inputs:
    sites: tuple[Input, ...]

    def __or__(self, other: Inputs) -> Inputs:
        return Inputs(self.sites + other.sites)

    def of(self, name: str) -> Input:
        return next(site for site in self.sites if name in site.names)

    def report(self) -> dict[str, object]:
        total = sum(s.multiply_adds for s in self.sites)
        static_ones = sum(s.multiply_adds for s in self.sites if s.scale is not None)
        return {"static_share": round(static_ones / max(total, 1), 4), "sites": [s.row() for s in self.sites]}


@dataclass(frozen=True)
class LayerPlan:
    placement: Placement
    input: Input
    importance: Tensor | None = field(default=None, repr=False)  # [K] mean square of each channel of what is rounded
    hessian: gptq.Hessian | None = field(default=None, repr=False)
    detail: Mapping[str, object] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class OutlierTune:
    whole: ClassVar[bool] = False
    bits: Literal[8, 6] = 8
    alpha: float | Literal["auto"] = "auto"  # the share of s, as a power, that is folded; 1.0 is the paper
    symmetrize: bool | Literal["auto"] = "auto"
    static_within: float = 2.0  # static where the error is at most this many times that of one scale a token
    hadamard: Literal[0, 16, 32, 64] = 0  # blocks that rotate inputs with a scale a token where that pays
    static_down: bool = False  # second linears of an MLP too; their inputs have tails that calibration does not show
    scales: Literal["absmax", "mse", "weighted"] = "weighted"
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = 0.01
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha:g} is not a share; give a number from 0 to 1, or auto")
        if not self.static_within >= 0:
            raise ValueError(f"static_within {self.static_within:g} must be 0 (never static) or more; 2 is usual")
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} must be above 0; 0.01 is usual")

    def place(self, out_features: int, in_features: int) -> Placement:
        """One int8 a weight, whatever its range, and one bf16 scale a row: any shape fits."""
        return Placement(f"int{self.bits}", size_bytes=out_features * (in_features + 2))

    def fold_needs(self) -> set[type[Statistic]]:
        """Ranges of every token there is, and a sample to measure the errors of the choices on."""
        return {ChannelMinMax, TokenSample}

    def fold(self, model: nn.Module, calibration: Calibration) -> Inputs:
        """Choose a rule for every input and fold scales and shifts; `model` computes the same afterwards."""
        folds = find_folds(model, calibration.sites)
        owner = {name: fold for fold in folds.values() for name in fold.site}
        shared: dict[tuple[str, ...], list[Site]] = {}  # experts behind one norm are scaled together
        for site in calibration.sites:
            fold = owner.get(site.names[0])
            shared.setdefault(fold.site if fold else site.names, []).append(site)
        return Inputs(tuple(self._fold(model, owner.get(n[0]), sites, calibration) for n, sites in shared.items()))

    def _fold(self, model: nn.Module, fold: Fold | None, sites: Sequence[Site], calibration: Calibration) -> Input:
        layers = linears(model)
        names = tuple(n for site in sites for n in site.names)
        weights = [[layers[n].weight.detach().float() for n in site.names] for site in sites]
        device = weights[0][0].device
        samples = [calibration.value(site.names[0], TokenSample).to(device) for site in sites]
        parts = list(zip(samples, weights, strict=True))
        ranges = torch.stack([calibration.value(site.names[0], ChannelMinMax) for site in sites]).to(device)
        low, high = ranges[:, 0].amin(0), ranges[:, 1].amax(0)
        if fold is not None:
            low, high = share(fold, low, "min"), share(fold, high, "max")
        s, shift = static.scales(low, high, None, self.bits), (low + high) / 2
        centred = static.scales(low, high, shift, self.bits)
        shrunk = float(centred.sum() / s.sum())

        def token_error(alpha: float) -> float:
            f = static.split(s, None, alpha).fold
            return _mean(static.token_error(x, w, f, self.bits) for x, w in parts)

        def static_error(choice: tuple[float, bool]) -> float:
            return _mean(static.static_error(x, w, given(choice), self.bits) for x, w in parts)

        def given(choice: tuple[float, bool]) -> static.Static:
            alpha, moved = choice
            return static.split(centred if moved else s, shift if moved else None, alpha)

        token_errors = {a: token_error(a) for a in (TOKEN_ALPHAS if fold and self.alpha == "auto" else (0.0,))}
        token_alpha = min(token_errors, key=token_errors.__getitem__)
        per_token, rotated = token_errors[token_alpha], self._rotated_error(layers[names[0]], parts)
        block = self.hadamard if rotated < per_token else 0
        per_token = min(per_token, rotated)
        result: dict[str, Any] = {
            "names": names,
            "token_error": per_token,
            "spread": static.spread(s),
            "shrunk": shrunk,
            "multiply_adds": sum(w.numel() for group in weights for w in group),
        }
        if fold is not None and (self.static_down or fold.kind in ("norm", "values")):
            place = self._shift_place(model, fold)
            alphas = ALPHAS if self.alpha == "auto" else (self.alpha,)
            errors = {c: static_error(c) for c in product(alphas, (False, True) if place != "no" else (False,))}
            best = min(errors, key=errors.__getitem__)
            if errors[best] <= self.static_within * per_token:
                found = given(best)
                found = replace(found, fold=bf16_scale(model, fold, found.fold))
                moved = place if best[1] else "no"
                if moved == "producer":
                    assert found.shift is not None
                    fold_shift(model, fold, found.shift)
                fold_scale(model, fold, found.fold)
                offset = found.offset if moved == "input_offset" else None
                return Input(
                    rule=f"int{self.bits}_static", alpha=best[0], shifted=moved, error=errors[best], scale=found.scale,
                    offset=offset, **result,
                )  # fmt: skip
        if block:
            token_alpha = 0.0
            for name in names:
                model.set_submodule(name, HadamardLinear.rotated(layers[name], block))
        elif fold is not None and token_alpha:
            fold_scale(model, fold, bf16_scale(model, fold, static.split(s, None, token_alpha).fold))
        return Input(
            rule=f"int{self.bits}", alpha=token_alpha, shifted="no", hadamard=block, error=per_token, **result
        )

    def _rotated_error(self, layer: nn.Linear, parts: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> float:
        """Error of one scale a token behind a rotation of the input; infinite where there is none to add."""
        block = self.hadamard
        if not block or layer.in_features % block or hadamard_of(layer):
            return math.inf
        ones = torch.ones(layer.in_features, device=layer.weight.device)
        return _mean(
            static.token_error(act.rotate(x, block), [act.rotate(w, block) for w in ws], ones, self.bits)
            for x, ws in parts
        )

    def _shift_place(self, model: nn.Module, fold: Fold) -> Literal["no", "producer", "input_offset"]:
        """Where a shift can go. "auto" adds neither biases nor offsets: stock transformers could not load them."""
        if self.symmetrize is False:
            return "no"
        if self.symmetrize is True:
            return "producer" if fold.shifts else "input_offset"
        modules = [model.get_submodule(n) for n in (fold.producer, *fold.site, *fold.others)]
        return "producer" if fold.shifts and all(m._parameters.get("bias") is not None for m in modules) else "no"

    def survey_needs(self) -> set[type[Statistic]]:
        """Nothing: `fold` decides."""
        return set()

    def needs(self) -> set[type[Statistic]]:
        """Of the folded model: what weights are rounded by, and the ranges again, to see that nothing is clipped."""
        wanted: set[type[Statistic]] = {ChannelMinMax}
        if self.rounding == "gptq":
            wanted.add(Gram)
        elif self.scales == "weighted":
            wanted.add(ChannelSquare)
        return wanted | ({ChannelMean} if self.symmetrize else set())

    def plan(self, layers: Mapping[str, nn.Linear], calibration: Calibration, inputs: Inputs) -> dict[str, LayerPlan]:
        """Importance or Hessian of every input, of what is rounded: behind the offset where there is one."""
        plans: dict[str, LayerPlan] = {}
        for site in calibration.sites:
            if not (names := [n for n in site.names if n in layers]):
                continue
            chosen = inputs.of(names[0])
            given = self._second_order(names[0], calibration, chosen.offset)
            if chosen.scale is not None:
                given["detail"] = {"input": chosen.rule, "largest_code": _largest_code(names[0], calibration, chosen)}
            else:
                given["detail"] = {"input": chosen.rule}
            plans |= {n: LayerPlan(self.place(*layers[n].weight.shape), chosen, **given) for n in names}
        return plans

    def _second_order(self, name: str, calibration: Calibration, offset: Tensor | None) -> dict[str, Any]:
        def mean() -> Tensor:
            return calibration.value(name, ChannelMean)

        if self.rounding == "gptq":
            gram = calibration.value(name, Gram)
            if offset is not None:
                z, m = offset.to(gram.device), mean().to(gram.device)
                gram = gram - torch.outer(z, m) - torch.outer(m, z) + torch.outer(z, z)
            return {"importance": gram.diagonal().clone(), "hessian": gptq.factorize(gram, self.damping, name)}
        if self.scales != "weighted":
            return {}
        square = calibration.value(name, ChannelSquare)
        if offset is not None:
            z = offset.to(square.device)
            square = (square - 2 * z * mean() + z * z).clamp_min(0)
        return {"importance": square}

    def apply(self, layer: nn.Linear, plan: LayerPlan) -> Packed:
        """Pack one linear of the folded model. weight [N, K] of any float dtype; nothing is written to the layer."""
        weight = layer.weight.detach().float()
        importance = None if plan.importance is None else plan.importance.to(weight.device)
        grid = scale_search.choose(f"int{self.bits}", weight, None, importance, self.scales)
        codes = grid.codes(weight) if plan.hessian is None else gptq.round_columns(weight, plan.hessian, grid)
        tensors = grid.pack(codes, words=False)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if plan.input.scale is not None:
            tensors["input_scale"] = plan.input.scale
        if plan.input.offset is not None:
            tensors["input_offset"] = plan.input.offset.to(weight.device)
            added = weight @ tensors["input_offset"]
            bias = added if bias is None else bias.float() + added
        if bias is not None:
            tensors["bias"] = bias
        attributes = {"activations": plan.input.rule} | attributes_of(layer) | {"bits": self.bits, "group_size": None}
        return Packed("int_linear", tensors, attributes)


def _largest_code(name: str, calibration: Calibration, chosen: Input) -> float:
    """The largest |code| before clipping, over the calibration tokens and the folded model; 127.5 would be clipped."""
    assert chosen.scale is not None
    reach = calibration.value(name, ChannelMinMax)
    if chosen.offset is not None:
        reach = reach - chosen.offset.to(reach.device)
    return round(float(reach.abs().amax() / chosen.scale.to(reach.device)), 3)


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
