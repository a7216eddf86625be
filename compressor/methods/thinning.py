"""What odp and otp share: rules in the layers of experts, their text, and the share of experts that they keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from compressor.blockwise import run_blocks
from compressor.calibrate import up_to_last
from compressor.errors import ModelError
from compressor.experts import put
from compressor.fewer_experts import FewerExperts
from compressor.mixtures import MoEView, mixtures
from compressor.parts import blocks
from compressor.routed import RoutedFFN
from compressor.run import Run

FEW = 8  # windows that tell the share of experts kept

Layers = dict[str, FewerExperts]


def check_keep(keep: float) -> None:
    """Raises ValueError."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep:g} must be above 0 and at most 1, the share of experts a token keeps")


def layers_of(model: nn.Module, names: Collection[str]) -> dict[str, MoEView]:
    """The layers of experts that hold one of the linears `names`. Raises ModelError for none, and for unfit ones."""
    views = {n: v for n, v in mixtures(model).items() if any(x.startswith(f"{v.container}.") for x in names)}
    if not views:
        raise ModelError(f"{type(model).__name__}: the step's targets hold no layer of experts; change targets.")
    for name, view in views.items():
        if isinstance(view.module, RoutedFFN):
            raise ModelError(f"{name}: parts of a dense layer have no weights that rank them; moeify has top_k.")
        if isinstance(view.module, FewerExperts):
            raise ModelError(f"{name}: an earlier step chose how many experts a token keeps; drop one of them.")
    return views


def thinned(model: nn.Module, views: Mapping[str, MoEView], rule: str, keep: float, tables: bool = False) -> Layers:
    """Layers with rules, without values yet, in the place of those of `views`. Raises ModelError."""
    made: Layers = {}
    for name, view in views.items():
        parts = view.parts()
        assert parts.routing is not None
        if not keep * parts.routing.top_k >= 1:
            least = f"1 of {parts.routing.top_k}"
            raise ModelError(f"{name}: keep {keep:g} is less than one expert a token; {least} is the least.")
        made[name] = FewerExperts(parts, rule, len(view), view.weight.shape[1], tables)
    for name, layer in made.items():
        put(model, name, layer.adopt(views[name].module))
    return made


def run_through(model: nn.Module, layers: Layers, windows: Tensor, run: Run) -> None:
    """Windows [S, L] through all blocks up to the last with a rule."""
    named = up_to_last(blocks(model), layers)
    run_blocks(model, windows, named, lambda name: nullcontext(), run.progress, run.device, run.dtype)


@contextmanager
def hearing(layers: Layers, see: Callable[[str, tuple[Tensor, ...], Tensor], None]) -> Iterator[None]:
    """While this is open, see(layer, what its rule was given, what it said) is called for every forward."""
    handles = [
        layer.rule.register_forward_hook(lambda _, args, out, name=name: see(name, args, out))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def kept(model: nn.Module, layers: Layers, run: Run) -> dict[str, float]:
    """The share of the router's choice that each layer's tokens keep, on a few windows."""
    said: dict[str, list[float]] = {name: [] for name in layers}
    with hearing(layers, lambda name, _, out: said[name].append(out.double().mean().item())):
        run_through(model, layers, run.windows[:FEW], run)
    return {name: round(sum(shares) / len(shares), 4) for name, shares in said.items()}
