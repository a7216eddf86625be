"""Layers of experts in a graph: every expert runs on every token, times what the router gives it, mostly zero.

transformers picks the tokens of each expert with loops that depend on values, which no graph holds. While a graph is
captured each layer's forward is this sum instead, and must give what the layer gives on random tokens, or the model is
refused. Where experts are packed integers the sum is one op, whose fused kernel touches the chosen experts only
(kernels/mixed_bit_moe.py); its body, and the sum of any other experts, are right in any runtime for E / K times the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.exporters.onnx_moe import MODULE
from compressor.kernels.mixed_bit_moe import PackedExperts
from compressor.mixtures import MoEView, Routing, mixtures, replying
from compressor.routed import RoutedFFN

TOLERANCE = 1e-4  # of float32 sums in another order, relative to the largest output
PROBE = (2, 24)  # batch, sequence

Function = Callable[[Tensor], Tensor]


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """While this is open, the layers of experts of `model` can be traced. Raises ModelError."""
    views = mixtures(model)
    try:
        with replying({view.module: _dense(model, view) for view in views.values()}):
            yield
    finally:
        for view in views.values():
            view.module._modules.pop(MODULE, None)


def sums(model: nn.Module) -> dict[str, str]:
    """Container -> why its experts are no MixedBitMoE, of those that are not."""
    found = {view.container: _as_one_node(view) for view in mixtures(model).values()}
    return {name: packed for name, packed in found.items() if isinstance(packed, str)}


def _as_one_node(view: MoEView) -> PackedExperts | str:
    """Or why they are a sum of their linears' own nodes."""
    if isinstance(view.module, RoutedFFN):
        return "they are parts of a dense layer, which the file does not keep together"
    return PackedExperts.of(view)


@torch.no_grad()
def top_k(model: nn.Module) -> dict[str, int]:
    """Container -> how many experts a token goes to."""
    return {view.container: view.routing(_probe(view).flatten(0, 1)).top_k for view in mixtures(model).values()}


def _probe(view: MoEView) -> Tensor:
    return torch.randn(*PROBE, view.weight.shape[1], generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _dense(model: nn.Module, view: MoEView) -> Callable[..., Any]:
    """A forward of one layer that the tracer can follow."""
    x = _probe(view)
    given = view.module(x)
    expected = given if isinstance(given, Tensor) else given[0]
    if isinstance(view.module, RoutedFFN):
        choose: Function = view.module.weights
    else:
        choose = _router(model, view, view.routing(x.flatten(0, 1)))
    packed = _as_one_node(view)
    if isinstance(packed, PackedExperts):
        view.module.add_module(MODULE, packed)
        routed = _packed(packed, choose)
    else:
        routed = _routed(view, choose)
    for shared in _shared(view.module):
        y = routed(x) if shared is None else routed(x) + shared(x)
        if (y - expected).abs().amax() <= TOLERANCE * expected.abs().amax():
            break
    else:
        raise ModelError(f"{view.name}: what it computes beside its experts is not known; it is not supported.")

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        y = routed(hidden_states) if shared is None else routed(hidden_states) + shared(hidden_states)
        return y if isinstance(given, Tensor) else (y, *(None for _ in given[1:]))

    return forward


def _routed(view: MoEView, choose: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        """x [B, L, H] -> the same."""
        tokens = x.flatten(0, 1)
        weights = choose(x)
        parts = [expert(tokens) * weights[:, e, None] for e, expert in enumerate(view.experts)]
        return torch.stack(parts).sum(0).view_as(x)

    return run


def _packed(experts: PackedExperts, choose: Function) -> Function:
    return lambda x: experts(x.flatten(0, 1), choose(x)).view_as(x)


def _router(model: nn.Module, view: MoEView, routing: Routing) -> Function:
    """x [B, L, H] -> the weight of every expert, [T, E], zero where it is not chosen."""
    module = model.get_submodule(view.router.rpartition(".")[0])

    def by_scores(x: Tensor) -> Tensor:
        logits = nn.functional.linear(x.flatten(0, 1), view.weight, view.bias).float()
        scores = logits.softmax(-1) if routing.score == "softmax" else logits.sigmoid()
        values, indices = scores.topk(routing.top_k, dim=-1)
        if routing.renormalized:
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(1, indices, values * routing.scale).to(x.dtype)

    def by_itself(x: Tensor) -> Tensor:
        found = [t for t in module(x) if isinstance(t, Tensor)]
        indices = next(t for t in found if not t.is_floating_point())
        values = next(t for t in found if t.is_floating_point() and t.shape == indices.shape)
        return x.new_zeros(len(indices), len(view)).scatter(1, indices, values.to(x.dtype))

    return by_scores if routing.plain else by_itself


def _shared(layer: Any) -> Iterator[Function | None]:
    """What a layer may add to its routed experts: nothing, a shared expert, one with a gate."""
    yield None
    for name in ("shared_expert", "shared_experts"):
        if isinstance(shared := getattr(layer, name, None), nn.Module):
            yield shared
            if isinstance(gate := getattr(layer, f"{name}_gate", None), nn.Module):
                yield _gated(shared, gate)


def _gated(shared: nn.Module, gate: nn.Module) -> Function:
    return lambda x: gate(x).sigmoid() * shared(x)
