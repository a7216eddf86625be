"""SVD: linears of low rank in place of dense ones, best in the metric of what they see. See docs/svd.md.

The factors are ordinary linears in bf16, `….down` and `….up`, which later steps quantize like any other. A layer whose
rank would cost as many weights as it has stays dense.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration
from compressor.lowrank import LowRankLinear, rank_for, weights
from compressor.model import linears
from compressor.sensitivity import Fisher
from compressor.statistics import ChannelAbsMean, Gram, Statistic
from compressor.weighted_svd import pivoted, weighted_svd


@dataclass(frozen=True)
class SVD:
    """`keep` is the share of the targeted linears' weights that remain, `alpha` asvd's."""

    whole: ClassVar[bool] = False

    keep: float = 0.8
    metric: Literal["plain", "asvd", "inputs"] = "inputs"
    alpha: float = 0.5
    form: Literal["plain", "pivoted"] = "pivoted"
    rank_multiple: int = 16  # of every rank: a group of later formats, a tile of kernels
    sequential: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep {self.keep:g} is not a share of the weights; give a number between 0 and 1")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple {self.rank_multiple} must be 1 or more; 16 is usual")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """LowRankLinears of the ranks that the budget gives every layer alike."""
        for name, rank in self.ranks(model, names).items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            shape = (layer.out_features, layer.in_features, rank)
            bias = layer.bias is not None
            model.set_submodule(name, LowRankLinear.shaped(*shape, bias=bias, pivoted=self.form == "pivoted"))

    def ranks(self, model: nn.Module, names: Collection[str]) -> dict[str, int]:
        """The rank of each layer that does not stay dense, from shapes alone."""
        found = {}
        for name, layer in linears(model).items():
            if name not in names:
                continue
            n, k = layer.out_features, layer.in_features
            exact = rank_for(n, k, self.keep * n * k, self.form == "pivoted")
            rank = max(1, int(exact // self.rank_multiple)) * self.rank_multiple
            if rank < min(n, k) and weights(n, k, rank, self.form == "pivoted") < n * k:
                found[name] = rank
        return found

    def survey_needs(self) -> set[type[Statistic]]:
        """Nothing: every layer keeps the same share."""
        return set()

    def survey(self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None) -> None:
        """Not called."""

    def needs(self) -> set[type[Statistic]]:
        """What the metric of the inputs is made of."""
        wanted: dict[str, set[type[Statistic]]] = {"plain": set(), "asvd": {ChannelAbsMean}, "inputs": {Gram}}
        return wanted[self.metric]

    def reshape(self, model: nn.Module, calibration: Calibration, decisions: None) -> dict[str, Any]:
        """Replace the linears that `calibration` has; `loss` of the report is the share of the output that is lost."""
        report: dict[str, Any] = {}
        layers = linears(model)
        names = [n for n in layers if n in calibration]
        ranks = self.ranks(model, names)
        for name in names:
            layer = layers[name]
            if name not in ranks:
                layer.weight = nn.Parameter(_bf16(layer.weight.detach()), layer.weight.requires_grad)
                report[name] = {"kept": "as many weights as a low rank would have"}
                continue
            found = weighted_svd(layer.weight, None, self._inputs(calibration, name))
            made = self._module(layer, *found.factors(ranks[name]))
            model.set_submodule(name, made)
            loss = found.loss(ranks[name]) / max(found.loss(0), 1e-30)
            report[name] = {"rank": ranks[name], "loss": round(loss, 6)}
        return report

    def _inputs(self, calibration: Calibration, name: str) -> Tensor | None:
        if self.metric == "asvd":
            return calibration.value(name, ChannelAbsMean).double().pow(2 * self.alpha)
        return calibration.value(name, Gram) if self.metric == "inputs" else None

    def _module(self, layer: nn.Linear, a: Tensor, b: Tensor) -> LowRankLinear:
        """A [N, R], B [R, K] and the layer's bias in the chosen form; float32 that bf16 holds."""
        bias = None if layer.bias is None else layer.bias.detach().double()
        if self.form == "plain":
            share = a.norm(dim=0).clamp_min(1e-30) / b.norm(dim=1).clamp_min(1e-30)
            balanced = share.sqrt()  # both factors of one size, for what rounds them later
            return LowRankLinear(_linear(b * balanced[:, None], None), _linear(a / balanced, bias))
        down, up, order = pivoted(a, b)
        if bias is None:
            return LowRankLinear(_linear(down, None), _linear(up, None), order)
        places = order.argsort()  # of the outputs in (z, up(z))
        first, rest = bias[places[: len(down)]], bias[places[len(down) :]]
        return LowRankLinear(_linear(down, first), _linear(up, rest - up @ first), order)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(1, 1, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(_bf16(weight), False)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.float(), False))
    return made


def _bf16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()
