"""Layers of experts: one view of all families, in both versions of transformers, found by structure and by value.

Who goes to which expert and with what weight is not read off a router's outputs, which every family returns in its own
order and form: each expert answers with a vector of its own instead, and the layer's output says it. So what is counted
is what the layer does, whatever its router is. Fused experts are linears by then (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.expert_parts import Parts, Routing, bias_of, candidates, every_expert, scored
from compressor.experts import Clamped, Gated
from compressor.fewer_experts import FewerExperts
from compressor.layers import QuantLinear
from compressor.parts import blocks, experts_of
from compressor.routed import RoutedFFN

KINDS = (nn.Linear, QuantLinear)
SAME = 1e-4  # relative; float32 products that are the same in exact arithmetic
PROBE = (2, 24)  # batch, sequence of random tokens that show what a layer computes


@dataclass(frozen=True)
class Weights:
    """One expert: gate, up [I, H], down [H, I], their biases or None, and the linears' names inside the expert."""

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    names: tuple[str, str, str]


class MoEView:
    """One layer of experts. name: of the module that holds them and their router; router: its weight [E, H]."""

    def __init__(self, model: nn.Module, name: str, container: str, router: str):
        self.name, self.container, self.router = name, container, router
        self.module = model.get_submodule(name)
        self.experts: Any = model.get_submodule(container)
        owner = model.get_submodule(router.rpartition(".")[0])
        self.weight: Tensor = model.get_parameter(router)
        self.bias = bias_of(owner, self.weight)
        self._score: str | None = None

    def __len__(self) -> int:
        return len(self.experts)

    def linears(self, expert: int) -> list[str]:
        """The full names of one expert's linears."""
        inside = self.experts[expert].named_modules()
        return [f"{self.container}.{expert}.{n}" for n, m in inside if hasattr(m, "in_features")]

    def shared(self) -> list[str]:
        """The full names of the linears that every token goes through: shared experts and their gates."""
        own, router = (n.removeprefix(f"{self.name}.") for n in (self.container, self.router.rpartition(".")[0]))
        return [
            f"{self.name}.{n}"
            for n, m in self.module.named_modules()
            if hasattr(m, "in_features") and n != router and not n.startswith(f"{own}.")
        ]

    def activation(self) -> nn.Module:
        """act(gate, up)."""
        found = next((m for m in self.experts[0].children() if not isinstance(m, KINDS)), None)
        if found is None:
            raise ModelError(f"{self.container}: its experts have no activation; such experts are not supported.")
        return found if isinstance(found, Gated | Clamped) else Gated(found)

    @torch.no_grad()
    def get(self, expert: int) -> Weights:
        """One expert's weights, not copied. Which is which is tried out. Raises ModelError when nothing fits."""
        module, act = self.experts[expert], self.activation()
        x = torch.randn(4, self.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(self.weight)
        if names := roles(module, act, x):
            a, b, c = (module.get_submodule(n) for n in names)
            biases = a.bias, b.bias, c.bias
            return Weights(a.weight.detach(), b.weight.detach(), c.weight.detach(), biases, names)
        raise ModelError(f"{self.container}.{expert} is not a gate, an up and a down projection; it is not supported.")

    def set(self, expert: int, weights: Weights) -> None:
        """Give one expert other values: new parameters, so that a twin's original keeps its own."""
        module = self.experts[expert]
        for name, weight, bias in zip(
            weights.names, (weights.gate, weights.up, weights.down), weights.biases, strict=True
        ):
            linear = module.get_submodule(name)
            linear.weight = nn.Parameter(weight, False)
            linear.bias = None if bias is None else nn.Parameter(bias.detach(), False)
            linear.out_features, linear.in_features = weight.shape

    @torch.no_grad()
    def error(self, expert: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Mean over tokens x [M, H] of (f(x) - f'(x))², [H], f' the expert with `weights` by full name."""
        module, prefix = self.experts[expert], f"{self.container}.{expert}."
        x = x.to(self.weight)
        own = {f"{name.removeprefix(prefix)}.weight": w.to(x) for name, w in weights.items()}
        found = torch.func.functional_call(module, own, (x,))
        return (found - module(x)).square().mean(0)

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """x [T, H], the layer's input -> what each expert's output is multiplied by, [T, E]; 0 where not chosen.

        Raises ModelError for a layer whose output holds more than what its experts and its other linears give.
        """
        if isinstance(self.module, FewerExperts):
            with exact(x):
                return self.module.decide(x)[0]
        if self._heard(x[:1], range(0)).any():
            raise ModelError(f"{self.name}: it adds something else to its experts' outputs; it is not supported.")
        parts = [range(start, min(start + x.shape[1], len(self))) for start in range(0, len(self), x.shape[1])]
        return torch.cat([self._heard(x, numbers)[:, : len(numbers)] for numbers in parts], dim=1)

    def _heard(self, x: Tensor, numbers: range) -> Tensor:
        """The layer's output when the experts of `numbers` answer with unit vectors and all else with zeros."""
        replies = {self.experts[e]: _unit(e - numbers.start if e in numbers else None) for e in range(len(self))}
        replies |= {self._module(name): _nothing(self._module(name)) for name in self.shared()}
        with replying(replies), exact(x):
            y = self.module.forward(x.unsqueeze(0))  # not called: hooks listen to the model's own forward only
        return (y if isinstance(y, Tensor) else y[0]).reshape(x.shape)

    @torch.no_grad()
    def scores(self, x: Tensor, weights: Tensor) -> Tensor:
        """What the router thinks of every expert before it chooses, float32 [T, E]; weights as from `weights`."""
        if self._score is None:
            self._score = self.routing(x[:64], weights[:64]).score
        return scored(self._logits(x), self._score)

    @torch.no_grad()
    def routing(self, x: Tensor, weights: Tensor | None = None) -> Routing:
        """What the router does with x [T, H]. Raises ModelError when its weights are neither score's."""
        if isinstance(self.module, FewerExperts):
            assert self.module.parts.routing is not None
            return self.module.parts.routing
        weights = self.weights(x) if weights is None else weights
        logits = self._logits(x)
        chosen = weights != 0
        top_k = int(chosen.sum(-1).amax())
        total = weights.sum(-1)
        for name, scores in (("softmax", logits.softmax(-1)), ("sigmoid", logits.sigmoid())):
            plain = bool(torch.equal(scores.topk(top_k).indices.sort(-1)[0], weights.topk(top_k).indices.sort(-1)[0]))
            if _spread(ratio := (weights / scores)[chosen]) < SAME:
                return Routing(name, top_k, False, _round(ratio.mean().item()), plain)
            shares = weights / total[:, None], scores / (scores * chosen).sum(-1, keepdim=True)
            if _spread(total) < SAME and (shares[0] - shares[1])[chosen].abs().amax() < SAME:
                return Routing(name, top_k, True, _round(total.mean().item()), plain)
        raise ModelError(f"{self.router}: its weights follow neither a softmax nor a sigmoid; it is not supported.")

    def probe(self) -> Tensor:
        """Random tokens [B, L, H] for the layer, the same each time."""
        drawn = torch.randn(*PROBE, self.weight.shape[1], generator=torch.Generator().manual_seed(0))
        return drawn.to(self.weight)

    @torch.no_grad()
    def parts(self) -> Parts:
        """What the layer is made of. Raises ModelError where that does not give what it gives on random tokens."""
        if isinstance(self.module, FewerExperts):
            return self.module.parts
        x = self.probe()
        given = self.module(x)
        expected, outputs = (given, 0) if isinstance(given, Tensor) else (given[0], len(given))
        routing = None if isinstance(self.module, RoutedFFN) else self.routing(x.flatten(0, 1))
        router, container = (name.removeprefix(f"{self.name}.") for name in (self.router, self.container))
        routed: Tensor | None = None
        for shared, gated in candidates(self.module):
            parts = Parts(routing, router, container, shared, gated, outputs)
            if routed is None:
                tokens = x.flatten(0, 1)
                routed = every_expert(self.experts, tokens, parts.weights(self.module, tokens)).view_as(x)
            more = parts.beside(self.module, x)
            y = routed if more is None else routed + more
            if (y - expected).abs().amax() <= SAME * expected.abs().amax():
                return parts
        raise ModelError(f"{self.name}: what it computes beside its experts is not known; it is not supported.")

    def _logits(self, x: Tensor) -> Tensor:
        """float32 [T, E], not rounded to bf16 either."""
        with exact(x):
            return nn.functional.linear(x, self.weight, self.bias).float()

    def _module(self, name: str) -> Any:
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))


def mixtures(model: nn.Module, prefix: str = "") -> dict[str, MoEView]:
    """The layers of experts of the model by name, those under `prefix`, in order; a layer is a part of a block."""
    whole = {name for name, _ in blocks(model, KINDS)}
    found = {}
    for name, container, routers in experts_of(model, KINDS):
        count = len(model.get_submodule(container)._modules)
        own = [r for r in routers if model.get_parameter(r).shape[0] == count]
        if not own or name in whole or not container.startswith(prefix):
            continue
        if isinstance(model.get_submodule(container), nn.ModuleList):
            found[name] = MoEView(model, name, container, own[0])
    return found


class ExpertUse:
    """How a layer's experts are used, by expert: merged like a Statistic, but of a whole layer.

    counts int64 [E], scores Σ of the router's score where chosen, squares Σ of the squared weight, float64 [E]
    unknown: why they say nothing, of a layer that the view does not understand; else empty
    """

    def __init__(self, view: MoEView):
        self.view, experts = view, len(view)
        self.tokens, self.unknown = 0, ""
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.scores = torch.zeros(experts, dtype=torch.float64)
        self.squares = torch.zeros(experts, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x [T, H]: the layer's input."""
        try:
            weights = self.view.weights(x)
            scores = self.view.scores(x, weights)
        except ModelError as error:
            self.unknown = str(error)
            return
        chosen = weights != 0
        self.tokens += len(x)
        self.counts += chosen.sum(0).cpu()
        self.scores += (scores * chosen).sum(0, dtype=torch.float64).cpu()
        self.squares += weights.square().sum(0, dtype=torch.float64).cpu()

    def merge(self, other: ExpertUse) -> None:
        self.tokens += other.tokens
        self.counts += other.counts
        self.scores += other.scores
        self.squares += other.squares


@torch.no_grad()
def roles(module: nn.Module, act: nn.Module, x: Tensor) -> tuple[str, str, str] | None:
    """The names of gate, up and down in a module of three linears that computes down(act(gate(x), up(x))), found by
    trying x [T, H]; None for any other module."""
    own = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    expected = module(x)
    for gate, up, down in ((g, u, d) for g in own for u in own for d in own if len({g, u, d}) == 3 == len(own)):
        if own[gate].in_features != x.shape[1] or own[gate].weight.shape != own[up].weight.shape:
            continue
        if own[down].in_features == own[gate].out_features and own[down].out_features == x.shape[1]:
            y = own[down](act(own[gate](x), own[up](x)))
            if (y - expected).abs().amax() <= SAME * expected.abs().amax().clamp_min(1e-30):
                return gate, up, down
    return None


def _spread(values: Tensor) -> float:
    """(largest - smallest) / mean."""
    return ((values.amax() - values.amin()) / values.mean().abs().clamp_min(1e-30)).item()


def exact(x: Tensor) -> torch.autocast:
    """While this is open, products of x are computed as they are stored: calibration may compute in bfloat16, whose
    weights are no softmax any more, and whose sums DeepSeek-V3 in transformers 4 cannot add such replies to."""
    return torch.autocast(x.device.type, enabled=False)


def _round(scale: float) -> float:
    """The number of few digits that a measured one is, so that weights keep their bits; itself if it is none."""
    short = float(f"{scale:.3g}")
    return short if abs(short - scale) <= SAME * abs(scale) else scale


def _unit(number: int | None) -> Callable[..., Tensor]:
    """Replies with unit vector `number`, None with zeros, whatever it is given."""

    def reply(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        if number is not None:
            y[..., number] = 1
        return y

    return reply


def _nothing(module: Any) -> Callable[..., Tensor]:
    return lambda x: x.new_zeros(*x.shape[:-1], module.out_features)


@contextmanager
def replying(replies: dict[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Each module's forward is the given function for a while."""
    held = {module: vars(module).get("forward") for module in replies}
    try:
        for module, reply in replies.items():
            module.forward = reply  # type: ignore[method-assign]
        yield
    finally:
        for module, before in held.items():
            del module.forward
            if before is not None:
                module.forward = before
