"""What a layer of experts computes, in parts that can be put together in another way:

    y = Σ_e w_e(x) f_e(x) + beside(x)        w_e(x) = 0 where the router did not choose e

Nothing is read off a family's code: `MoEView.parts` measures and tries which parts a layer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHARED = ("shared_expert", "shared_experts")


@dataclass(frozen=True)
class Routing:
    """What a router does, measured. score: "softmax" | "sigmoid" of all logits. Weights are the scores of the chosen
    times `scale`, divided by their sum where `renormalized`; plain: the chosen are those of the largest scores."""

    score: str
    top_k: int
    renormalized: bool
    scale: float
    plain: bool


@dataclass(frozen=True)
class Parts:
    """Where the parts of a layer are, by name inside it, and what its router does.

    routing   None: the layer says its weights itself (RoutedFFN)
    router    the parameter [E, H] that scores experts; container: the list of experts
    shared    the expert of every token, "" for none; gated: times the sigmoid of its own gate
    outputs   how many things the layer gives; 0: a tensor, not a tuple
    """

    routing: Routing | None
    router: str
    container: str
    shared: str
    gated: bool
    outputs: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Parts:
        return cls(**data | {"routing": data["routing"] and Routing(**data["routing"])})

    def weights(self, layer: Any, x: Tensor) -> Tensor:
        """x [T, H] -> what the router gives every expert, [T, E], 0 where it is not chosen."""
        if self.routing is None:
            return layer.weights(x)
        return self._of(self._scores(layer, x), x) if self.routing.plain else self._by_itself(layer, x)

    def weights_and_scores(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the router's score of every expert before it chooses, float32 [T, E]."""
        assert self.routing is not None
        scores = self._scores(layer, x)
        return self._of(scores, x) if self.routing.plain else self._by_itself(layer, x), scores

    def _of(self, scores: Tensor, x: Tensor) -> Tensor:
        """What a router that chooses the largest scores makes of them."""
        assert self.routing is not None
        values, indices = scores.topk(self.routing.top_k, dim=-1)
        if self.routing.renormalized:
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(1, indices, values * self.routing.scale).to(x.dtype)

    def _scores(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert self.routing is not None
        weight = layer.get_parameter(self.router)
        bias = bias_of(layer.get_submodule(self.router.rpartition(".")[0]), weight)
        return scored(nn.functional.linear(x, weight, bias).float(), self.routing.score)

    def _by_itself(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Of a router whose choice is not plainly the largest scores: what it says."""
        router = layer.get_submodule(self.router.rpartition(".")[0])
        found = [t for t in router(x.unsqueeze(0)) if isinstance(t, Tensor)]
        indices = next(t for t in found if not t.is_floating_point())
        values = next(t for t in found if t.is_floating_point() and t.shape == indices.shape)
        experts: Any = layer.get_submodule(self.container)
        return x.new_zeros(len(indices), len(experts)).scatter(1, indices, values.to(x.dtype))

    def beside(self, layer: Any, x: Tensor) -> Tensor | None:
        """What every token gets besides routed experts, of the shape of x; None for nothing."""
        if not self.shared:
            return None
        y = getattr(layer, self.shared)(x)
        return getattr(layer, f"{self.shared}_gate")(x).sigmoid() * y if self.gated else y

    def given(self, y: Tensor) -> Any:
        """y as the layer gives it: alone, or before things that a forward without training does not look at."""
        return (y, *(None for _ in range(self.outputs - 1))) if self.outputs else y


def bias_of(router: nn.Module, weight: Tensor) -> Tensor | None:
    """[E] of a router whose weight is [E, H], None for none."""
    bias = getattr(router, "bias", None)
    return bias if isinstance(bias, Tensor) and bias.shape == weight.shape[:1] else None


def scored(logits: Tensor, score: str) -> Tensor:
    """logits [T, E] -> the scores that `Routing.score` names."""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def every_expert(experts: Any, x: Tensor, weights: Tensor) -> Tensor:
    """Σ_e w_e f_e(x), each expert on every token: no step depends on values. x [T, H], weights [T, E] -> [T, H]."""
    return torch.stack([expert(x) * weights[:, e, None] for e, expert in enumerate(experts)]).sum(0)


def chosen_experts(experts: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The same, each expert on the tokens that chose it only. chosen: bool [T, E]."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        tokens = chosen[:, e].nonzero().flatten()
        if len(tokens):
            y.index_add_(0, tokens, (expert(x[tokens]) * weights[tokens, e, None]).to(y.dtype))
    return y


def candidates(layer: nn.Module) -> Iterator[tuple[str, bool]]:
    """What a layer may add to its routed experts: nothing, a shared expert, one with a gate."""
    yield "", False
    for name in SHARED:
        if isinstance(getattr(layer, name, None), nn.Module):
            yield name, False
            if isinstance(getattr(layer, f"{name}_gate", None), nn.Module):
                yield name, True
