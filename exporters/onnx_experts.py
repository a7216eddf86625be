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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.expert_parts import every_expert
from compressor.exporters.onnx_moe import MODULE
from compressor.fewer_experts import FewerExperts
from compressor.kernels.mixed_bit_moe import PackedExperts
from compressor.mixtures import MoEView, mixtures, replying
from compressor.routed import RoutedFFN


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """While this is open, the layers of experts of `model` can be traced. Raises ModelError."""
    views = mixtures(model)
    try:
        with replying({view.module: _dense(view) for view in views.values()}):
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
    return {view.container: view.routing(view.probe().flatten(0, 1)).top_k for view in mixtures(model).values()}


def _dense(view: MoEView) -> Callable[..., Any]:
    """A forward of one layer that the tracer can follow."""
    layer: Any = view.module
    parts = view.parts()
    packed = _as_one_node(view)
    if isinstance(packed, PackedExperts):
        layer.add_module(MODULE, packed)
    run: Any = packed if isinstance(packed, PackedExperts) else partial(every_expert, view.experts)

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        x = hidden_states.flatten(0, 1)
        instead: Tensor | None = None
        if isinstance(layer, FewerExperts):
            weights, left = layer.decide(x)[:2]
            instead = layer.instead(left)
        else:
            weights = parts.weights(layer, x)
        y = run(x, weights)
        y = (y if instead is None else y + instead).view_as(hidden_states)
        beside = parts.beside(layer, hidden_states)
        return parts.given(y if beside is None else y + beside)

    return forward
