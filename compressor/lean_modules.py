"""How parts of a model of low rank run without activations of full width: classes that take a module's place in `lean`.

A module keeps its children, parameters and names and gets a subclass of its own class, whose forward is the lean one;
nothing that is stored or looked up by name changes. What cannot run lean (gradients, a cache that grows with the
rows) runs as it always did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels import lowrank_attention, lowrank_ffn, lowrank_linear, native
from compressor.kernels.lowrank_linear import Factors
from compressor.lowrank import LowRankLinear

# Tokens whose rows go through a block together, and those where attention and feed-forward are lean themselves: on a
# GPU parting rows again would only be more launches.
ROW_TOKENS, LEAN_ROW_TOKENS, CPU_ROW_TOKENS = 8192, 32768, 1024
ADD_NORM_FEATURES = 8192  # at most, that one program of kernels/add_norm.py holds in registers


def become(module: nn.Module, part: type[nn.Module], **told: Any) -> None:
    """`module` is of a subclass of its class and of `part` from here on, with the attributes `told`."""
    module.__class__ = type(f"{part.__name__}{type(module).__name__}", (part, type(module)), {})
    vars(module).update(told)


def factors(module: nn.Module | None) -> Factors | None:
    """What the ops take of a linear, None for one that only its own forward can compute (quantized, pivoted)."""
    if isinstance(module, LowRankLinear):
        down, up = module.down, module.up
        if type(down) is nn.Linear and type(up) is nn.Linear and not module.pivoted:
            return down.weight, up.weight, up.bias
    elif isinstance(module, nn.Linear) and _kind(module) is nn.Linear:
        return module.weight, None, module.bias
    return None


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class before `become`."""
    return next(k for k in type(module).__mro__ if issubclass(k, nn.Module) and not issubclass(k, (Through, FFN)))


def differentiated(*given: Any) -> bool:
    """Whether gradients are wanted of any of these tensors: the ops have none."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)


def _takes_ops(x: Tensor) -> bool:
    """While a graph is traced, and where a fused kernel is; elsewhere a call less."""
    return torch.compiler.is_exporting() or (x.device.type == "cpu" and native.built())


def one_product(x: Tensor, span: tuple[nn.Module | None, ...]) -> None:
    """On a GPU, where launches count: lay the downs of linears with a common input where one product reads them all."""
    downs = [m.down.weight for m in span if isinstance(m, LowRankLinear)]
    if x.is_cuda and len(downs) > 1:
        lowrank_linear.side_by_side(downs)  # type: ignore[arg-type]


def low_rank(module: LowRankLinear, x: Tensor) -> Tensor:
    """One op while a graph is traced, unless its factors are no plain linears; otherwise two linears, as ever."""
    down, up = module.down, module.up
    if not torch.compiler.is_exporting() or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return LowRankLinear.forward(module, x)
    return lowrank_linear.lowrank_linear(x, down.weight, up.weight, up.bias, down.bias, module.order)


class Single(LowRankLinear):
    """One node of a graph; otherwise two linears, as ever."""

    def forward(self, x: Tensor) -> Tensor:
        return low_rank(self, x)


class Lift(Single):
    """The linear behind attention, which has applied its first factor already to what it gives, piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        given = factors(self)
        if given is None or given[1] is None or x.shape[-1] == self.in_features:
            return super().forward(x)
        return lowrank_linear.product(x, (given[1], None, given[2]))


class Through(nn.Module):
    """The first linear of a feed-forward that the last one computes, and the activation between them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FFN(nn.Module):
    """`span`: (first linear, the one that multiplies it or None, last linear), not registered a second time."""

    span: tuple[nn.Module, nn.Module | None, nn.Module]
    activation: str

    def forward(self, x: Tensor) -> Tensor:
        first, gate, last = (factors(m) for m in self.span)
        if differentiated(x, *(t for f in (first, gate, last) if f for t in f)):
            return self._some(x)
        if first is None or last is None or (gate is None) != (self.span[1] is None):
            return self._in_chunks(x)
        if _takes_ops(x):
            flat = [t for f in (first, gate, last) for t in f or (None, None, None)]
            return lowrank_ffn.lowrank_ffn(x, *flat, self.activation)
        one_product(x, self.span[:2])
        return lowrank_ffn.chunked(x, first, gate, last, self.activation)

    def _some(self, x: Tensor) -> Tensor:
        first, gate, last = (None if m is None else _own(m) for m in self.span)
        hidden = lowrank_ffn.ACTIVATIONS[self.activation](first(x))  # type: ignore[misc]
        return last(hidden if gate is None else hidden * gate(x))  # type: ignore[misc]

    def _in_chunks(self, x: Tensor) -> Tensor:
        """By the modules themselves, a few tokens at a time."""
        if torch.compiler.is_exporting():
            return self._some(x)
        flat, last = x.reshape(-1, x.shape[-1]), self.span[2]
        step = lowrank_ffn.tokens_at_once(x, int(last.in_features), self.span[1] is not None)  # type: ignore[arg-type]
        y = x.new_empty((len(flat), int(last.out_features)))  # type: ignore[arg-type]
        for start in range(0, len(flat), step):
            y[start : start + step] = self._some(flat[start : start + step])
        return y.view(*x.shape[:-1], y.shape[-1])


def _own(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a module computes by itself, also where it lets everything through now, or ends a feed-forward."""
    if isinstance(module, LowRankLinear):
        return functools.partial(low_rank, module)
    return functools.partial(_kind(module).forward, module)


class Rows(nn.Module):
    """A block whose rows know nothing of each other, some rows at a time.

    by_row       positions and names of arguments that have a row each
    row_tokens   that go together; None: as many as suit the device
    within       attention of the block is lean
    """

    by_row: frozenset[int | str]
    row_tokens: int | None
    within: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, length = hidden.shape[:2]
        suits = CPU_ROW_TOKENS if hidden.device.type == "cpu" else LEAN_ROW_TOKENS if self.within else ROW_TOKENS
        limit = self.row_tokens or suits
        step = max(1, limit // max(1, length))
        grows = any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values()))
        if rows <= step or grows or torch.compiler.is_exporting() or (torch.is_grad_enabled() and hidden.requires_grad):
            return super().forward(*args, **kwargs)

        def share(key: int | str, value: Any, some: slice) -> Any:
            return value[some] if key in self.by_row and isinstance(value, Tensor) and len(value) == rows else value

        y: Any = None
        for start in range(0, rows, step):
            some = slice(start, start + step)
            part = super().forward(
                *(share(i, value, some) for i, value in enumerate(args)),
                **{name: share(name, value, some) for name, value in kwargs.items()},
            )
            y = _room(part, rows) if y is None else y
            _put(y, part, some)
            del part  # before the next one is there
        return y


def _room(part: Any, rows: int) -> Any:
    """Like what a block gives for a few rows, for all of them."""
    if isinstance(part, Tensor):
        return part.new_empty((rows, *part.shape[1:]))
    return type(part)(_room(p, rows) for p in part) if isinstance(part, (tuple, list)) else part


def _put(y: Any, part: Any, some: slice) -> None:
    if isinstance(part, Tensor):
        y[some] = part
    elif isinstance(part, (tuple, list)):
        for whole, piece in zip(y, part, strict=True):
            _put(whole, piece, some)


class Attention(nn.Module):
    """Self-attention without positions of its own, from q, k and v in rank space (kernels/lowrank_attention.py).

    span      the linears that give q, k and v
    out       the one that takes the context, where it is a Lift
    masked    position or name of the argument that is the mask, None where there is none
    rest      what it gives behind the context: as many None
    """

    span: tuple[nn.Module, nn.Module, nn.Module]
    out: Lift | None = None
    heads: int
    masked: int | str | None
    rest: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        grows = any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values()))
        weights = [known for m in self.span if (known := factors(m)) is not None]
        wanted = kwargs.get("output_attentions") or differentiated(x, *(t for one in weights for t in one))
        if grows or len(weights) < len(self.span) or wanted:
            return super().forward(*args, **kwargs)
        mask = args[self.masked] if isinstance(self.masked, int) and len(args) > self.masked else None
        mask = kwargs.get(self.masked) if isinstance(self.masked, str) else mask
        width = self.span[0].out_features
        last = (mask, self.heads, self.heads, (int(width) // self.heads) ** -0.5, False)  # type: ignore[arg-type]
        if torch.compiler.is_exporting():
            given = [
                (nn.functional.linear(x, down, bias if up is None else None), up, None if up is None else bias)
                for down, up, bias in weights
            ]
            y = lowrank_attention.lowrank_attention(*(t for part in zip(*given, strict=True) for t in part), *last)
        else:
            y = self._in_pieces(x, weights, *last)
        return y if self.rest is None else (y, *[None] * self.rest)

    def _in_pieces(self, x: Tensor, weights: list[Factors], mask: Tensor | None, *last: Any) -> Tensor:
        """Some rows at a time, so that what is in rank space is only theirs too; of the whole context there is, where
        the next linear is a Lift, only what is left of it in that one's rank space."""
        one_product(x, self.span)
        rows, length = x.shape[:2]
        width = int(self.span[0].out_features)  # type: ignore[arg-type]
        down = None if self.out is None else self._narrower(x)
        pieces = lowrank_attention.pieces(rows, 3 * length * width * x.element_size(), x.is_cuda, down is not None)
        y = x.new_empty((rows, length, width if down is None else len(down))) if len(pieces) > 1 else None
        for some in pieces:
            part = x[some]
            entered = lowrank_linear.into_ranks(part.flatten(0, 1), weights)
            q, k, v = ((z.unflatten(0, part.shape[:2]), up, bias) for z, up, bias in entered)
            own = mask[some] if mask is not None and mask.dim() == 4 and len(mask) == rows else mask
            found = lowrank_attention.chunked(q, k, v, own, *last)
            if y is None:
                return found if down is None else nn.functional.linear(found, down)
            if down is None:
                y[some] = found
            else:
                torch.mm(found.flatten(0, 1), down.t(), out=y[some].flatten(0, 1))
            del entered, q, k, v, found  # before the next ones are there
        assert y is not None
        return y

    def _narrower(self, x: Tensor) -> Tensor | None:
        """The first factor of the linear behind, in the dtype of x, if there is less behind it than before it."""
        assert self.out is not None
        given = factors(self.out)
        fits = given is not None and given[1] is not None and len(given[0]) < self.out.in_features
        return given[0].to(x.dtype) if fits and not differentiated(*given) else None  # type: ignore[index, misc]


class AddNorm(nn.Module):
    """norm(linear(x) + residual), as the module has it itself; on a GPU in one kernel behind the linear.

    span   the linear and the nn.LayerNorm
    """

    span: tuple[nn.Module, nn.LayerNorm]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        linear, norm = self.span
        fits = x.is_cuda and x.dtype.itemsize <= 4 and norm.weight.numel() <= ADD_NORM_FEATURES
        if not fits or self.training or differentiated(x, residual, norm.weight) or torch.compiler.is_exporting():
            return super().forward(x, residual)
        from compressor.kernels import add_norm

        return add_norm.add_norm_(linear(x), residual, norm.weight, norm.bias, norm.eps)


LEAN = (Single, Lift, Through, FFN, Rows, Attention, AddNorm)
