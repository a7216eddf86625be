"""Experts: whole experts of a mixture go, as many in every layer, and their rows of the router with them.

    reap         mean over an expert's tokens of g(x) ‖f(x)‖: the size of what it adds (Lasby et al. 2025, "REAP")
    activation   mean over an expert's tokens of ‖f(x)‖, whatever weight the router gave it

g is the weight that the router gives the expert, f what the expert computes. Each token still goes to as many experts
as before. One pass, no training. Experts keep their widths here; `cfsp` prunes those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.blockwise import run_blocks
from compressor.config_fields import say_width
from compressor.errors import ModelError, RecipeError
from compressor.mixtures import MoEView, mixtures
from compressor.model import blocks, linears
from compressor.parts import experts_of
from compressor.prunable import linear_like, to_bf16
from compressor.run import Run


@dataclass(frozen=True)
class Experts:
    """`prune` is the share of each layer's experts that goes, to the nearest whole one."""

    prune: float = 0.25
    score: Literal["reap", "activation"] = "reap"

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune {self.prune:g} is not a share of the experts; give a number from 0 to below 1")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """As many experts fewer; which, the text says."""
        for layer in _layers(model, names):
            keep_experts(model, layer, torch.arange(self._left(model, layer)))

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Leave out the experts of least score; the report has every layer's scores and who stays."""
        layers = _layers(model, names)
        count, left = layers[0].count, self._left(model, layers[0])
        if left == count:
            return {"pruned": "nothing: no whole expert"}
        use = _measured(model, layers, run)
        rows: dict[str, Any] = {}
        for layer in layers:
            score = use[layer.name].mean(weighted=self.score == "reap")
            keep = score.argsort(descending=True, stable=True)[:left].sort().values
            keep_experts(model, layer, keep)
            rows[layer.name] = {"scores": [round(s, 6) for s in score.tolist()], "kept": keep.tolist()}
        field = say_width(model, [layer.router for layer in layers], count, left)
        if field is None:
            raise ModelError(f"{type(model).__name__}: its config cannot say that it has fewer experts.")
        to_bf16(model, [name for name in linears(model) if name in names])
        return {"config": field, "experts": count, "kept": left, "layers": rows}

    def _left(self, model: Any, layer: _Layer) -> int:
        left = layer.count - round(layer.count * self.prune)
        least = getattr(model.config, "num_experts_per_tok", 1)
        if left < least:
            raise RecipeError(
                f"experts: prune {self.prune:g} leaves {left} of {layer.count} experts in {layer.name}, and a token "
                f"goes to {least}; prune at most {1 - least / layer.count:g}."
            )
        return left


@dataclass(frozen=True)
class _Layer:
    """One layer of `count` experts: the module, the list of its experts, the linear that chooses among them."""

    name: str
    container: str
    router: str
    count: int


def _layers(model: nn.Module, names: Collection[str]) -> list[_Layer]:
    """Those whose experts are targets. Raises ModelError and RecipeError for what cannot be pruned."""
    found = []
    for name, container, routers in experts_of(model):
        experts = model.get_submodule(container)
        own = {n for n in linears(model) if n.startswith(f"{container}.")}
        if not own & set(names):
            continue
        if not own <= set(names):
            raise RecipeError(f"experts: of the experts in {container} only some are targets; target all or none.")
        count = len(experts) if isinstance(experts, nn.ModuleList) else 0
        scoring = [
            owner
            for router in routers
            if isinstance(m := model.get_submodule(owner := router.rpartition(".")[0]), nn.Linear)
            and m.out_features == count
        ]
        if len(scoring) != 1:
            raise ModelError(f"{name}: experts can be left out where they are modules behind one linear router.")
        found.append(_Layer(name, container, scoring[0], count))
    if not found:
        raise ModelError(f"{type(model).__name__}: experts finds no layer of experts among its targets.")
    if len({layer.count for layer in found}) > 1:
        raise ModelError(f"{type(model).__name__}: its layers have different numbers of experts; no config says that.")
    return found


def keep_experts(model: nn.Module, layer: _Layer, keep: Tensor) -> None:
    """Leave the experts keep [M] of a layer, in ascending order. Modules of `model`, a twin, are replaced."""
    experts: Any = model.get_submodule(layer.container)
    model.set_submodule(layer.container, nn.ModuleList([experts[i] for i in keep.tolist()]))
    router: Any = model.get_submodule(layer.router)
    rows = keep.to(router.weight.device)
    bias = None if router.bias is None else router.bias.detach()[rows]
    model.set_submodule(layer.router, linear_like(router, router.weight.detach()[rows], bias))
    owner = model.get_submodule(layer.name)
    for attribute, value in list(vars(owner).items()):  # how many there are, as its forward knows it
        if type(value) is int and value == layer.count and "experts" in attribute and "per_tok" not in attribute:
            setattr(owner, attribute, len(keep))


class _Use:
    """Sums over the tokens of each expert, float64 [E]."""

    def __init__(self, view: MoEView):
        self.view = view
        self.tokens, self.norms, self.weighted = torch.zeros(3, len(view), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x [T, H]: the layer's input."""
        weights = self.view.weights(x)
        for number, expert in enumerate(self.view.experts):
            chosen = weights[:, number].nonzero()[:, 0]
            if len(chosen):
                norms = expert(x[chosen]).double().norm(dim=-1)
                self.tokens[number] += len(chosen)
                self.norms[number] += norms.sum().item()
                self.weighted[number] += (norms * weights[chosen, number].double()).sum().item()

    def mean(self, weighted: bool) -> Tensor:
        """[E], 0 of an expert that got no token."""
        return (self.weighted if weighted else self.norms) / self.tokens.clamp_min(1)


def _measured(model: nn.Module, layers: list[_Layer], run: Run) -> dict[str, _Use]:
    """By name, from one pass over the calibration windows."""
    views = mixtures(model)
    use = {layer.name: _Use(views[layer.name]) for layer in layers}

    @contextmanager
    def around(block: str) -> Iterator[None]:
        with ExitStack() as stack:
            for name, one in use.items():
                if name.startswith(f"{block}."):
                    stack.callback(one.view.module.register_forward_pre_hook(_hears(one)).remove)
            yield

    run_blocks(model, run.windows, blocks(model), around, run.progress, run.device, run.dtype)
    return use


def _hears(use: _Use) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        use.add(args[0].reshape(-1, args[0].shape[-1]))

    return hook
