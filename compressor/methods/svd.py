"""SVD: linears of low rank in place of dense ones, best in the metric of what they see. See docs/svd.md.

The factors are ordinary linears in bf16, `….down` and `….up`, which later steps quantize like any other. A layer whose
rank would cost as many weights as it has stays dense. The mathematics is weighted_svd.py, how many ranks each layer
gets is rank_allocation.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor import rank_allocation
from compressor.calibrate import Calibration
from compressor.errors import ModelError
from compressor.layers import hadamard_of
from compressor.lowrank import LowRankLinear
from compressor.model import linears
from compressor.rank_allocation import Layer, Ranks
from compressor.sensitivity import Fisher
from compressor.statistics import ChannelAbsMean, CrossGram, Gram, Statistic
from compressor.weighted_svd import Decomposition, pivoted, shifted, weighted_svd

METRICS: dict[str, set[type[Statistic]]] = {
    "plain": set(),
    "asvd": {ChannelAbsMean},
    "fwsvd": set(),
    "inputs": {Gram},
    "fisher": {Gram},
}


@dataclass(frozen=True)
class Looked:
    """What a look at the whole model found: the output metric of each layer, and what it loses at every rank."""

    fisher: dict[str, Tensor]
    losses: dict[str, Tensor]

    def __or__(self, other: Looked) -> Looked:
        return Looked(self.fisher | other.fisher, self.losses | other.losses)


@dataclass(frozen=True)
class Decisions:
    fisher: dict[str, Tensor]
    ranks: Ranks


@dataclass(frozen=True)
class SVD:
    """`keep` is the share of the targeted linears' weights that remain, `alpha` asvd's."""

    whole: ClassVar[bool] = False
    sensitivity: ClassVar[str] = "kl"

    keep: float = 0.8
    metric: Literal["plain", "asvd", "fwsvd", "inputs", "fisher"] = "inputs"
    alpha: float = 0.5
    allocation: Literal["uniform", "svd_llm2", "relative", "kl"] = "uniform"
    floor: float = 0.25  # of the uniform rank, that relative and kl leave to every layer
    form: Literal["plain", "pivoted"] = "pivoted"
    rank_multiple: int = 16  # of every rank: a group of later formats, a tile of kernels
    sequential: bool = False  # each layer is fitted to what the factors before it give, and makes up for them
    damping: float = 0.01  # of sequential, relative to the mean of diag(C)

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep {self.keep:g} is not a share of the weights; give a number between 0 and 1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor:g} is not a share; give a number from 0 to 1")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple {self.rank_multiple} must be 1 or more; 16 is usual")
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} must be above 0; 0.01 is usual")
        if self.sequential and self.metric not in ("inputs", "fisher"):
            raise ValueError(f"sequential needs metric: inputs or fisher, and metric is '{self.metric}'")

    @property
    def paired(self) -> bool:
        """Whether `reshape` gets one site at a time, measured beside the model as it was (paired.py)."""
        return self.sequential

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """LowRankLinears of the ranks that the budget gives every layer alike."""
        layers = linears(model)
        shapes = {name: Layer(*layers[name].weight.shape) for name in names}
        for name, rank in self._uniform(shapes).items():
            if rank is not None:
                shape = (shapes[name].out_features, shapes[name].in_features, rank)
                bias, form = layers[name].bias is not None, self.form == "pivoted"
                model.set_submodule(name, LowRankLinear.shaped(*shape, bias=bias, pivoted=form))

    def _uniform(self, layers: Mapping[str, Layer]) -> Ranks:
        return rank_allocation.uniform(layers, self.keep, self.form == "pivoted", self.rank_multiple)

    def survey_needs(self) -> set[type[Statistic]]:
        """The metric's, where ranks or the metric itself depend on the whole model."""
        if self.allocation == "uniform":
            return {ChannelAbsMean} if self.metric in ("fwsvd", "fisher") else set()
        return METRICS[self.metric] | {Gram}

    def survey(self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None) -> Looked:
        """Of one block. Losses are KL in nats for `kl`, else relative to the layer's output."""
        assert fisher is not None
        losses: dict[str, Tensor] = {}
        if self.allocation != "uniform":
            for name, layer in layers.items():
                outputs = fisher.weights[name] if self.allocation == "kl" else None
                found = weighted_svd(layer.weight, outputs, calibration.value(name, Gram)).losses().cpu()
                losses[name] = found / 2 if self.allocation == "kl" else found / found[0].clamp_min(1e-30)
        return Looked({name: fisher.weights[name] for name in layers}, losses)

    def decide(self, looked: Looked | None, shapes: Mapping[str, tuple[int, int]]) -> Decisions:
        """Ranks of all layers of the step. looked: the survey of every block, None where none was needed."""
        losses = looked.losses if looked else {}
        layers = {name: Layer(*shape, losses.get(name)) for name, shape in shapes.items()}
        form, multiple = self.form == "pivoted", self.rank_multiple
        if self.allocation == "uniform":
            ranks = self._uniform(layers)
        elif self.allocation == "svd_llm2":
            ranks = rank_allocation.svd_llm2(layers, self.keep, form, multiple)
        else:
            ranks = rank_allocation.cheapest(layers, self.keep, form, multiple, self.floor)
        return Decisions(looked.fisher if looked else {}, ranks)

    def needs(self) -> set[type[Statistic]]:
        """What the metric of the inputs is made of."""
        return METRICS[self.metric]

    def reshape(self, model: nn.Module, calibration: Calibration, decisions: Decisions) -> dict[str, Any]:
        """Replace the linears that `calibration` has; `loss` of the report is the share that is lost in the metric."""
        report: dict[str, Any] = {}
        for name, layer in linears(model).items():
            if name not in calibration:
                continue
            if hadamard_of(layer):
                raise ModelError(f"{name}: its input is rotated, which factors are not; put rotate after svd.")
            rank = decisions.ranks[name]
            if rank is None:
                layer.weight = nn.Parameter(_bf16(layer.weight.detach()), layer.weight.requires_grad)
                report[name] = {"kept": "as many weights as a low rank would have"}
                continue
            found = self._decompose(layer, name, calibration, decisions)
            model.set_submodule(name, self._module(layer, *found.factors(rank)))
            losses = found.losses()
            report[name] = {"rank": rank, "loss": round((losses[rank] / losses[0].clamp_min(1e-30)).item(), 6)}
        return report

    def _decompose(self, layer: nn.Linear, name: str, calibration: Calibration, decisions: Decisions) -> Decomposition:
        weight = layer.weight.detach()
        outputs = decisions.fisher[name] if self.metric in ("fwsvd", "fisher") else None
        if self.metric == "asvd":
            return weighted_svd(weight, None, calibration.value(name, ChannelAbsMean).double().pow(2 * self.alpha))
        if self.metric in ("plain", "fwsvd"):
            return weighted_svd(weight, outputs)
        gram = calibration.value(name, Gram)
        if self.sequential:
            weight = shifted(weight, calibration.value(name, CrossGram), gram, self.damping)
        return weighted_svd(weight, outputs, gram)

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
