"""In which modules a model differs from the one that its config describes: what steps that change shapes leave behind.

Nobody has to keep book: `between` finds the difference by comparing with the config's own model, `reshape` makes it
again in an empty one. A linear can be replaced by one of another shape (pruned widths, per layer), by one of low rank
or by one that skips small inputs; an activation by one that gives large values only; a feed-forward layer by one in
parts, and a layer of experts by one that keeps fewer of them, whose linears can be replaced in turn. What a config can
say itself (a width that all layers share, the number of layers) is no difference.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.experts import put
from compressor.fewer_experts import FewerExperts
from compressor.lowrank import LowRankLinear
from compressor.routed import RoutedFFN
from compressor.sparse import SparseActivation, SparseLinear


@dataclass(frozen=True)
class Shaped:
    """The class and shape of one module; `attributes` are JSON and the arguments that make it."""

    kind: str  # one of KINDS
    attributes: dict[str, Any] = field(default_factory=dict)

    def module(self, before: nn.Module) -> nn.Module:
        """It, without values, on the meta device, in the place of `before`, whose children it may take over.

        Raises ModelError for a kind that this version does not know.
        """
        if self.kind not in KINDS:
            raise ModelError(f"config.json: unknown structure '{self.kind}'; known: {', '.join(KINDS)}.")
        made = KINDS[self.kind](**self.attributes)
        return made.adopt(before) if isinstance(made, FewerExperts) else made

    def __str__(self) -> str:
        a = self.attributes
        if self.kind == "sparse_activation":
            return f"{self.kind} {a['activation']}"
        if self.kind == "routed_ffn":
            return f"feed-forward layer of {a['experts']} experts, {a['top_k']} for each token"
        if self.kind == "fewer_experts":
            return f"layer of {a['experts']} experts with up to {a['parts']['routing']['top_k']} for each token"
        rank = f", rank {a['rank']}" if "rank" in a else ""
        return f"{self.kind} {a['out_features']}x{a['in_features']}{rank}"


def _linear(out_features: int, in_features: int, bias: bool) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias, device="meta")


KINDS: dict[str, Any] = {
    "linear": _linear,
    "lowrank_linear": LowRankLinear.shaped,
    "sparse_linear": SparseLinear.shaped,
    "sparse_activation": SparseActivation.shaped,
    "routed_ffn": RoutedFFN.shaped,
    "fewer_experts": FewerExperts.shaped,
}

Structure = dict[str, Shaped]


def shape_of(module: nn.Module) -> Shaped | None:
    """What `module` is, None where it is no kind of linear, no sparse activation and no layer of ours."""
    if isinstance(module, SparseLinear):
        bias = getattr(module.inner, "bias", None)
        said: dict[str, Any] = {"rank": module.rank, "tokens": module.tokens}
        return Shaped("sparse_linear", _size(module) | said | {"bias": bias is not None})
    if isinstance(module, SparseActivation):
        told = {"activation": module.activation, "tokens": module.tokens}
        return Shaped("sparse_activation", {"features": len(module.get_buffer("threshold"))} | told)
    if isinstance(module, RoutedFFN):
        return Shaped("routed_ffn", module.attributes())
    if isinstance(module, FewerExperts):
        return Shaped("fewer_experts", module.attributes())
    if isinstance(module, LowRankLinear):
        own: dict[str, Any] = {"rank": module.rank, "pivoted": module.pivoted}
        bias = getattr(module.up, "bias", None)
        return Shaped("lowrank_linear", _size(module) | own | {"bias": bias is not None})
    if isinstance(module, nn.Linear):
        return Shaped("linear", _size(module) | {"bias": module.bias is not None})
    return None


def _size(module: Any) -> dict[str, Any]:
    return {"out_features": module.out_features, "in_features": module.in_features}


def between(stock: nn.Module, model: nn.Module) -> Structure:
    """The modules of `model` whose shape is not that of `stock`, by name. Raises ModelError where `stock` lacks one."""
    known = dict(stock.named_modules())
    found: Structure = {}
    for name, module in model.named_modules():
        shaped = shape_of(module)
        if shaped is None or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if name not in known:
            raise ModelError(f"{name} is not in the {type(stock).__name__} of the config; change the config with it.")
        if shaped != shape_of(known[name]):
            found[name] = shaped
            if isinstance(module, RoutedFFN | FewerExperts):
                inside = between(shaped.module(known[name]), module)
                found |= {f"{name}.{inner}": s for inner, s in inside.items()}
    return found


def reshape(model: nn.Module, structure: Mapping[str, Shaped]) -> nn.Module:
    """Put modules without values in the places that `structure` names; returns `model`."""
    for name in sorted(structure):  # a layer in parts before its linears
        put(model, name, structure[name].module(model.get_submodule(name)))
    return model


def hollow(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters have shapes but no values; shared ones stay shared."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(b): b for b in model.buffers()}})


def unit_of(model: nn.Module, name: str) -> str:
    """The name that the linear `name` had in the original: that of the low-rank or sparse one which it is a part of."""
    owner = name.rpartition(".")[0]
    return owner if isinstance(model.get_submodule(owner), LowRankLinear | SparseLinear) else name


def as_json(structure: Mapping[str, Shaped]) -> list[dict[str, Any]]:
    """[{kind, attributes, names}], the modules of one shape together."""
    groups: dict[str, dict[str, Any]] = {}
    for name in sorted(structure):
        group = {"kind": structure[name].kind, "attributes": structure[name].attributes}
        groups.setdefault(json.dumps(group, sort_keys=True), {**group, "names": []})["names"].append(name)
    return list(groups.values())


def from_json(groups: list[dict[str, Any]]) -> Structure:
    """The inverse of `as_json`. Raises KeyError for what is missing in one of them."""
    return {n: Shaped(group["kind"], dict(group["attributes"])) for group in groups for n in group["names"]}
