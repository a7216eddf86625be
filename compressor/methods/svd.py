"""SVD: linears of low rank in place of dense ones, best in the metric of what they see. See docs/svd.md.

The factors are ordinary linears in bf16, `….down` and `….up`, which later steps quantize like any other. A layer whose
rank would cost as many weights as it has stays dense. The mathematics is weighted_svd.py, how many ranks each layer
gets is rank_allocation.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor import rank_allocation
from compressor.calibrate import Calibration
from compressor.errors import ModelError, RecipeError
from compressor.layers import hadamard_of
from compressor.lowrank import LowRankLinear
from compressor.model import linears
from compressor.rank_allocation import Decisions, Layer, check_multiple
from compressor.sensitivity import Fisher
from compressor.statistics import ChannelAbsMean, CrossGram, Gram, Statistic
from compressor.weighted_svd import Decomposition, balanced, pivoted, shifted, weighted_svd

TARGETS = ("keep", "parameters", "size_mb", "mflops")
BF16_BYTES, ORDER_BYTES = 2, 8  # of a weight, and of the int64 place of an output in the pivoted form
METRICS: dict[str, set[type[Statistic]]] = {
    "plain": set(),
    "asvd": {ChannelAbsMean},
    "fwsvd": set(),
    "inputs": {Gram},
    "fisher": {Gram},
    "kfac": {Gram},
}


@dataclass(frozen=True)
class SVD:
    """What remains of the targeted linears is `keep` of their weights, or so many `parameters`, or `size_mb` (10^6
    bytes, in bf16), or `mflops` (10^6 a token, two for a weight), all layers of the step together. `alpha` is asvd's.
    """

    keep: float | None = None
    parameters: int | None = None
    size_mb: float | None = None
    mflops: float | None = None
    metric: Literal["plain", "asvd", "fwsvd", "inputs", "fisher", "kfac"] = "inputs"
    alpha: float = 0.5
    allocation: Literal["uniform", "svd_llm2", "relative", "kl"] = "uniform"
    floor: float = 0.25  # of the uniform rank, that relative and kl leave to every layer
    form: Literal["plain", "pivoted"] = "pivoted"
    rank_multiple: int = 16  # of every rank: a group of later formats, a tile of kernels
    sequential: bool = False  # each layer is fitted to what the factors before it give, and makes up for them
    damping: float = 0.01  # of sequential, relative to the mean of diag(C)

    def __post_init__(self) -> None:
        given = {name: value for name in TARGETS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(TARGETS)}, what remains of the step's layers")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep {self.keep:g} is not a share of the weights; give a number between 0 and 1")
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value:g}; allowed: more than 0")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor:g} is not a share; give a number from 0 to 1")
        check_multiple(self.rank_multiple)
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} must be above 0; 0.01 is usual")
        if self.sequential and self.metric not in ("inputs", "fisher", "kfac"):
            raise ValueError(f"sequential needs metric: inputs, fisher or kfac, and metric is '{self.metric}'")

    @property
    def sensitivity(self) -> Literal["error", "kl", "kfac"]:
        """Whether ranks or the metric depend on what errors cost the model, output by output or in all pairs."""
        if self.metric == "kfac":
            return "kfac"
        return "kl" if self.metric in ("fwsvd", "fisher") or self.allocation == "kl" else "error"

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """LowRankLinears of the ranks that the budget gives every layer alike."""
        layers = linears(model)
        shapes = {name: self._layer(*layers[name].weight.shape) for name in names}
        ranks = rank_allocation.uniform(shapes, self._budget(shapes), self.form == "pivoted", self.rank_multiple)
        for name, rank in ranks.items():
            if rank is not None:
                shape = (shapes[name].out_features, shapes[name].in_features, rank)
                bias = layers[name].bias is not None
                model.set_submodule(name, LowRankLinear.shaped(*shape, bias=bias, pivoted=self.form == "pivoted"))

    def _layer(self, out_features: int, in_features: int, losses: Tensor | None = None) -> Layer:
        order = ORDER_BYTES * out_features // BF16_BYTES if self.form == "pivoted" and self.size_mb is not None else 0
        return Layer(out_features, in_features, losses, order)

    def _budget(self, layers: Mapping[str, Layer]) -> int:
        """Weights that remain of the step's layers. Raises RecipeError where that is all of them."""
        dense = sum(layer.dense for layer in layers.values())
        if self.keep is not None:
            return int(self.keep * dense)
        if self.parameters is not None:
            budget = self.parameters
        elif self.size_mb is not None:
            budget = int(self.size_mb * 1e6 / BF16_BYTES)
        else:
            assert self.mflops is not None
            budget = int(self.mflops * 1e6 / 2)
        if budget >= dense:
            raise RecipeError(f"svd: the budget is {budget} weights, and these linears have {dense}; give less.")
        return budget

    def survey_needs(self) -> set[type[Statistic]]:
        """What each rank costs follows from a Gram matrix."""
        return set() if self.allocation == "uniform" else {Gram}

    def survey(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None
    ) -> dict[str, Tensor]:
        """What the layers of one block lose at every rank: in nats for `kl`, else the squared error of the output, for
        `relative` over the squared output."""
        found: dict[str, Tensor] = {}
        for name, layer in layers.items():
            outputs = self._outputs(name, fisher) if self.allocation == "kl" else None
            losses = weighted_svd(layer.weight, outputs, calibration.value(name, Gram)).losses().cpu()
            if self.allocation == "relative":
                losses = losses / losses[0].clamp_min(1e-30)
            found[name] = losses / 2 if self.allocation == "kl" else losses
        return found

    def _outputs(self, name: str, fisher: Fisher | None) -> Tensor:
        assert fisher is not None
        return (fisher.pairs if self.metric == "kfac" else fisher.weights)[name]

    def decide(
        self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], fisher: Fisher | None
    ) -> Decisions:
        """Ranks of all layers of the step. losses: of every layer, none where no survey was needed."""
        layers = {name: self._layer(*shape, losses.get(name)) for name, shape in shapes.items()}
        budget, multiple = self._budget(layers), self.rank_multiple
        if self.allocation == "uniform":
            ranks = rank_allocation.uniform(layers, budget, self.form == "pivoted", multiple)
        elif self.allocation == "svd_llm2":
            ranks = rank_allocation.svd_llm2(layers, budget, self.form == "pivoted", multiple)
        else:
            ranks = rank_allocation.cheapest(layers, budget, self.form == "pivoted", multiple, self.floor)
        weighs = self.metric in ("fwsvd", "fisher", "kfac")
        return Decisions({name: self._outputs(name, fisher) for name in layers if weighs}, ranks)

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
        weight, outputs = layer.weight.detach(), decisions.outputs.get(name)
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
            a, b = balanced(a, b)
            return LowRankLinear(_linear(b, None), _linear(a, bias))
        down, up, order = pivoted(a, b)
        if bias is None:
            return LowRankLinear(_linear(down, None), _linear(up, None), order)
        places = order.argsort()  # of the outputs in (z, up(z))
        first, rest = bias[places[: len(down)]].float(), bias[places[len(down) :]]
        made = LowRankLinear(_linear(down, first), _linear(up, rest), order)
        made.up.bias = nn.Parameter((rest - made.up.weight.double() @ first.double()).float(), False)  # z has `first`
        return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(1, 1, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(_bf16(weight), False)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.float(), False))
    return made


def _bf16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()
