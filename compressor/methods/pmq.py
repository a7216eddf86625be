"""PMQ: each expert in the width that the budget allows and its significance asks for. Quantize does the rest.

    minimise  Σ_e Σ_b  cost_eb x_eb    subject to  Σ_e Σ_b size_b x_eb <= budget,  Σ_b x_eb = 1,  x_eb in {0, 1}

    significance: pmq   cost_eb = φ_e^α w_e^β ε_eb^γ     φ how often e is chosen, w its share of the router's scores,
                                                         ε_eb = ‖the layer's output, without and with e at b bits‖
    significance: kl    cost_eb = the KL in nats that rounding e to b bits costs (sensitivity.py)

Source: Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More", ICLR 2025, section 3.2. What differs
here and what it is worth is docs/moe.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from compressor.allocation import Choice, allocate
from compressor.calibrate import Calibration
from compressor.errors import ModelError, NumericsError, RecipeError
from compressor.knapsack import exact
from compressor.layers import Packed, build
from compressor.methods.quantize import LayerPlan, Placement, Quantize
from compressor.mixtures import ExpertUse
from compressor.sensitivity import Fisher, costs
from compressor.statistics import ChannelSquare, Statistic, TokenSample

WIDTHS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Layer:
    """One layer of experts: `bits` [E] chosen, `counts` [E] of the tokens that chose each."""

    bits: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Decision:
    """The width of every expert. bits_per_weight: without and with scales, over all experts of the step."""

    widths: dict[str, int]  # linear -> bits
    layers: dict[str, Layer]
    bits_per_weight: tuple[float, float]
    cost: float
    uniform: dict[str, float]  # of all experts at one width
    uneven: int  # experts whose error did not fall with every bit, and was taken to
    exact: bool  # whether dynamic programming found the same cost; False: too large a program for that

    def report(self) -> dict[str, Any]:
        codes, stored = self.bits_per_weight
        every = [bits for layer in self.layers.values() for bits in layer.bits]
        counts = ", ".join(f"{every.count(b)} of {b} bit{'s' if b > 1 else ''}" for b in sorted({*every}))
        idle = [f"{n}.{e}" for n, layer in self.layers.items() for e, count in enumerate(layer.counts) if not count]
        others = "".join(f"; all {name}: {cost:.4g}" for name, cost in self.uniform.items())
        summary = (
            f"experts: {counts}; {codes:.3f} bits a weight, {stored:.3f} with scales; cost {self.cost:.4g}{others}"
        )
        if idle:
            summary += f"; {len(idle)} experts no token chose, such as {idle[0]}, rounded by what the others see"
        return {
            "summary": summary,
            "bits_per_weight": {"codes": round(codes, 4), "stored": round(stored, 4)},
            "cost": self.cost,
            "uneven": self.uneven,
            "checked_by_dynamic_programming": self.exact,
            "unchosen": idle,
            "experts": {n: {"bits": layer.bits, "tokens": layer.counts} for n, layer in self.layers.items()},
        }


@dataclass(frozen=True)
class PMQ:
    """`bits` a weight on average over the step's experts; count: whether scales are part of it.

    scope: the budget holds for each layer by itself, or for all together, in which case the costs of `pmq` are relative
    to what the layer's widest choice costs, for ε grows with depth. uniform: what has one width: an expert, or for
    servers that read one width a layer, all experts of a layer.
    """

    bits: float = 2.5
    choices: tuple[int, ...] = (2, 3)
    count: Literal["codes", "stored"] = "codes"
    scope: Literal["layer", "global"] = "global"
    significance: Literal["kl", "pmq", "random"] = "kl"  # random: for comparison
    seed: int = 0  # of random
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 1.0
    group_size: int | None = 128
    on_misfit: Literal["smaller", "pad", "keep"] = "smaller"
    scales: Literal["absmax", "mse", "weighted"] = "weighted"
    rounding: Literal["nearest", "gptq"] = "gptq"
    damping: float = 0.01
    sequential: bool = False
    uniform: Literal["expert", "layer"] = "expert"

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or len({*self.choices}) < len(self.choices):
            raise ValueError(f"choices are {[*self.choices]}; allowed: two or more different widths")
        if unknown := [b for b in self.choices if b not in WIDTHS]:
            raise ValueError(f"choices has {unknown[0]}; allowed: {', '.join(map(str, WIDTHS))}")
        if not min(self.choices) <= self.bits <= max(self.choices) + (self.count == "stored"):
            raise ValueError(f"bits is {self.bits:g}; allowed: {min(self.choices)} to {max(self.choices)}, the choices")
        if self.uniform == "layer" and self.scope == "layer":
            raise ValueError("uniform is 'layer', which is one choice for each layer's budget; allowed: scope global")
        self._methods()  # each checks its own options

    @property
    def sensitivity(self) -> str:
        """What the pipeline asks every method that surveys: whether it needs gradients."""
        return "kl" if self.significance == "kl" else "error"

    def needs(self) -> set[type[Statistic]]:
        return set().union(*(method.needs() for method in self._methods().values()))

    def survey_needs(self) -> set[type[Statistic]]:
        return {ChannelSquare} | ({TokenSample} if self.significance == "pmq" else set())

    def place(self, out_features: int, in_features: int) -> Placement:
        """A linear before the budget is shared out: at the average, with the scales of any width."""
        placed = [method.place(out_features, in_features) for method in self._methods().values()]
        if kept := next((p for p in placed if p.kept is not None), None):
            return kept
        weights = out_features * in_features
        codes = placed[0].size_bytes - min(self.choices) * weights // 8 if self.count == "codes" else 0
        size = math.floor(self.bits * weights / 8) + codes
        note = f"one of {', '.join(f'{b} bits' for b in sorted(self.choices))}"
        return Placement("mixed", placed[0].group_size, placed[0].padding, None, size, note)

    def survey(self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None) -> Decision:
        """Round every expert to nearest in every width, weigh the errors, share out the budget.

        Raises RecipeError when a linear of the step is no expert's, or the budget is too small.
        """
        owners = {name: view for view in calibration.uses.values() for name in _names(view)}
        if strange := [name for name in layers if name not in owners]:
            raise RecipeError(
                f"pmq: {strange[0]} is no linear of an expert that a router chooses; set targets: "
                f'["*.experts.*"], and store the rest by a step of its own.'
            )
        nearest = {b: replace(method, rounding="nearest") for b, method in self._methods().items()}
        groups: dict[str, dict[str, list[Choice]]] = {}
        sizes: dict[str, dict[int, tuple[int, int]]] = {}
        uneven = 0
        for name, use in calibration.uses.items():
            if not any(n in layers for n in _names(use)):
                continue
            if use.unknown:
                raise ModelError(use.unknown)
            weighed = [self._weigh(e, use, layers, calibration, fisher, nearest) for e in range(len(use.view))]
            # Of no use to a program: a width that is worse than a smaller one.
            falling = [torch.tensor([row[b] for b in self._order()]).cummin(0)[0].tolist() for row in weighed]
            uneven += sum(f != [row[b] for b in self._order()] for f, row in zip(falling, weighed, strict=True))
            scale = sum(row[-1] for row in falling) if self.significance == "pmq" and self.scope == "global" else 1.0
            groups[name] = {}
            for e, row in enumerate(falling):
                found = {b: _bytes(use, e, layers, nearest[b]) for b in self._order()}
                sizes[f"{name}.{e}"] = found
                groups[name][f"{name}.{e}"] = [
                    Choice(str(b), found[b][self.count == "stored"], cost / (scale or 1.0))
                    for b, cost in zip(self._order(), row, strict=True)
                ]
        return self._decide(groups, sizes, layers, calibration.uses, uneven)

    def _decide(
        self,
        groups: Mapping[str, dict[str, list[Choice]]],
        sizes: Mapping[str, dict[int, tuple[int, int]]],
        layers: Mapping[str, nn.Linear],
        uses: Mapping[str, ExpertUse],
        uneven: int,
    ) -> Decision:
        together = {"": {n: c for own in groups.values() for n, c in own.items()}}
        measured = sizes
        if self.uniform == "layer":
            together = {"": {name: _joined(own) for name, own in groups.items()}}
            measured = {name: _total([sizes[n] for n in own]) for name, own in groups.items()}
        chosen: dict[str, int] = {}
        checked, cost, uniform = True, 0.0, dict.fromkeys((f"{b} bit" for b in self._order()), 0.0)
        for part in (groups if self.scope == "layer" else together).values():
            weights = sum(8 * measured[n][b][0] // b for n in part for b in self._order()[:1])
            budget = math.floor(self.bits * weights / 8)
            found = allocate(part, budget)
            names, best = found.choices, found.cost
            if (other := exact(part, budget)) is None:
                checked = False
            else:
                least = math.fsum(next(c.cost for c in part[n] if c.name == other[n]) for n in part)
                if best - least > 1e-5 * max(abs(least), 1e-30):
                    raise NumericsError(f"pmq: the solver's cost is {best:.6g}, dynamic programming's {least:.6g}.")
                names, best = other, min(best, least)
            cost += best
            chosen |= {n: int(names[n]) for n in part}
            for name in uniform:
                same = [next(c.cost for c in options if f"{c.name} bit" == name) for options in part.values()]
                uniform[name] += math.fsum(same)
        if self.uniform == "layer":
            chosen = {n: chosen[name] for name, own in groups.items() for n in own}
        weights = sum(8 * found[b][0] // b for found in sizes.values() for b in self._order()[:1])
        bits = tuple(8 * sum(sizes[n][b][i] for n, b in chosen.items()) / max(1, weights) for i in (0, 1))
        own = {
            name: Layer([chosen[f"{name}.{e}"] for e in range(len(uses[name].view))], uses[name].counts.tolist())
            for name in groups
        }
        widths = {
            n: chosen[f"{name}.{e}"]
            for name in groups
            for e in range(len(uses[name].view))
            for n in uses[name].view.linears(e)
            if n in layers
        }
        return Decision(widths, own, (bits[0], bits[1]), cost, uniform, uneven, checked)

    def _weigh(
        self,
        expert: int,
        use: ExpertUse,
        layers: Mapping[str, nn.Linear],
        calibration: Calibration,
        fisher: Fisher | None,
        methods: Mapping[int, Quantize],
    ) -> dict[int, float]:
        """What each width costs of one expert."""
        names = [n for n in use.view.linears(expert) if n in layers]
        own = {n: layers[n] for n in names}
        if self.significance == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {names[0]}".encode()))
            drawn = torch.rand(1, generator=generator).item()
            return {b: drawn * 4.0**-b for b in methods}
        seen = calibration.seen(names[0])
        rounded = {}
        for b, method in methods.items():
            plans = method.plan(own, calibration if seen else None)
            rounded[b] = {n: build(method.apply(own[n], plans[n])).dequantize()[:, : own[n].in_features] for n in names}
        if self.significance == "kl":
            assert fisher is not None
            squares = {n: calibration.value(n, ChannelSquare) if seen else None for n in names}
            return {
                b: sum(costs(own[n].weight, {"": w[n]}, squares[n], fisher.weights[n])[""] for n in names)
                for b, w in rounded.items()
            }
        chosen = int(use.counts[expert])
        if not chosen:
            return dict.fromkeys(methods, 0.0)
        frequency = chosen / max(1, int(use.counts.sum()))
        share = (use.scores[expert] / use.scores.sum()).item()
        x = calibration.value(names[0], TokenSample)
        errors = {b: use.view.error(expert, x, w).sum().sqrt().item() for b, w in rounded.items()}
        weight = math.sqrt(use.squares[expert].item())  # of all its tokens, so that ε is the layer's
        return {
            b: frequency**self.alpha * share**self.beta * (weight * error) ** self.gamma for b, error in errors.items()
        }

    def plan(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration, decision: Decision
    ) -> dict[str, LayerPlan]:
        """The plan that the Quantize of each expert's width makes."""
        plans: dict[str, LayerPlan] = {}
        for b, method in self._methods().items():
            plans |= method.plan({n: m for n, m in layers.items() if decision.widths[n] == b}, calibration)
        return {name: plans[name] for name in layers}

    def apply(self, layer: nn.Linear, plan: LayerPlan) -> Packed:
        """Pack one linear as the Quantize of its width does."""
        assert plan.placement.format is not None, "a layer that is kept has no packed form"
        return self._methods()[int(plan.placement.format.removeprefix("int"))].apply(layer, plan)

    def _order(self) -> list[int]:
        return sorted(self.choices)

    def _methods(self) -> dict[int, Quantize]:
        return {
            b: Quantize(
                f"int{b}",  # type: ignore[arg-type]
                "none",
                self.group_size,
                self.on_misfit,
                self.scales,
                self.rounding,
                self.damping,
                self.sequential,
            )
            for b in self._order()
        }


def _joined(experts: Mapping[str, list[Choice]]) -> list[Choice]:
    """Experts that must have one width, as one group."""
    return [
        Choice(same[0].name, sum(c.size_bytes for c in same), math.fsum(c.cost for c in same))
        for same in zip(*experts.values(), strict=True)
    ]


def _total(experts: list[dict[int, tuple[int, int]]]) -> dict[int, tuple[int, int]]:
    return {b: (sum(e[b][0] for e in experts), sum(e[b][1] for e in experts)) for b in experts[0]}


def _names(use: ExpertUse) -> list[str]:
    return [name for e in range(len(use.view)) for name in use.view.linears(e)]


def _bytes(use: ExpertUse, expert: int, layers: Mapping[str, nn.Linear], method: Quantize) -> tuple[int, int]:
    """Of one expert: its codes, and its codes with their scales."""
    own = [layers[n] for n in use.view.linears(expert) if n in layers]
    placed = [method.place(*layer.weight.shape) for layer in own]
    weights = sum(m.out_features * (m.in_features + p.padding) for m, p in zip(own, placed, strict=True))
    return weights * int(method.weights.removeprefix("int")) // 8, sum(p.size_bytes for p in placed)
