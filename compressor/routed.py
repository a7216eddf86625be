"""A feed-forward layer in parts: what every token needs, and experts of which each token gets some.

    y = shared(x) + Σ f_e(x) over the top_k largest of x Wᵀ + b

Outputs are added as they are: with all experts active it is the layer that it was made of, whose channels it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.experts import Expert, Experts, Gated

Names = tuple[str, str, str]  # of gate, up and down projection


class RoutedFFN(nn.Module):
    """x [..., H] -> the same. gate: the router; act: what transformers calls the activation. A bias of the layer's
    output is the shared expert's."""

    def __init__(self, gate: nn.Linear, experts: list[Expert], shared: Expert, top_k: int, act: str):
        super().__init__()
        self.top_k, self.act = top_k, act
        self.gate = gate
        self.experts = Experts(experts)
        self.shared_expert = shared

    @classmethod
    def shaped(
        cls,
        features: int,
        width: int,
        experts: int,
        shared: int,
        top_k: int,
        act: str,
        names: Names,
        bias: Sequence[bool],
    ) -> RoutedFFN:
        """One without values, on the meta device: `experts` of `width` channels and one of `shared`; bias of each of
        gate, up and down."""

        def linear(out_features: int, in_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias, device="meta")

        def expert(width: int, down: bool) -> Expert:
            first, second = (linear(width, features, b) for b in bias[:2])
            return expert_of(names, first, second, linear(features, width, down), act)

        each = [expert(width, False) for _ in range(experts)]
        return cls(linear(experts, features, True), each, expert(shared, bias[2]), top_k, act)

    def attributes(self) -> dict[str, Any]:
        """JSON, and the arguments of `shaped`."""
        first: Any = self.experts[0]
        names = first.names
        layers: list[Any] = [self.shared_expert.get_submodule(name) for name in names]
        return {
            "features": self.gate.in_features,
            "width": first.get_submodule(names[0]).out_features,
            "experts": len(self.experts),
            "shared": layers[0].out_features,
            "top_k": self.top_k,
            "act": self.act,
            "names": list(names),
            "bias": [_has_bias(layer) for layer in layers],
        }

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x.flatten(0, -2)).topk(self.top_k, dim=-1).indices
        return self.shared_expert(x) + self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))

    def weights(self, x: Tensor) -> Tensor:
        """x [..., H] -> 1 for each expert that a token gets and 0 for the others, [T, E]."""
        scores = self.gate(x.flatten(0, -2))
        chosen = scores.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(scores).scatter(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))


def expert_of(names: Names, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: str) -> Expert:
    """One expert with an activation of its own."""
    return Expert(names, gate, up, down, activation(act))


def activation(name: str) -> Gated:
    """act(gate) up. Raises KeyError for a name that transformers does not have."""
    from transformers.activations import ACT2FN

    return Gated(ACT2FN[name])


def _has_bias(layer: Any) -> bool:
    return getattr(layer, "bias", None) is not None
