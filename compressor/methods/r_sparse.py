"""R-Sparse: linears that do not read the weights of small inputs. See docs/r_sparse.md.

Nothing is trained and no weight is removed: a SparseLinear holds a threshold a channel, and what it skips depends on
the token. Later steps quantize its `inner` linear, and its pair, like any other. What is left out and what that costs
is sparsity.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compressor import sparsity
from compressor.calibrate import Calibration, calibrate_blocks
from compressor.errors import ModelError
from compressor.layers import hadamard_of
from compressor.model import linears
from compressor.run import Run
from compressor.sensitivity import Fisher
from compressor.sparse import SparseLinear
from compressor.sparsity import Activations, Choices
from compressor.sparsity_trial import Build, evolved, greedy_blocks, settle
from compressor.statistics import Statistic

SETTLE_WINDOWS = 16  # of the calibration's
QUANTILES = 4096  # of a layer's activations, that trials take thresholds from: within 1 / 4096 of what is left out


@dataclass(frozen=True)
class Decisions:
    fisher: Mapping[str, Tensor]
    choices: Mapping[str, Choices]


@dataclass(frozen=True)
class RSparse:
    """`sparsity` is the share of the targeted linears' weights that a token does not read, all layers together.

    start            the allocation that greedy (each block's share) or evolutionary (each layer's) begins with
    search_windows   of the calibration's, that their trials run
    population, generations   of evolutionary, which calls the model for each of its trials (sparsity_search.py)
    """

    sequential: ClassVar[bool] = False

    sparsity: float = 0.5
    score: Literal["magnitude", "columns", "fisher"] = "columns"
    allocation: Literal["uniform", "kl", "greedy", "evolutionary"] = "kl"
    alpha: float | None = 1.0  # share of what is read that is columns and not a pair; null: of each layer the best
    tokens: Literal["decode", "all"] = "decode"
    start: Literal["uniform", "kl"] = "kl"
    search_windows: int = 2
    population: int = 16
    generations: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= sparsity.LEVELS[-1]:
            raise ValueError(f"sparsity {self.sparsity:g} must be from 0 to {sparsity.LEVELS[-1]:g}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha:g} is not a share; give a number from 0 to 1, or null")
        if self.alpha is None and self._first == "uniform":
            name = "allocation" if self.allocation == "uniform" else "start"
            raise ValueError(f"alpha: null is chosen with the sparsities; set {name}: kl, or give a number")
        for name in ("search_windows", "population", "generations"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} {value} must be 1 or more")

    @property
    def _first(self) -> str:
        """The allocation that needs no trial."""
        return self.allocation if self.allocation in ("uniform", "kl") else self.start

    @property
    def sensitivity(self) -> Literal["error", "kl"]:
        return "kl" if self._first == "kl" or self.score == "fisher" else "error"

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """SparseLinears, all of the same sparsity."""
        layers = linears(model)
        for name in names:
            n, k = layers[name].weight.shape
            rank = sparsity.rank_of((n, k), Choices(1.0 if self.alpha is None else self.alpha, self.sparsity))
            bias = layers[name].bias is not None
            model.set_submodule(name, SparseLinear.shaped(n, k, self.tokens, bias=bias, rank=rank))

    def survey_needs(self) -> set[type[Statistic]]:
        return {Activations} if self._first == "kl" else set()

    def survey(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None
    ) -> dict[str, dict[Choices, float]]:
        """What every choice costs the layers of one block."""
        assert fisher is not None
        alphas = sparsity.ALPHAS if self.alpha is None else (self.alpha,)
        found = {}
        for name, layer in layers.items():
            weight, outputs = layer.weight.detach().float(), fisher.inputs[name]
            x = sparsity.usual(calibration.value(name, Activations).to(weight.device))
            c = sparsity.scores(weight, self.score, outputs)
            found[name] = sparsity.losses(weight, x, c, outputs, alphas)
        return found

    def decide(
        self,
        tables: Mapping[str, dict[Choices, float]],
        shapes: Mapping[str, tuple[int, int]],
        fisher: Fisher | None,
    ) -> Decisions:
        """(alpha, sparsity) of all layers of the step."""
        inputs = {} if fisher is None else fisher.inputs
        if self._first == "kl":
            return Decisions(inputs, sparsity.share_out(tables, shapes, self.sparsity))
        assert self.alpha is not None
        return Decisions(inputs, dict.fromkeys(shapes, Choices(self.alpha, self.sparsity)))

    def search(
        self, model: nn.Module, names: Collection[str], decisions: Decisions, run: Run, generator: torch.Generator
    ) -> Decisions:
        """The choices that trials of the model find better; the same where the allocation needs none."""
        if self._first == self.allocation or not names:
            return decisions
        build = self._builder(model, names, decisions, run)
        sizes = {n: m.weight.numel() for n, m in linears(model).items() if n in names}
        windows = run.windows[: self.search_windows]
        if self.allocation == "greedy":
            return replace(decisions, choices=greedy_blocks(model, decisions.choices, sizes, build, windows, run))
        found = evolved(
            model, decisions.choices, sizes, build, windows, run, generator, self.population, self.generations,
            self.alpha is None,
        )  # fmt: skip
        return replace(decisions, choices=found)

    def _builder(self, model: nn.Module, names: Collection[str], decisions: Decisions, run: Run) -> Build:
        """Layers by their choice, without their activations: of those, QUANTILES are kept."""
        layers, known = linears(model), {}
        pairs: dict[str, tuple[Tensor, Tensor]] = {}

        def note(part: Calibration) -> None:
            for name in (n for n in names if n in part):
                order, c = self._ranked(layers[name], name, part, decisions)
                places = torch.linspace(0, len(order) - 1, min(len(order), QUANTILES)).round().long()
                known[name] = order[places.to(order.device)].cpu(), c.cpu()

        calibrate_blocks(model, run.windows, self.needs(), note, names, run.progress, run.device, run.dtype)

        def build(name: str, choice: Choices) -> SparseLinear:
            layer, (order, c) = layers[name], known[name]
            shape: tuple[int, int] = tuple(layer.weight.shape)  # type: ignore[assignment]
            threshold = sparsity.thresholds(order, c, 1 - (1 - choice.sparsity) * choice.alpha).to(layer.weight.device)
            if not (rank := sparsity.rank_of(shape, choice)):
                return _sparse(layer, threshold, self.tokens, None, None)
            if name not in pairs:  # of the highest rank that any choice has: the others are parts of it
                most = sparsity.rank_of(shape, Choices(0.0, 0.0))
                a, b = sparsity.pair(layer.weight.detach().float(), most)
                pairs[name] = a.bfloat16(), b.bfloat16()
            a, b = pairs[name]
            return _sparse(layer, threshold, self.tokens, a[:, :rank], b[:rank])

        return build

    def _ranked(
        self, layer: nn.Linear, name: str, calibration: Calibration, decisions: Decisions
    ) -> tuple[Tensor, Tensor]:
        """What thresholds are taken from: |x_j| c_j ascending, and c [K]."""
        weight = layer.weight.detach().float()
        x = sparsity.usual(calibration.value(name, Activations).to(weight.device))
        c = sparsity.scores(weight, self.score, decisions.fisher.get(name))
        return sparsity.ranked(x, c), c

    def needs(self) -> set[type[Statistic]]:
        return {Activations}

    def reshape(self, model: nn.Module, calibration: Calibration, decisions: Decisions) -> dict[str, Any]:
        """Put the linears that `calibration` has into SparseLinears."""
        report: dict[str, Any] = {}
        for name, layer in linears(model).items():
            if name not in calibration:
                continue
            if hadamard_of(layer):
                raise ModelError(f"{name}: its input is rotated, and the threshold is not; put rotate after r_sparse.")
            choice = decisions.choices[name]
            weight = layer.weight.detach().float()
            order, c = self._ranked(layer, name, calibration, decisions)
            threshold = sparsity.thresholds(order, c, 1 - (1 - choice.sparsity) * choice.alpha)
            rank = sparsity.rank_of(tuple(weight.shape), choice)  # type: ignore[arg-type]
            a, b = sparsity.pair(weight, rank) if rank else (None, None)
            model.set_submodule(name, _sparse(layer, threshold, self.tokens, a, b))
            report[name] = {"sparsity": choice.sparsity, "alpha": choice.alpha, "rank": rank}
        return report

    def settle(self, model: nn.Module, names: Collection[str], decisions: Decisions, run: Run) -> None:
        """Thresholds that leave out what was asked, in the model that leaves things out."""
        wanted = {n: 1 - (1 - c.sparsity) * c.alpha for n, c in decisions.choices.items() if n in names}
        settle(model, wanted, run.windows[:SETTLE_WINDOWS], run)


def _sparse(layer: nn.Linear, threshold: Tensor, tokens: str, a: Tensor | None, b: Tensor | None) -> SparseLinear:
    """A [N, R], B [R, K] of what is left out, or None; all in values that bf16 holds."""
    inner = nn.Linear(1, 1, device="meta")
    inner.out_features, inner.in_features = layer.weight.shape
    inner.bias = layer.bias
    down = up = None
    weight = layer.weight.detach()
    if a is not None and b is not None:
        down, up = _factor(b), _factor(a)
        weight = weight - (up.weight @ down.weight).to(weight.dtype)
    inner.weight = nn.Parameter(weight.to(torch.bfloat16).to(layer.weight.dtype), False)
    return SparseLinear(inner, threshold, tokens, down, up)


def _factor(weight: Tensor) -> nn.Linear:
    made = nn.Linear(1, 1, False, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.to(torch.bfloat16).float(), False)
    return made
