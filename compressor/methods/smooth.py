"""Smooth: move the difficulty of a linear's input channels into its weights, or the other way, before quantizing.

    smoothquant   s_j = max_t |x_tj|^α / max_n |w_nj|^(1-α)                         Xiao et al., ICML 2023, eq. 4
    awq           s_j = (mean_t |x_tj|)^α, α the best of a grid that includes 0      Lin et al., MLSys 2024, eq. 5

Both are choosers of a scale for folds.py, which applies x' = x / s, W' = W diag(s) so that the model computes what it
did. This is a transform: it stores nothing and changes a working copy, which a later step quantizes. See docs/folds.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration
from compressor.folds import Fold, bf16_scale, find_folds, fold_scale, share
from compressor.kernels import activations as act
from compressor.kernels import codec
from compressor.layers import build
from compressor.methods.quantize import LayerPlan, Quantize
from compressor.statistics import ChannelAbsMax, ChannelAbsMean, ChannelSquare, Statistic

GRID = 20  # awq's alphas: 0, 1/20, … 19/20
TOKENS = 64  # drawn, to judge the rounding of activations on
LIMIT = 2.0**14  # scales stay in 2^±14, so that neither side leaves float16 for an outlier


@dataclass(frozen=True)
class Smooth:
    """`alpha` is smoothquant's. `weights`, `activations`, `group_size` say how a later step quantizes, for awq."""

    whole: ClassVar[bool] = False

    rule: Literal["smoothquant", "awq"] = "smoothquant"
    alpha: float = 0.5
    weights: Literal["nvfp4", "mxfp4", "int2", "int4", "int8", "fp8"] = "int4"
    activations: Literal["none", "nvfp4", "mxfp4", "int8", "fp8"] = "none"
    group_size: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must be from 0 to 1")
        self._target()  # which raises for formats that do not go together

    def fold_needs(self) -> set[type[Statistic]]:
        """Maxima set smoothquant's scales and the NVFP4 input scale; means and squares are awq's scale and error."""
        wanted: set[type[Statistic]] = {ChannelAbsMax}
        return wanted | {ChannelAbsMean, ChannelSquare} if self.rule == "awq" else wanted

    def fold(self, model: nn.Module, calibration: Calibration) -> dict[str, Any]:
        """Scale every site that has a fold. `model` is a working copy: its parameters are replaced.

        Returns a JSON-able report: first linear of a site -> how it was folded, or {"kind": "none"}. `spread` is the
        largest channel maximum over the median one; `error` (awq) is relative to the linears' output.
        """
        folds = find_folds(model, calibration.sites)
        report: dict[str, Any] = {fold.site[0]: self._fold_one(model, fold, calibration) for fold in folds.values()}
        covered = {name for fold in folds.values() for name in fold.site}
        for site in calibration.sites:
            if site.names[0] not in covered:
                report[site.names[0]] = {"kind": "none", "linears": list(site.names)}
        return report

    def _fold_one(self, model: nn.Module, fold: Fold, calibration: Calibration) -> dict[str, Any]:
        top = calibration.together(fold.site, ChannelAbsMax)
        report: dict[str, Any] = {"kind": fold.kind, "producer": fold.producer, "linears": list(fold.site)}
        if self.rule == "smoothquant":
            alpha, scale = self.alpha, self._smoothquant(model, fold, top)
        else:
            alpha, scale, errors = self._awq(model, fold, calibration, top)
            report |= {"error_before": errors[0], "error_after": errors[1]}
        if not self.power_of_two and bool((scale != 1).any()):
            scale = bf16_scale(model, fold, scale)
        fold_scale(model, fold, scale)
        return report | {
            "alpha": alpha,
            "spread_before": _spread(top),
            "spread_after": _spread(top / scale),
            "scale_min": scale.min().item(),
            "scale_max": scale.max().item(),
        }

    def _smoothquant(self, model: nn.Module, fold: Fold, top: Tensor) -> Tensor:
        weight_top = torch.stack([w.abs().amax(0) for w in _weights(model, fold)]).amax(0).cpu()
        x, w = share(fold, top), share(fold, weight_top)
        return self._finished(x.pow(self.alpha) / w.pow(1 - self.alpha), (x > 0) & (w > 0))

    def _awq(
        self, model: nn.Module, fold: Fold, calibration: Calibration, top: Tensor
    ) -> tuple[float, Tensor, tuple[float, float]]:
        """alpha, scale [K], and the relative errors without and with it; ties go to the smaller alpha."""
        mean = share(fold, calibration.together(fold.site, ChannelAbsMean), "mean")
        square = calibration.together(fold.site, ChannelSquare)
        weights = list(_weights(model, fold))
        size = sum(float((w.square().sum(0).cpu() * square).sum()) for w in weights) or 1.0
        best: tuple[float, float, Tensor] | None = None
        first = 0.0
        for step in range(GRID):
            scale = self._finished(mean.pow(step / GRID), mean > 0)
            error = self._error(weights, scale, square, top) / size
            if best is None:
                first = error
            if best is None or error < best[0]:
                best = (error, step / GRID, scale)
        assert best is not None
        return best[1], best[2], (first**0.5, best[0] ** 0.5)

    def _error(self, weights: list[Tensor], scale: Tensor, square: Tensor, top: Tensor) -> float:
        """Σ_k h_k |w_k - Q(W s)_k / s_k|² + Σ_k E(Q(x')_k - x'_k)² |Q(W s)_k|² over the linears, h = E x².

        The output's squared error, correlations between channels and between the two roundings left out. The second
        sum is over tokens drawn with the channels' mean squares, since no token of the text is kept.
        """
        target = self._target()
        device = weights[0].device
        scale, square, top = (t.to(device) for t in (scale, square, top))
        scaled = [w * scale for w in weights]
        divisor = None
        if self.weights == "nvfp4":  # linears of one site share it
            divisor = codec.nvfp4_weight_divisor(torch.stack([w.abs().amax() for w in scaled]).amax())
        noise = self._noise(scale, square, top)
        total = 0.0
        for weight, product in zip(weights, scaled, strict=True):
            place = target.place(*weight.shape)
            if place.kept is not None:
                continue
            layer = nn.Linear(1, 1, bias=False, device="meta")
            layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
            layer.weight = nn.Parameter(product, False)
            packed = target.apply(layer, LayerPlan(place, divisor, None if divisor is None else torch.ones(1)))
            rounded = build(packed).dequantize()[:, : weight.shape[1]]
            total += float((square * (rounded / scale - weight).square().sum(0)).sum())
            total += float((noise * rounded.square().sum(0)).sum())
        return total

    def _noise(self, scale: Tensor, square: Tensor, top: Tensor) -> Tensor:
        """[K] mean square of what rounding takes from x / scale."""
        if self.activations == "none":
            return torch.zeros_like(scale)
        drawn = torch.randn(TOKENS, len(scale), generator=torch.Generator().manual_seed(0)).to(scale.device)
        x = drawn * square.sqrt() / scale
        padded = nn.functional.pad(x, (0, -len(scale) % (codec.FORMATS[self.activations].block or 1)))
        divisor = codec.nvfp4_input_divisor((top / scale).amax()) if self.activations == "nvfp4" else None
        return (act.quantize(padded, self.activations, divisor)[:, : len(scale)] - x).square().mean(0)

    def _finished(self, scale: Tensor, alive: Tensor) -> Tensor:
        """Centred on 1 (the root of max times min), 1 for channels that are always zero, float32 in 2^±14."""
        scale = torch.where(alive, scale, 1.0)
        if bool(alive.any()):
            low, high = scale[alive].aminmax()
            scale = torch.where(alive, scale / (low * high).sqrt(), 1.0)
        scale = scale.clamp(1 / LIMIT, LIMIT)
        return torch.exp2(scale.log2().round()) if self.power_of_two else scale

    def _target(self) -> Quantize:
        fixed = codec.FORMATS[self.weights].block is not None
        return Quantize(
            self.weights, self.activations, self.group_size, "pad" if fixed else "smaller", scales="absmax"
        )


def _weights(model: nn.Module, fold: Fold) -> Iterator[Tensor]:
    """[N, K] float32 of each linear of the site."""
    for name in fold.site:
        module: Any = model.get_submodule(name)
        yield module.weight.detach().float()


def _spread(top: Tensor) -> float:
    alive = top[top > 0]
    return (alive.max() / alive.median()).item() if len(alive) else 1.0
