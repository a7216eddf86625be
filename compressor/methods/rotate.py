"""Rotate: spread what a few channels hold over all of them, before inputs and weights are rounded.

    residual   the whole residual stream, norms merged           R1 of QuaRot and SpinQuant; folded, nothing at run time
    values     v_proj and o_proj, head by head                   R2; folded
    inputs     blocks of 16, 32 or 64 channels of an input       online, by our own ops: y = Q(H x) Q(W H)ᵀ

This is a transform: it stores nothing, and the model computes what it did (rotations.py). See docs/rotate.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration, Site
from compressor.folds import folds_of, probes, renamed
from compressor.hadamard import Kind, rotation
from compressor.kernels import activations as act
from compressor.kernels import codec
from compressor.layers import HadamardLinear, build, hadamard_of
from compressor.methods.quantize import LayerPlan, Quantize
from compressor.model import head_name, is_tied, linears
from compressor.rotations import head_size, rotate_residual, rotate_values
from compressor.statistics import Statistic, TokenSample

BF16_BYTES = 2
WHOLE = 32  # channels: whole blocks of every format


@dataclass(frozen=True)
class Rotate:
    """`where: auto` rotates the inputs whose rounding then costs less; `weights`, `activations`, `group_size` are those
    of the step that stores the layers."""

    whole: ClassVar[bool] = True

    residual: Literal["none", "hadamard", "random"] = "none"
    values: bool = False
    inputs: Literal[0, 16, 32, 64] = 0
    where: Literal["auto", "all"] = "auto"
    weights: Literal["nvfp4", "mxfp4", "int2", "int4", "int8", "fp8"] = "mxfp4"
    activations: Literal["none", "nvfp4", "mxfp4", "int8", "fp8"] = "mxfp4"
    group_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.residual == "none" and not self.values and not self.inputs:
            raise ValueError("nothing to rotate; give residual, values or inputs")
        if self._measures and (self.values or self.residual != "none"):
            raise ValueError(
                "where 'auto' measures inputs as they arrive, which residual and values change; rotate inputs in a "
                "second rotate step, or set where: all"
            )
        self._target()  # which raises for formats that do not go together

    @property
    def unties(self) -> bool:
        """Whether a tied head gets a table of its own: it takes the last norm's weight, the embedding does not."""
        return self.residual != "none"

    @property
    def _measures(self) -> bool:
        return self.inputs > 0 and self.where == "auto"

    def fold_needs(self) -> set[type[Statistic]]:
        """Tokens, to measure rounding with and without the rotation on."""
        return {TokenSample} if self._measures else set()

    def fold(self, model: nn.Module, calibration: Calibration) -> dict[str, Any]:
        """Rotate. `model` is a working copy: its parameters and linears are replaced. Returns a JSON-able report.

        The residual stream is rotated as a whole; values and inputs where calibration has the site.
        Raises ModelError where the residual stream cannot be rotated.
        """
        generator = torch.Generator().manual_seed(self.seed)
        report: dict[str, Any] = {}
        if self.residual != "none":
            report["residual"] = _residual(model, self.residual, generator)
        if self.values:
            report["values"] = _values(model, calibration.sites, generator)
        if self.inputs:
            report["inputs"] = {site.names[0]: self._input(model, site, calibration) for site in calibration.sites}
        return report

    def _input(self, model: nn.Module, site: Site, calibration: Calibration) -> dict[str, Any]:
        layers = linears(model)
        row: dict[str, Any] = {"linears": list(site.names), "hadamard": 0}
        if already := hadamard_of(layers[site.names[0]]):
            return row | {"hadamard": already, "why": "rotated by an earlier step"}
        if site.features % self.inputs:
            return row | {"why": f"{self.inputs} does not divide {site.features}"}
        plain = [layers[n] for n in site.names]
        rotated = [HadamardLinear.rotated(layer, self.inputs) for layer in plain]
        if self._measures:
            x = calibration.value(site.names[0], TokenSample).to(plain[0].weight.device)
            row |= {"error_before": self._error(x, plain, plain), "error_after": self._error(x, plain, rotated)}
            if not row["error_after"] < row["error_before"]:
                return row
        for name, layer in zip(site.names, rotated, strict=True):
            model.set_submodule(name, layer)
        return row | {"hadamard": self.inputs}

    @torch.no_grad()
    def _error(self, x: Tensor, plain: Sequence[nn.Linear], stored: Sequence[nn.Linear]) -> float:
        """Root of the mean over linears and tokens of |y - y'|² / |y|², the rounding of inputs x [M, K] in y'.

        Weights are as they are: what rounding them costs in another basis is for GPTQ to make up for. Where inputs are
        not rounded, weights are. A mean of ratios, or the few massive tokens would be all that counts.
        """
        target, block = self._target(), hadamard_of(stored[0])
        padded = nn.functional.pad(x, (0, -x.shape[1] % WHOLE))
        top = (act.rotate(x, block) if block else x).abs().amax()
        rounded = act.quantize(padded, self.activations, codec.nvfp4_input_divisor(top), hadamard=block)
        errors = []
        for layer, other in zip(plain, stored, strict=True):
            weight = other.weight
            if self.activations == "none" and (place := target.place(*weight.shape)).kept is None:
                weight = build(target.apply(other, LayerPlan(place))).dequantize()[:, : x.shape[1]]
            y = layer(x)
            found = nn.functional.linear(rounded[:, : x.shape[1]], weight, other.bias)
            errors.append(((found - y).square().sum(-1) / y.square().sum(-1).clamp_min(1e-30)).mean())
        return torch.stack(errors).mean().sqrt().item()

    def _target(self) -> Quantize:
        fixed = codec.FORMATS[self.weights].block is not None
        return Quantize(
            self.weights, self.activations, self.group_size, "pad" if fixed else "smaller", scales="absmax"
        )


def _residual(model: nn.Module, kind: Kind, generator: torch.Generator) -> dict[str, Any]:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    matrix, what = rotation(table.weight.shape[1], kind, generator)
    tied = is_tied(model)
    stream = rotate_residual(model, matrix)
    report = {"matrix": what, "norms_merged": len(stream.norms), "writers": len(stream.writers)}
    if tied:
        size = table.weight.numel() * BF16_BYTES
        note = f"{head_name(model)} was tied to the embedding and has a table of its own now"
        report |= {"untied": note, "untied_bytes": size}
    return report


def _values(model: nn.Module, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for prefix, under, inside in probes(model, sites):
        for fold in folds_of(under, inside):
            if fold.kind == "values" and (size := head_size(under, fold)):
                full = renamed(fold, lambda n, prefix=prefix: prefix + n)  # type: ignore[misc]
                matrix, what = rotation(size, "hadamard", generator)
                rotate_values(model, full, matrix)
                report[full.site[0]] = {"producer": full.producer, "head_size": size, "matrix": what}
    return report

