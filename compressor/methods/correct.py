"""Correct: a low-rank pair beside each stored linear, that makes up for what rounding its weights lost.

    y = Q x + U (V x),   U V = the best of rank R for E = W − Q in the metric of the inputs and the outputs

Best is weighted_svd.py's: least ½ Σ_n F_n E[(e_n x)²], the increase of KL to second order, with what is left of E. The
pair sees the input before it is rounded, so it can be run as a LoRA adapter on the stored model (exports: lora).

Sources: EoRA (Liu et al. 2024, arXiv 2410.21271) and LQER (Zhang et al., ICML 2024) correct in the metric of the inputs
alone. Left out: what rounding the inputs loses, which is not linear in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from compressor.calibrate import Calibration
from compressor.kernels import activations as act
from compressor.layers import Packed, build, hadamard_of
from compressor.rank_allocation import Decisions, check_multiple, share_ranks
from compressor.sensitivity import Fisher
from compressor.statistics import Gram, Statistic
from compressor.weighted_svd import Decomposition, balanced, weighted_svd

BITS = 16  # of each weight of a pair


@dataclass(frozen=True)
class Correct:
    """`bits` is what the pairs cost, a weight of the corrected layers on average."""

    sensitivity: ClassVar[str] = "kl"

    bits: float = 0.5
    allocation: Literal["uniform", "kl"] = "kl"
    rank_multiple: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 8:
            raise ValueError(f"bits {self.bits:g} must be above 0 and at most 8; 0.5 is usual")
        check_multiple(self.rank_multiple)

    def extra_bytes(self, out_features: int, in_features: int) -> int:
        """Of a layer that gets what all get on average."""
        return int(self.bits * out_features * in_features / 8)

    def survey_needs(self) -> set[type[Statistic]]:
        """What a rank is worth follows from the spectrum of the error."""
        return {Gram} if self.allocation == "kl" else set()

    def survey(
        self,
        layers: Mapping[str, nn.Linear],
        calibration: Calibration,
        fisher: Fisher | None,
        packed: Mapping[str, Packed],
    ) -> dict[str, Tensor]:
        """What every rank leaves of each layer's rounding error, in nats of KL."""
        assert fisher is not None
        found = {}
        for name, layer in layers.items():
            error = _error_of(layer, packed[name], fisher.weights[name], calibration.value(name, Gram))
            found[name] = error.losses().cpu() / 2
        return found

    def decide(
        self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], fisher: Fisher | None
    ) -> Decisions:
        """Ranks of all layers of the step."""
        assert fisher is not None
        budget = self.bits / BITS * sum(n * k for n, k in shapes.values())
        weighed = losses if self.allocation == "kl" else None
        return Decisions(fisher.weights, share_ranks(shapes, weighed, budget, self.rank_multiple))

    def needs(self) -> set[type[Statistic]]:
        """The metric of the inputs."""
        return {Gram}

    def amend(
        self,
        layers: Mapping[str, nn.Linear],
        calibration: Calibration,
        packed: Mapping[str, Packed],
        decisions: Decisions,
    ) -> tuple[dict[str, Packed], dict[str, Any]]:
        """The layers of one block with their pairs; the report has ranks and KL in nats before and after."""
        made: dict[str, Packed] = {}
        report: dict[str, Any] = {}
        for name, layer in layers.items():
            if not (rank := decisions.ranks[name]):
                continue
            found = _error_of(layer, packed[name], decisions.outputs[name], calibration.value(name, Gram))
            up, down = balanced(*found.factors(rank))
            if block := hadamard_of(layer):  # E is of the rotated input, the pair's is not rotated
                down = act.rotate(down, block)
            pair = {"correction_up": up.bfloat16().cpu(), "correction_down": down.bfloat16().cpu()}
            made[name] = replace(packed[name], tensors=packed[name].tensors | pair)
            losses = found.losses() / 2
            report[name] = {
                "rank": rank,
                "bits": round(BITS * rank * sum(layer.weight.shape) / layer.weight.numel(), 4),
                "kl_before": float(f"{losses[0].item():.4g}"),
                "kl_after": float(f"{losses[rank].item():.4g}"),
            }
        return made, report


def _error_of(layer: nn.Linear, packed: Packed, fisher: Tensor, gram: Tensor) -> Decomposition:
    stored = build(packed).dequantize()[:, : layer.in_features].to(layer.weight.device)
    return weighted_svd(layer.weight.detach().float() - stored, fisher, gram)
