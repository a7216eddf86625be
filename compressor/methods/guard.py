"""Which inputs stay at 8 bits when all the others are rounded to 4: the guards of W4A4.

Rounding the input of a linear y = W x to E2M1 adds noise to y. With e_k the mean squared rounding error of channel k
(statistics.BlockNoise) and F the Fisher information of y (sensitivity.py, `inputs`), what it costs is, to second order,

    KL ≈ ½ Σ_n F_n Σ_k e_k W_nk²      nats a token

and without F, Σ_nk e_k W_nk² / Σ_nk h_k W_nk², the layer's relative output noise. 8 bits leave about 1/16 of it (E4M3
and E2M1 differ by two mantissa bits, and noise goes with the square). Guarding a site costs its share of the model's
multiply-adds; which sites to take for a given share is the same 0/1 program as for mixed bits (allocation.py).

Sources: the fc2 exception of Chen et al. 2025 (arXiv 2505.14302), whose down_proj rule this replaces by measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from compressor.allocation import Choice, allocate
from compressor.calibrate import Calibration
from compressor.sensitivity import Fisher, costs
from compressor.statistics import BlockNoise, ChannelSquare

EIGHT_BIT_NOISE = 1 / 16  # of the noise of 4 bits


@dataclass(frozen=True)
class Guard:
    """A site whose input stays at 8 bits. `cost` is what 4 bits would have cost, `noise` relative to its output."""

    names: tuple[str, ...]
    cost: float
    noise: float
    share: float  # of the multiply-adds of all layers


@dataclass(frozen=True)
class Guards:
    sites: tuple[Guard, ...]
    predicted: tuple[float, float]  # cost of all sites' rounding without and with the guards
    unit: str  # "KL" or "relative output noise"
    total: int  # sites, guarded or not

    @property
    def names(self) -> set[str]:
        return {name for site in self.sites for name in site.names}

    @property
    def share(self) -> float:
        """Of the multiply-adds, at 8 bits."""
        return sum(site.share for site in self.sites)

    def report(self) -> dict[str, object]:
        """For the manifest: how much, and every guarded site with the reason."""
        rows = [
            {"site": [*s.names], "share": round(s.share, 5), "noise": round(s.noise, 5), self.unit: round(s.cost, 6)}
            for s in self.sites
        ]
        before, after = self.predicted
        return {
            "summary": f"{len(self.sites)} of {self.total} inputs keep 8 bits ({self.share:.1%} of the multiply-adds); "
            f"predicted {self.unit} of the rounded inputs {before:.3g} -> {after:.3g}",
            "share_of_multiply_adds": round(self.share, 4),
            "input_bits": round(4 + 4 * self.share, 3),
            f"predicted {self.unit} of rounded inputs": [round(c, 6) for c in self.predicted],
            "sites": rows,
        }


def input_cost(
    name: str, layer: nn.Linear, calibration: Calibration, fisher: Fisher | None
) -> tuple[float, float]:
    """What rounding the input of one linear to 4 bits costs, and its output noise relative to its output.

    The cost is in KL where `fisher` is given, else it is that noise. Needs BlockNoise and ChannelSquare.
    """
    e, h = calibration.value(name, BlockNoise), calibration.value(name, ChannelSquare)
    weight = layer.weight.detach()
    nothing = {"": weight.new_zeros(()).expand(weight.shape)}
    energy = costs(weight, nothing, h, weight.new_ones(len(weight)))[""]
    noise = costs(weight, nothing, e, weight.new_ones(len(weight)))[""] / max(energy, 1e-30)
    return (noise if fisher is None else costs(weight, nothing, e, fisher.inputs[name])[""]), noise


def choose(
    layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None, share: float
) -> Guards:
    """The sites whose guarding saves most for at most `share` of the multiply-adds of `layers`."""
    found: dict[str, Guard] = {}
    total = sum(layer.weight.numel() for layer in layers.values())
    for site in calibration.sites:
        if not (names := tuple(n for n in site.names if n in layers)):
            continue
        parts = [input_cost(name, layers[name], calibration, fisher) for name in names]
        cost, noise = sum(cost for cost, _ in parts), max(noise for _, noise in parts)
        macs = sum(layers[n].weight.numel() for n in names)
        found[names[0]] = Guard(names, cost, noise, macs / total)
    groups = {
        name: [Choice("4", 0, g.cost), Choice("8", round(g.share * total), g.cost * EIGHT_BIT_NOISE)]
        for name, g in found.items()
    }
    chosen = allocate(groups, int(share * total)).choices
    guarded = tuple(g for name, g in found.items() if chosen[name] == "8")
    without = sum(g.cost for g in found.values())
    saved = sum(g.cost for g in guarded) * (1 - EIGHT_BIT_NOISE)
    return Guards(guarded, (without, without - saved), "relative output noise" if fisher is None else "KL", len(found))
