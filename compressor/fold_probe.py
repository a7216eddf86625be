"""One block under test: run in float64 on random hidden states, with what each of its modules got and gave.

folds.py asks three questions of it. Whose output does a module read (`reads`)? Which row of a linear becomes which
channel of an input (`copied`, `linear_in`)? Is a change of some parameters one that nobody downstream notices
(`unchanged`)? Nothing is looked up by the name or class of a module, apart from nn.Linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import Call, device_of

ROUNDS, MOST_ROUNDS = 2, 32  # more than 2 only until every linear, that of a rare expert too, has had a token
REPEATS = 4  # windows of one repeated token; so many values tell the rows of a linear apart
# Relative. In float64, models that compute a norm or softmax in float32 are off by 1e-7; a wrong fold is off by 1.
SAME = {torch.float64: 1e-5, torch.float32: 1e-4}
CHUNK = 512  # channels whose distances to all rows are held at a time

Round = dict[str, Tensor]


def probe(block: nn.Module, call: Call) -> Probe:
    """In float64, else, where an op of the block has none (grouped products of fused experts), in float32."""
    try:
        return Probe(block, call, torch.float64)
    except RuntimeError:
        return Probe(block, call, torch.float32)


class Probe:
    """A copy of one block; names are relative to the block. The block itself is only read."""

    def __init__(self, block: nn.Module, call: Call, dtype: torch.dtype, seed: int = 0):
        self.block = copy.deepcopy(block).to(dtype).eval().requires_grad_(False)
        self.same = SAME[dtype]
        self.linears = {n: m for n, m in self.block.named_modules() if isinstance(m, nn.Linear)}
        self.twice: set[str] = set()  # modules that run more than once a forward
        self.inputs: list[Round] = []  # per round, the first tensor that each module with parameters got
        self.outputs: list[Round] = []  # per round, what it gave; of a linear, a leaf of the graph
        self.results: list[Tensor] = []  # per round, what the block gave
        self._calls: dict[str, list[tuple[Any, Any]]] = {}  # per module, (args, kwargs) over the rounds
        self.call = replace(call, args=_cast(call.args, dtype), kwargs=_cast(call.kwargs, dtype))
        device = device_of(self.block)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        while len(self.inputs) < ROUNDS or (self.unseen and len(self.inputs) < MOST_ROUNDS):
            self._run(draw(*call.shape), self.inputs, self.outputs, keep=True)
        self._repeated: tuple[list[Round], list[Round]] = ([], [])
        for _ in range(REPEATS):
            hidden = draw(*call.shape[:-2], 1, call.shape[-1]).expand(call.shape).contiguous()
            self._run(hidden, *self._repeated, keep=False)

    @property
    def unseen(self) -> set[str]:
        """Linears that got no token in any round."""
        return {name for name in self.linears if not any(name in seen for seen in self.inputs)}

    def module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)

    def norms(self, features: int) -> list[str]:
        """Modules with a weight [features] of their own that ran."""
        return [n for n, m in self._weighted() if n in self._calls and tuple(m.weight.shape) == (features,)]

    def readers(self, features: int) -> list[str]:
        """Modules with a weight [., features] of their own that ran: linears, and routers that are none."""
        found = []
        for name, module in self._weighted():
            if name in self._calls and module.weight.dim() == 2 and module.weight.shape[1] == features:
                found.append(name)
        return found

    def reads(self, reader: str, producer: str) -> bool:
        """Whether every token that `reader` got is an output of `producer`, bit for bit.

        By value and not by identity: between a norm and the experts lie a view and a choice of tokens.
        """
        seen = False
        for inputs, outputs in zip(self.inputs, self.outputs, strict=True):
            if reader not in inputs:
                continue
            if producer not in outputs or not _rows(inputs[reader]) <= _rows(outputs[producer]):
                return False
            seen = True
        return seen

    def copied(self, producer: str, consumer: str) -> Tensor | None:
        """[K] the row of `producer` that each channel of `consumer`'s input averages over tokens, or None.

        Where all tokens are one, attention averages equal values: what comes out is what went in, whatever the
        layout of heads, their sharing (GQA) and the place of the values in a fused linear.
        """
        inputs, outputs = self._repeated
        if not all(consumer in i and producer in o for i, o in zip(inputs, outputs, strict=True)):
            return None
        wanted = torch.stack([_tokens(i[consumer])[-1] for i in inputs])
        given = torch.stack([_tokens(o[producer])[-1] for o in outputs])
        return _match(wanted.detach(), given.detach(), self.same)

    @torch.enable_grad()
    def linear_in(self, consumer: str) -> list[tuple[str, Tensor, bool]]:
        """(producer, rows [K], alone): linears whose rows act on one channel of `consumer`'s input each, in proportion.

        Euler: x is homogeneous of degree 1 in p exactly where p dx/dp = x. That holds for u in act(g) u and for ReLU's
        argument, not for that of GELU, and says which row acts on which channel. `alone`: nothing else acts on x.
        """
        wanted: list[Tensor] = []
        products: dict[str, list[Tensor]] = {}
        for inputs, outputs in zip(self.inputs, self.outputs, strict=True):
            x = inputs.get(consumer)
            if x is None or not x.requires_grad:
                continue
            leaves = {n: p for n, p in outputs.items() if n in self.linears}
            slopes = torch.autograd.grad(x.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
            wanted.append(_tokens(x.detach()))
            for (name, p), slope in zip(leaves.items(), slopes, strict=True):
                if slope is not None:
                    products.setdefault(name, []).append(_tokens(p.detach() * slope))
        found = []
        for name, parts in products.items():
            if len(parts) != len(wanted) or any(len(a) != len(b) for a, b in zip(parts, wanted, strict=True)):
                continue
            given = torch.cat(parts)
            rows = _match(torch.cat(wanted), given, self.same)
            if rows is not None:
                rest = given.clone()
                rest[:, rows] = 0
                found.append((name, rows, len(products) == 1 and not rest.any()))
        return found

    def weight_offset(self, norm: str) -> float | None:
        """What `norm` adds to its weight before it multiplies: 0, or 1 as in Gemma; None where neither fits."""
        module: Any = self.module(norm)
        held = dict(module._parameters)
        try:
            if held.get("bias") is not None:
                module.bias = nn.Parameter(torch.zeros_like(module.bias), False)
            for offset in (0.0, 1.0):
                module.weight = nn.Parameter(torch.full_like(module.weight, -offset), False)
                if not any(y.any() for y in self._results(norm)):
                    return offset
            return None
        finally:
            module._parameters.update(held)

    def unchanged(self, touched: Iterable[str], part: Callable[[], None], rest: Callable[[], None]) -> bool:
        """Whether `part` changes what comes out, and `rest` after it brings that back; parameters are put back.

        Judged at the smallest module that runs all of `touched`: what it gives is all that others see of them. The
        change that `part` makes is the measure, so that a large residual stream hides nothing.
        """
        names = list(touched)
        scope = self._scope(names)
        held = {name: dict(self.module(name)._parameters) for name in names}
        try:
            before = self._results(scope)
            part()
            apart = distance(self._results(scope), before)
            rest()
            left = distance(self._results(scope), before)
        finally:
            for name, parameters in held.items():
                self.module(name)._parameters.update(parameters)
        return apart > 1e-9 * distance(before) and left <= self.same * apart

    def _weighted(self) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in self.block.named_modules() if isinstance(m._parameters.get("weight"), Tensor)]

    def _scope(self, names: list[str]) -> str:
        parts = [name.split(".") for name in names]
        common = 0
        while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
            common += 1
        while (scope := ".".join(parts[0][:common])) not in self._calls:
            common -= 1
        return scope

    @torch.no_grad()
    def _results(self, name: str) -> list[Tensor]:
        """All tensors that the module gives for what it got in each round."""
        module = self.module(name)
        return [t for args, kwargs in self._calls[name] for t in _tensors(module(*args, **kwargs))]

    def _run(self, hidden: Tensor, inputs: list[Round], outputs: list[Round], keep: bool) -> None:
        got: Round = {}
        gave: Round = {}

        def before(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                if keep:
                    self._calls.setdefault(name, []).append((_detached(args), _detached(kwargs)))
                if name in got:
                    self.twice.add(name)
                first = next(_tensors((args, kwargs)), None)
                if first is not None:
                    got[name] = first

            return hook

        def after(name: str) -> Callable[..., Any]:
            def hook(_: nn.Module, args: Any, out: Any) -> Any:
                if not isinstance(out, Tensor):
                    return None
                if name not in self.linears:
                    gave[name] = out.detach()
                    return None
                gave[name] = out.detach().requires_grad_()
                return gave[name] * 1  # not the leaf itself, which nothing may change in place

            return hook

        handles: list[Any] = []
        for name, module in self.block.named_modules():
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        try:
            with torch.enable_grad():
                result = self.call.run(self.block, hidden)
        finally:
            for handle in handles:
                handle.remove()
        if keep:
            self.results.append(result)
        inputs.append(got)
        outputs.append(gave)


def _match(wanted: Tensor, given: Tensor, same: float) -> Tensor | None:
    """[K] int64 rows with given[:, rows] equal to wanted; wanted [S, K], given [S, N]; None where there are none."""
    count, available = wanted.shape[1], given.shape[1]
    near = same * wanted.norm(dim=0).clamp_min(1e-12)
    for first in {0, available - count} if available >= count else set():  # as they are, or the end of a fused linear
        if bool(((given[:, first : first + count] - wanted).norm(dim=0) <= near).all()):
            return torch.arange(first, first + count, device=wanted.device)
    if not bool((wanted != 0).any(0).all()):
        return None  # a channel that is always zero looks like every other one
    found = []
    for part, limit in zip(wanted.T.split(CHUNK), near.split(CHUNK), strict=True):
        distance, row = torch.cdist(part, given.T, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        if bool((distance > limit).any()):
            return None
        found.append(row)
    return torch.cat(found)


def distance(values: list[Tensor], others: list[Tensor] | None = None) -> float:
    """The norm of all differences together; NaN where shapes differ, which no comparison lets pass."""
    if others is None:
        others = [torch.zeros_like(v) for v in values]
    if [v.shape for v in values] != [o.shape for o in others]:
        return float("nan")
    return sum((v.double() - o.double()).square().sum().item() for v, o in zip(values, others, strict=True)) ** 0.5


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows(x: Tensor) -> set[bytes]:
    return {row.tobytes() for row in _tokens(x.detach()).cpu().numpy()}


def _tensors(value: Any) -> Iterator[Any]:
    """Floating-point tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return _mapped(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _detached(value: Any) -> Any:
    return _mapped(value, lambda t: t.detach().clone())  # a later module may write into it
