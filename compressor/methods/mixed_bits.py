"""Mixed bits: each group of layers in the format that the budget allows and the model needs. Quantize does the rest.

What an error costs is sensitivity.py, the integer program is allocation.py, rounding and packing are the Quantize of
the chosen format. Linears that read one input take one format, because a runtime merges q/k/v and gate/up into one
matrix. See docs/mixed_bits.md for the equation and the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from torch import nn

from compressor.allocation import Allocation, Choice, Table, allocate
from compressor.calibrate import Calibration
from compressor.errors import RecipeError
from compressor.layers import Packed, build
from compressor.methods.guard import EIGHT_BIT_NOISE, input_cost
from compressor.methods.quantize import PAIRS, WEIGHT_ONLY, LayerPlan, Placement, Quantize
from compressor.sensitivity import Fisher, costs
from compressor.statistics import BlockNoise, ChannelSquare, Statistic

Format = Literal["nvfp4", "mxfp4", "int1", "int2", "int3", "int4", "int8", "fp8"]
MEGABYTE = 1_000_000
# Of an activation rule, in terms of E2M1's in blocks of 16.
INPUT_NOISE = {"none": 0.0, "nvfp4": 1.0, "mxfp4": 1.0, "int8": EIGHT_BIT_NOISE, "fp8": EIGHT_BIT_NOISE}


# What GPTQ leaves of the KL that rounding to nearest costs: 0.66 for NVFP4, 0.52 for INT4 (docs/gptq.md). Formats are
# compared to nearest, and this weighs them against what GPTQ does not touch: tables and rounded inputs.
GPTQ_SHARE = 0.6


@dataclass(frozen=True)
class Decision:
    """The format of every layer of a step, and the allocation that led to it, by site."""

    formats: dict[str, str]  # layer -> format; a layer that no format fits has the first choice, which says why
    allocation: Allocation
    sites: dict[str, tuple[str, ...]]  # group of the allocation -> the linears in it
    tables: dict[str, Table] = field(default_factory=dict)  # that take part, each a group of its own

    @property
    def table_formats(self) -> dict[str, str]:
        return {name: self.allocation.choices[name] for name in self.tables}

    def report(self) -> dict[str, object]:
        """For the manifest: what was chosen, and what storing every site the same way would have given."""
        return {
            "summary": self.allocation.sentence(),
            "size_bytes": self.allocation.size_bytes,
            "budget_bytes": self.allocation.budget_bytes,
            "formats": dict(sorted(self.formats.items())),
            "tables": {
                name: {
                    "format": self.allocation.choices[name],
                    "size_bytes": {c.name: c.size_bytes for c in table.choices},
                    "cost": {c.name: round(c.cost, 9) for c in table.choices},
                }
                for name, table in self.tables.items()
            },
        }


@dataclass(frozen=True)
class MixedBits:
    """`bits` (a weight, scales counted) or `size_mb` (10^6 bytes): the budget of all the step's layers together.

    Token tables that are `auto` in the recipe are among them, those with a format of their own are not.

    activations: `match` rounds them to the format of the weights where a runtime pairs the two, else not.
    group_size is for the integer formats that take groups; the other options are handed to each format's Quantize.
    """

    bits: float | None = None
    size_mb: float | None = None
    choices: tuple[Format, ...] = ("nvfp4", "int8")
    activations: Literal["none", "match"] = "none"
    sensitivity: Literal["kl", "error"] = "kl"
    group_size: int | None = None
    on_misfit: Literal["smaller", "pad", "keep"] = "smaller"
    scales: Literal["absmax", "mse", "weighted"] = "weighted"
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = 0.01
    sequential: bool = False
    four_over_six: bool = False

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size_mb is None):
            raise ValueError("give one of bits and size_mb, the budget of the step's layers")
        if (budget := self.bits if self.bits is not None else self.size_mb) is not None and not 0 < budget < math.inf:
            raise ValueError(f"{'bits' if self.bits is not None else 'size_mb'} is {budget}; allowed: more than 0")
        if len(self.choices) < 2 or len({*self.choices}) < len(self.choices):
            raise ValueError(
                f"choices are {', '.join(self.choices) or 'empty'}; allowed: two or more different formats"
            )
        if unknown := [c for c in self.choices if c not in PAIRS]:
            raise ValueError(f"choices has '{unknown[0]}'; allowed: {', '.join(PAIRS)}")
        if self.group_size is not None and not any(self._takes_groups(c) for c in self.choices):
            raise ValueError("group_size is for weight-only integer formats, and choices has none; drop it")
        if self.four_over_six and self._activations("nvfp4") != "nvfp4":
            raise ValueError("four_over_six needs nvfp4 among the choices and activations: match")
        self._methods()  # each checks its own options

    def needs(self) -> set[type[Statistic]]:
        """What any of the formats needs."""
        return {ChannelSquare}.union(*(method.needs() for method in self._methods().values()))

    def survey_needs(self) -> set[type[Statistic]]:
        """Channel squares weight the errors that the formats are compared by; block noise is that of rounded inputs."""
        return {ChannelSquare} if self.activations == "none" else {ChannelSquare, BlockNoise}

    def place(self, out_features: int, in_features: int) -> Placement:
        """A layer before the budget is shared out: as large as the budget's average, within what its formats allow.

        With size_mb that average is known to `place_all` only, and this is the layer at its smallest.
        """
        placed = {c: m.place(out_features, in_features) for c, m in self._methods().items()}
        fitting = [c for c, p in placed.items() if p.kept is None]
        if not fitting:
            return next(iter(placed.values()))
        sizes = self._sizes(out_features, in_features)
        share = int((self.bits or 0) * out_features * in_features / 8)
        note = f"one of {', '.join(fitting)}"
        if absent := [f"not {c}, {p.kept}" for c, p in placed.items() if p.kept]:
            note += f" ({'; '.join(absent)})"
        return Placement("mixed", size_bytes=min(max(share, min(sizes)), max(sizes)), note=note)

    def _sizes(self, out_features: int, in_features: int) -> list[int]:
        """Bytes of a layer in each format that fits it."""
        placed = [method.place(out_features, in_features) for method in self._methods().values()]
        return [place.size_bytes for place in placed if place.kept is None]

    def place_all(
        self, shapes: Mapping[str, tuple[int, int]], tables: Mapping[str, Table] = MappingProxyType({})
    ) -> dict[str, Placement]:
        """`place` of all the step's layers and `tables`, with the budget shared out.

        Each gets the same share of what lies between its smallest and its largest format. Raises RecipeError when the
        smallest are too much.
        """
        placed = {name: self.place(*shape) for name, shape in shapes.items()}
        sizes = {name: self._sizes(*shape) for name, shape in shapes.items() if placed[name].kept is None}
        weights = sum(math.prod(shapes[name]) for name in sizes)
        for name, table in tables.items():
            placed[name] = Placement("mixed", note=f"one of {', '.join(c.name for c in table.choices)}")
            sizes[name] = [c.size_bytes for c in table.choices]
            weights += math.prod(table.shape)
        least, most = (sum(end(found) for found in sizes.values()) for end in (min, max))
        room = min(self._budget(weights, least, bool(tables)), most) - least
        for name, found in sizes.items():
            share = room * (max(found) - min(found)) // max(most - least, 1)
            placed[name] = replace(placed[name], size_bytes=min(found) + share)
        return placed

    def survey(
        self,
        layers: Mapping[str, nn.Linear],
        calibration: Calibration | None,
        fisher: Fisher | None = None,
        tables: Mapping[str, Table] = MappingProxyType({}),
    ) -> Decision:
        """Round every layer to nearest in every format, weigh the errors, share out the budget.

        fisher: of the layers, for sensitivity kl. Without calibration each layer is a site of its own and
        channels weigh the same. A layer without any format that fits is not counted. tables: those that take part,
        with costs in the same unit. Raises RecipeError when the
        budget is too small, or `fisher` is missing.
        """
        if self.sensitivity == "kl" and fisher is None:
            raise RecipeError("mixed_bits: sensitivity: kl needs the model's gradients; give sensitivity: error.")
        nearest = {
            c: replace(m, rounding="nearest", activations="none", four_over_six=False)
            for c, m in self._methods().items()
        }
        planned = {choice: method.plan(layers, calibration) for choice, method in nearest.items()}
        sites = _sites(layers, calibration)
        left = GPTQ_SHARE if self.rounding == "gptq" else 1.0
        groups: dict[str, list[Choice]] = {}
        for group, names in sites.items():
            totals: dict[str, tuple[int, float]] = {}
            for name in names:
                weighed = _weigh(name, layers[name], nearest, planned, calibration, fisher)
                inputs = 0.0
                if self.activations == "match" and calibration is not None and calibration.seen(name):
                    inputs, _ = input_cost(name, layers[name], calibration, fisher)
                for choice, (size, cost) in weighed.items():
                    before = totals.get(choice, (0, 0.0))
                    share = INPUT_NOISE[self._activations(choice)]
                    totals[choice] = (before[0] + size, before[1] + left * cost + share * inputs)
            if totals:
                groups[group] = [Choice(choice, *total) for choice, total in totals.items()]
        weights = sum(layers[name].weight.numel() for group in groups for name in sites[group])
        weights += sum(math.prod(table.shape) for table in tables.values())
        groups |= {name: [*table.choices] for name, table in tables.items()}
        least = sum(min(c.size_bytes for c in options) for options in groups.values())
        allocation = allocate(groups, self._budget(weights, least, bool(tables)), tables)
        first = self.choices[0]
        formats = {n: allocation.choices.get(group, first) for group, names in sites.items() for n in names}
        return Decision(formats, allocation, sites, dict(tables))

    def plan(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration | None, decision: Decision
    ) -> dict[str, LayerPlan]:
        """The plan that the Quantize of each layer's format makes."""
        plans: dict[str, LayerPlan] = {}
        for choice, method in self._methods().items():
            plans |= method.plan({n: m for n, m in layers.items() if decision.formats[n] == choice}, calibration)
        return {name: plans[name] for name in layers}

    def apply(self, layer: nn.Linear, plan: LayerPlan) -> Packed:
        """Pack one linear as the Quantize of its format does."""
        assert plan.placement.format is not None, "a layer that is kept has no packed form"
        return self._methods()[plan.placement.format].apply(layer, plan)

    def _budget(self, weights: int, least: int, tables: bool) -> int:
        """Bytes for `weights` weights, whose smallest formats take `least`. Raises RecipeError when that is more."""
        exact = self.bits * weights / 8 if self.bits is not None else (self.size_mb or 0.0) * MEGABYTE
        if least <= (budget := math.floor(exact)):
            return budget
        smallest = least * 8 / weights if self.bits is not None else least / MEGABYTE
        option, given = ("bits", self.bits) if self.bits is not None else ("size_mb", self.size_mb)
        what = "these layers and the tables that are auto" if tables else "these layers"
        raise RecipeError(
            f"mixed_bits: {option} is {given:g}, but the smallest that {', '.join(self.choices)} can give {what} "
            f"is {math.ceil(smallest * 1000) / 1000:g}; raise {option} or add a smaller format to choices."
        )

    def _methods(self) -> dict[str, Quantize]:
        return {
            choice: Quantize(
                choice,
                self._activations(choice),  # type: ignore[arg-type]
                self.group_size if self._takes_groups(choice) else None,
                self.on_misfit,
                self.scales,
                self.rounding,
                self.damping,
                self.sequential,
                self.four_over_six and choice == "nvfp4",
            )
            for choice in self.choices
        }

    def _activations(self, choice: str) -> str:
        return (
            choice
            if self.activations == "match" and choice in self.choices and choice in PAIRS[choice]
            else WEIGHT_ONLY
        )

    def _takes_groups(self, choice: str) -> bool:
        return choice.startswith("int") and self._activations(choice) == WEIGHT_ONLY


def _weigh(
    name: str,
    layer: nn.Linear,
    methods: Mapping[str, Quantize],
    planned: Mapping[str, Mapping[str, LayerPlan]],
    calibration: Calibration | None,
    fisher: Fisher | None,
) -> dict[str, tuple[int, float]]:
    """(size_bytes, cost) of the layer in every format that fits it; one decoded weight is in memory at a time."""
    seen = calibration is not None and calibration.seen(name)
    importance = calibration.value(name, ChannelSquare) if calibration is not None and seen else None
    found = {}
    for choice, method in methods.items():
        plan = planned[choice][name]
        if plan.placement.kept is None:
            decoded = build(method.apply(layer, plan)).dequantize()[:, : layer.in_features]
            cost = costs(layer.weight, {choice: decoded}, importance, fisher.weights[name] if fisher else None)[choice]
            found[choice] = (plan.placement.size_bytes, cost)
    return found


def _sites(layers: Mapping[str, nn.Linear], calibration: Calibration | None) -> dict[str, tuple[str, ...]]:
    """The linears that take one format, by the name of the first of them."""
    known = calibration.sites if calibration is not None else []
    shared = [tuple(n for n in site.names if n in layers) for site in known]
    together = {n for names in shared for n in names}
    return {names[0]: names for names in [*shared, *((n,) for n in layers if n not in together)] if names}
