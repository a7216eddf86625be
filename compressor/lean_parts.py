"""Parts of a block that can run lean, found by value: what its modules got and gave on random numbers.

Nothing is looked up by the name or class of a module, apart from nn.Linear and nn.LayerNorm. These are candidates;
lean.py proves each by running the block with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor import lean_modules
from compressor.fold_probe import Probe
from compressor.kernels.lowrank_ffn import ACTIVATIONS
from compressor.lean_modules import become
from compressor.lowrank import LowRankLinear

SAME = 1e-5  # relative, float64 against what runs in float32


@dataclass(frozen=True)
class FeedForward:
    """Names in a block. owner: the module that is all of it; else `between`, the activation's own module, goes."""

    first: str
    gate: str | None
    last: str
    activation: str
    owner: str | None
    between: str | None

    def apply(self, block: nn.Module) -> None:
        first, last = block.get_submodule(self.first), block.get_submodule(self.last)
        span = (first, None if self.gate is None else block.get_submodule(self.gate), last)
        if self.owner is None:
            assert self.between is not None
            become(first, lean_modules.Through)
            block.set_submodule(self.between, nn.Identity())
        place = last if self.owner is None else block.get_submodule(self.owner)
        become(place, lean_modules.FFN, span=span, activation=self.activation)

    @property
    def names(self) -> list[str]:
        return [n for n in (self.first, self.gate, self.last) if n]


@dataclass(frozen=True)
class SelfAttention:
    """Names in a block; `owner` is the module that takes hidden states and gives the context."""

    names: tuple[str, str, str]
    owner: str
    heads: int
    masked: int | str | None
    rest: int | None

    def apply(self, block: nn.Module) -> None:
        span = tuple(map(block.get_submodule, self.names))
        told = {"heads": self.heads, "masked": self.masked, "rest": self.rest}
        become(block.get_submodule(self.owner), lean_modules.Attention, span=span, **told)


@dataclass(frozen=True)
class Context:
    """Names in a block: the linear that alone takes what `owner`, a SelfAttention, gives."""

    names: tuple[str]
    owner: str

    def apply(self, block: nn.Module) -> None:
        out, attention = block.get_submodule(self.names[0]), block.get_submodule(self.owner)
        if isinstance(out, LowRankLinear) and isinstance(attention, lean_modules.Attention):
            become(out, lean_modules.Lift)
            attention.__dict__["out"] = out  # not a child


@dataclass(frozen=True)
class AddNorm:
    """Names in a block; `owner` gives norm(linear(x) + residual)."""

    names: tuple[str]  # the linear
    norm: str
    owner: str

    def apply(self, block: nn.Module) -> None:
        span = (block.get_submodule(self.names[0]), block.get_submodule(self.norm))
        become(block.get_submodule(self.owner), lean_modules.AddNorm, span=span)


def feed_forwards(under: Probe) -> Iterator[FeedForward]:
    """first -> activation (-> times gate) -> last, by value."""
    got, gave = under.inputs[0], under.outputs[0]
    for last in under.linears:
        width = under.linears[last].in_features
        before = [n for n in under.linears if n in gave and n != last and under.linears[n].out_features == width]
        for first, (name, act) in itertools.product(before, ACTIVATIONS.items()):
            hidden = act(gave[first])
            gates = [n for n in before if n != first and _same(got[n], got[first])]
            for gate in (None, *gates):
                if _same(got.get(last), hidden if gate is None else hidden * gave[gate]):
                    yield from _placed(under, FeedForward(first, gate, last, name, None, None))


def _placed(under: Probe, part: FeedForward) -> Iterator[FeedForward]:
    """The part with the module that is all of it, else with its activation's module."""
    got, gave = under.inputs[0], under.outputs[0]
    owner = _common(part.names)
    if owner and _same(got.get(owner), got[part.first]) and _same(gave.get(owner), gave[part.last]):
        yield FeedForward(part.first, part.gate, part.last, part.activation, owner, None)
    elif part.gate is None:
        for name, module in under.block.named_modules():
            alone = name in gave and not any(True for _ in module.parameters()) and name not in under.twice
            if alone and _same(got[name], gave[part.first]) and _same(gave[name], got[part.last]):
                yield FeedForward(part.first, None, part.last, part.activation, None, name)
                return


def attentions(under: Probe, heads: int) -> Iterator[SelfAttention]:
    """Three linears of one input in one module that gives their attention; which is which, the proof says."""
    got = under.inputs[0]
    for owner, calls in under._calls.items():
        inside = [n for n in under.linears if n.startswith(f"{owner}.") and _same(got.get(n), got.get(owner))]
        square = [n for n in inside if under.linears[n].out_features == under.linears[inside[0]].out_features]
        if not owner or len(square) != 3 or not heads or under.linears[square[0]].out_features % heads:
            continue
        args, kwargs = calls[0]
        slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        masks = [key for key, value in slots if isinstance(value, Tensor) and value.dim() == 4]
        result = under.module(owner)(*args, **kwargs)
        rest = len(result) - 1 if isinstance(result, tuple) else None
        for order in itertools.permutations(square):
            yield SelfAttention(order, owner, heads, masks[0] if masks else None, rest)


def contexts(under: Probe, attention: SelfAttention) -> Iterator[Context]:
    """Linears that get the context, by value; that nothing else gets it, the proof says."""
    args, kwargs = under._calls[attention.owner][0]
    result = under.module(attention.owner)(*args, **kwargs)
    context = result[0] if isinstance(result, tuple) else result
    yield from (Context((n,), attention.owner) for n in under.linears if _same(under.inputs[0].get(n), context))


def add_norms(under: Probe) -> Iterator[AddNorm]:
    """linear -> plus the module's second argument -> layer norm, by value: this is the proof too."""
    got, gave = under.inputs[0], under.outputs[0]
    for owner, calls in under._calls.items():
        norms = [n for n, m in under.block.named_modules() if type(m) is nn.LayerNorm and n.startswith(f"{owner}.")]
        linears = [n for n in under.linears if n.startswith(f"{owner}.")]
        args, kwargs = calls[0]
        if not owner or len(norms) != 1 or len(linears) != 1 or len(args) != 2 or kwargs:
            continue
        norm: Any = under.module(norms[0])
        if norm.weight is None or norm.bias is None or not isinstance(args[1], Tensor) or linears[0] not in gave:
            continue
        total = gave[linears[0]] + args[1]
        y = nn.functional.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if _same(got.get(linears[0]), args[0]) and _same(gave.get(owner), y):
            yield AddNorm((linears[0],), norms[0], owner)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel():
        return False
    a, b = a.detach().flatten(), b.detach().flatten()
    return float((a - b).norm()) <= SAME * float(b.norm())


def _common(names: list[str]) -> str:
    """The innermost module that all of these are in."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
