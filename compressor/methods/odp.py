"""ODP: a token's later experts are left out where they weigh little beside its first. See docs/moe.md.

    keep the first j of w_1 >= … >= w_K with w_j >= β w_1

Huang et al. 2025, "Mixture Compressor for Mixture-of-Experts LLMs Gains More" (MC, arXiv 2410.06270), section 3.3,
without the protection of important tokens, which needs the attention of all of them. No training.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.methods.thinning import check_keep, hearing, kept, layers_of, run_through, thinned
from compressor.run import Run

SAMPLE = 1_000_000  # ratios of a layer that a quantile is of


@dataclass(frozen=True)
class ODP:
    """`keep`: the share of the router's choice that calibration tokens keep; of two experts, 0.75 makes β the median of
    w_2 / w_1, as published. scope: `layer`, each keeps that share; `model`, all have one β."""

    keep: float = 0.75
    scope: Literal["layer", "model"] = "layer"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """No linear changes. Raises ModelError for a model without layers of experts."""
        layers_of(model, names)

    @torch.no_grad()
    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        layers = thinned(model, layers_of(model, names), "ratio", self.keep)
        for layer in layers.values():
            layer.rule.beta = nn.Parameter(torch.zeros(1), False)
        ratios: dict[str, list[Tensor]] = {name: [] for name in layers}

        def see(name: str, args: tuple[Tensor, ...], _: Tensor) -> None:
            top = args[1].float()
            ratios[name].append((top[:, 1:] / top[:, :1].clamp_min(1e-30)).cpu())

        if self.keep < 1:
            with hearing(layers, see):
                run_through(model, layers, run.windows, run)
            found = {name: torch.cat(parts) for name, parts in ratios.items()}
            if self.scope == "model":
                found = dict.fromkeys(found, torch.cat([r.flatten() for r in found.values()]))
            for name, layer in layers.items():
                top_k = layer.rule.top_k
                layer.rule.beta.data.fill_(_quantile(found[name].flatten(), (1 - self.keep) * top_k / (top_k - 1)))
        shares = kept(model, layers, run)
        rows = {n: {"beta": round(layer.rule.beta.item(), 4), "kept": shares[n]} for n, layer in layers.items()}
        mean = sum(shares.values()) / len(shares)
        return {"summary": f"{mean:.1%} of {len(rows)} layers' experts kept", "kept": round(mean, 4), "layers": rows}


def _quantile(values: Tensor, share: float) -> float:
    """The value with `share` of them below."""
    every = values[:: max(1, len(values) // SAMPLE)].sort().values
    return every[min(len(every) - 1, round(share * len(every)))].item()
