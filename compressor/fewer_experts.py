"""A layer of experts in which a rule keeps only the first of those that the router chose, as many as each token needs.

    w_1 >= … >= w_K      the router's weights of the chosen          m_j = 1 for the first n(x) of them, else 0
    left = Σ_j w_j (1 − m_j)                                         what those left out would have been multiplied by
    y = Σ_j m_j w_j (1 + gain · left / Σ_i m_i w_i) f_j(x) + Σ_j (1 − m_j) w_j b_j + beside(x)

Where a rule has no b_j, a vector that stands for the expert, gain is 1 for routers whose weights sum to one and 0 for
others: the weights are divided by their sum again, or they are not. With n(x) = K it is the layer that it was made of.

    Ratio   n(x): the largest j with w_j >= β w_1                              methods/odp.py
    Head    n(x): the largest of z(x), a small network of the router's scores and the layer's input    methods/otp.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.expert_parts import Parts, chosen_experts

RULE = "rule"  # the name of the rule in its layer; the others are those of the layer it was made of
HIDDEN, VIEWS = 64, 16  # of a head: its width, and what it sees of the layer's input


class Ratio(nn.Module):
    """Keeps the chosen whose weight is at least β times the largest."""

    def __init__(self, top_k: int, experts: int, features: int, renormalized: bool):
        super().__init__()
        self.top_k, self.gain = top_k, float(renormalized)
        self.beta, self.table, self.sampled = _empty(1), None, None

    def forward(self, x: Tensor, top: Tensor, scores: Tensor) -> Tensor:
        """x [T, H], top [T, K] in falling order, scores [T, E] -> m, bool [T, K], the first of each row True."""
        return (top >= self.beta.to(top) * top[:, :1]) | (torch.arange(top.shape[1], device=top.device) == 0)


class Head(nn.Module):
    """Keeps n, the largest of K outputs of a network; what is left out may be stood in for by vectors.

    tables   b [E, H] and the gain are parameters; else the gain is that of a rule without b
    """

    def __init__(self, top_k: int, experts: int, features: int, renormalized: bool, tables: bool = True):
        super().__init__()
        self.top_k = top_k
        self.view = _empty(VIEWS, features)
        self.first, self.first_bias = _empty(HIDDEN, top_k + 2 + VIEWS), _empty(HIDDEN)
        self.second, self.second_bias = _empty(top_k, HIDDEN), _empty(top_k)
        self.gain: Any = _empty(1) if tables else float(renormalized)
        self.table = _empty(experts, features) if tables else None
        self.sampled: Callable[[Tensor], Tensor] | None = None  # training: z -> m, not just 0 and 1

    def logits(self, x: Tensor, top: Tensor, scores: Tensor) -> Tensor:
        """z [T, K] of keeping the first 1 … K."""
        best = scores.topk(self.top_k, dim=-1).values
        share = scores / scores.sum(-1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-9).log()).sum(-1, keepdim=True)
        margin = (best[:, :1] / best[:, -1:].clamp_min(1e-9)).log()
        seen = torch.cat((best.to(x), entropy.to(x), margin.to(x), nn.functional.linear(x, self.view)), dim=-1)
        hidden = nn.functional.silu(nn.functional.linear(seen, self.first, self.first_bias))
        return nn.functional.linear(hidden, self.second, self.second_bias)

    def forward(self, x: Tensor, top: Tensor, scores: Tensor) -> Tensor:
        z = self.logits(x, top, scores)
        if self.sampled is not None:
            return self.sampled(z)
        return torch.arange(self.top_k, device=z.device) <= z.argmax(-1, keepdim=True)


RULES: dict[str, Any] = {"ratio": Ratio, "head": Head}


class FewerExperts(nn.Module):
    """x [..., H] -> what the layer gives, with fewer experts. Has the layer's children under their names and `rule`."""

    def __init__(self, parts: Parts, kind: str, experts: int, features: int, tables: bool = False):
        super().__init__()
        assert parts.routing is not None
        self.parts, self.kind = parts, kind
        self.experts_count, self.features = experts, features
        more = {"tables": tables} if kind == "head" else {}
        self.rule = RULES[kind](parts.routing.top_k, experts, features, parts.routing.renormalized, **more)

    @classmethod
    def shaped(cls, parts: dict[str, Any], rule: str, experts: int, features: int, tables: bool) -> FewerExperts:
        """One without the layer's children (`adopt`), its rule without values."""
        return cls(Parts.from_json(parts), rule, experts, features, tables)

    def attributes(self) -> dict[str, Any]:
        """JSON, and the arguments of `shaped`."""
        return {
            "parts": self.parts.as_json(),
            "rule": self.kind,
            "experts": self.experts_count,
            "features": self.features,
            "tables": self.rule.table is not None,
        }

    def adopt(self, layer: nn.Module) -> FewerExperts:
        """Take the children of the layer in whose place this comes, before the rule; returns itself."""
        rule = self._modules.pop(RULE)
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.add_module(RULE, rule)
        return self

    def decide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> [T, E] each: weights, 0 where not chosen or left out; what is left out; the router's own."""
        own, scores = self.parts.weights_and_scores(self, x)
        top, chosen = own.topk(self.rule.top_k, dim=-1)
        kept = self.rule(x, top, scores).to(top.dtype)
        left = top * (1 - kept)
        whole = (top * kept).sum(-1, keepdim=True).clamp_min(1e-9)
        gain = self.rule.gain * left.sum(-1, keepdim=True) / whole
        empty = torch.zeros_like(own)
        return empty.scatter(1, chosen, top * kept * (1 + gain)), empty.scatter(1, chosen, left), own

    def instead(self, left: Tensor) -> Tensor | None:
        """What stands for the experts left out, [T, H]; left [T, E] as from `decide`."""
        return None if self.rule.table is None else left @ self.rule.table.to(left)

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, left, own = self.decide(x)
        training = self.rule.sampled is not None  # what is left out has a gradient too
        experts = self.get_submodule(self.parts.container)
        y = chosen_experts(experts, x, weights, own != 0 if training else weights != 0)
        if (more := self.instead(left)) is not None:
            y = y + more
        y = y.view_as(hidden_states)
        shared = self.parts.beside(self, hidden_states)
        return self.parts.given(y if shared is None else y + shared)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), False)
