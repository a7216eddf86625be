"""Running a model of low rank without activations of full width (docs/flashsvd.md).

Two linears instead of one save weights, not memory for activations: what is between feed-forward linears, and queries,
keys and values, are as wide as before. `lean` changes how they come about, never what is stored:

    feed-forward   one op that has the hidden activations of a few tokens at a time
    residual       on a GPU, one kernel for what ends each half of a post-norm block, norm(linear(x) + residual)
    attention      one op that lifts q, k and v for a few rows and heads at a time, where nothing (rotary embeddings)
                   stands between them and the scores, and gives its context in the rank space of the next linear
    rows           a block runs a few rows of a batch at a time, unless there is a cache to fill

There is no table of families. Candidates come from what the modules of one block got and gave on random numbers, one
block of each structure; each is proven by running the block with it. What cannot be proven stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor import lean_modules
from compressor import rank_values as rank_values_module
from compressor.blockwise import HIDDEN, Call, base_of
from compressor.fold_probe import Probe, distance
from compressor.lean_modules import become
from compressor.lean_parts import (
    SAME,
    AddNorm,
    Context,
    FeedForward,
    SelfAttention,
    add_norms,
    attentions,
    contexts,
    feed_forwards,
)
from compressor.lowrank import LowRankLinear
from compressor.parts import blocks

ROWS, TOKENS = 3, 8  # of the batch that blocks are probed with: rows are told apart by their number


@dataclass(frozen=True)
class RowByRow:
    by_row: frozenset[int | str]
    within: bool

    def apply(self, block: nn.Module, row_tokens: int | None = None) -> None:
        become(block, lean_modules.Rows, by_row=self.by_row, row_tokens=row_tokens, within=self.within)


@dataclass(frozen=True)
class RankValues:
    """The linear that gives the values, and the size of a head."""

    name: str
    size: int

    def apply(self, block: nn.Module) -> None:
        become(block.get_submodule(self.name), rank_values_module.Values, size=self.size)


Part = FeedForward | SelfAttention | Context | AddNorm | RowByRow | RankValues


@torch.no_grad()
def lean(
    model: nn.Module, *, row_tokens: int | None = None, rank_values: bool = False, dense: bool = False
) -> nn.Module:
    """Change in place how `model` runs; returns it. A model without a LowRankLinear stays as it is.

    row_tokens    how many tokens go through a block together where rows can be parted; None: what suits the device
    rank_values   let the key-value cache hold values in rank space, where a model can (rank_values.py); not for export
    dense         do the same to linears that are not of low rank
    Raises ValueError for a model that runs lean already.
    """
    kind: type[nn.Module] = nn.Linear if dense else LowRankLinear
    if any(isinstance(m, lean_modules.LEAN) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} runs lean already; load it with lean=False first.")
    if not any(isinstance(m, kind) for m in model.modules()):
        return model
    named = [(n, b) for n, b in blocks(model, kind) if any(isinstance(m, kind) for m in b.modules())]
    known: dict[Any, list[Part]] = {}
    wanted = {_structure(block): (name, block) for name, block in reversed(named)}
    calls = _calls(model, [block for _, block in wanted.values()])
    for structure, (_, block) in wanted.items():
        known[structure] = parts_of(block, calls[block], model.config, rank_values)
    for _, block in named:
        parts = known[_structure(block)]
        for part in parts:
            if isinstance(part, RowByRow):
                part.apply(block, row_tokens)
            elif isinstance(part, RankValues):
                if rank_values_module.pays(block.get_submodule(part.name), part.size):
                    part.apply(block)
            elif any(isinstance(block.get_submodule(n), kind) for n in part.names):
                part.apply(block)
        used = {n for part in parts if isinstance(part, FeedForward) for n in part.names}
        for name, module in block.named_modules():
            if type(module) is LowRankLinear and name not in used:
                become(module, lean_modules.Single)
    if any(isinstance(m, rank_values_module.Values) for m in model.modules()):
        rank_values_module.register(model)
    return model


def parts_of(
    block: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], config: Any, rank_values: bool = False
) -> list[Part]:
    """What of a block can run lean, each proven; `call` is how the model calls it. The block is only read."""
    heads = getattr(config, "num_attention_heads", 0)
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    given = Call(
        tuple(HIDDEN if a is hidden else a for a in args),
        {k: HIDDEN if v is hidden else v for k, v in kwargs.items()},
        hidden.shape,
    )
    under = Probe(_dense(block), given, torch.float64)
    found: list[Part] = []
    candidates: list[Iterator[FeedForward | SelfAttention]] = [feed_forwards(under), attentions(under, heads)]
    for part in itertools.chain(*candidates):
        taken = {n for p in found if isinstance(p, FeedForward | SelfAttention) for n in p.names}
        if not taken & set(part.names) and _proven(under, part):
            found.append(part)
    attended = [part for part in found if isinstance(part, SelfAttention)]
    found += [c for part in attended for c in contexts(under, part) if _proven_low(under, c.names[0], part, c)]
    found += add_norms(under)
    if rank_values:
        size = rank_values_module.head_size(config)
        tried = (RankValues(n, size) for n, m in under.linears.items() if m.out_features % size == 0)
        found += list(itertools.islice((part for part in tried if _proven_low(under, part.name, part)), 1))
    by_row: set[int | str] = {i for i, a in enumerate(args) if isinstance(a, Tensor) and len(a) == ROWS}
    by_row |= {k for k, v in kwargs.items() if isinstance(v, Tensor) and len(v) == ROWS}
    rows = RowByRow(frozenset(by_row), any(isinstance(part, SelfAttention) for part in found))
    return [*found, rows] if _proven(under, rows) else found


def _structure(block: nn.Module) -> Any:
    """Equal for blocks of the same modules, whatever stands in a linear's place, its rank and its format."""
    inside = {n for n, m in block.named_modules() if isinstance(m, LowRankLinear)}
    kept = []
    for name, module in block.named_modules():
        if name.rpartition(".")[0] not in inside:
            linear = name in inside or hasattr(module, "in_features")
            kept.append((name, "linear" if linear else type(module)))
    return type(block), tuple(kept)


def _dense(block: nn.Module) -> nn.Module:
    """A copy with random dense linears in the place of all that stands for one: structure does not hang on weights."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        if id(module) not in memo and (isinstance(module, LowRankLinear) or hasattr(module, "in_features")):
            bias = getattr(module, "bias", None) is not None or getattr(module, "up", None) is not None
            memo[id(module)] = nn.Linear(int(module.in_features), int(module.out_features), bias)  # type: ignore
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for made in memo.values():
            nn.init.normal_(made.weight, std=made.in_features**-0.5)
    return copy.deepcopy(block, memo).cpu()


def _calls(model: nn.Module, wanted: list[nn.Module]) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """How the model calls these blocks for ROWS texts, padded on the left, on the right and not at all."""

    class Enough(Exception):
        pass

    found: dict[nn.Module, Any] = {}

    def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(block, (args, kwargs))
        if len(found) == len(wanted):
            raise Enough

    config: Any = model.config
    device = next(model.parameters()).device
    tokens = torch.randint(config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(tokens)
    mask[0, :2], mask[1, -3:] = 0, 0
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in wanted]
    try:
        with contextlib.suppress(Enough):
            base = base_of(model)
            cache = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
            base(input_ids=tokens, attention_mask=mask, **cache)
    finally:
        for handle in handles:
            handle.remove()
    return {b: found[b] for b in wanted}


def _proven(under: Probe, part: Part) -> bool:
    """Whether the block gives what it gave when this part runs lean."""
    block = copy.deepcopy(under.block)
    if isinstance(part, RowByRow):
        part.apply(block, row_tokens=1)
    else:
        part.apply(block)
    try:
        results = [under.call.run(block, got[""].detach()) for got in under.inputs]
    except (RuntimeError, TypeError, KeyError):  # another order of arguments, another shape: not this
        return False
    return distance(results, under.results) <= SAME * distance(under.results)


def _proven_low(under: Probe, name: str, *parts: Part) -> bool:
    """Whether a block gives the same with these parts as without them where this linear has low rank."""
    block = copy.deepcopy(under.block)
    dense: Any = block.get_submodule(name)
    n, k = dense.out_features, dense.in_features
    made = LowRankLinear.shaped(n, k, min(n, k) // 3 + 1, bias=dense.bias is not None)
    made = made.to_empty(device="cpu").to(torch.float64)
    for p in made.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    block.set_submodule(name, made)
    hidden = [got[""].detach() for got in under.inputs]
    expected = [under.call.run(block, h) for h in hidden]
    for part in parts:
        part.apply(block)
    try:
        with rank_values_module.standing_in():
            results = [under.call.run(block, h) for h in hidden]
    except (RuntimeError, TypeError, KeyError, ValueError):
        return False
    return distance(results, expected) <= SAME * distance(expected)
