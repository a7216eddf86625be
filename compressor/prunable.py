"""What can be cut out of a block without a trace: channels of a feed-forward layer, groups of attention heads.

A unit is what stays or goes as a whole: one channel between gate/up and down, or one key-value head with the query
heads that share it. There is no table of families. Which rows of which linears make which input channel of which other
linear is read from the derivatives of a block (FFN) or from what attention copies (heads), and what is found is proven:
with half of the units cut out, the block must give what it gives with the reader's columns for them at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import sites
from compressor.fold_probe import Probe, distance
from compressor.folds import folds_of, probes
from compressor.parts import blocks
from compressor.structure import hollow

TOKENS = 64  # of the table of a model that is only there to be probed


@dataclass(frozen=True)
class Prunable:
    """Units that can be cut out together. Names are of linears of the model.

    kind     "ffn" (a unit is a channel) or "heads" (a unit is a key-value head and its query heads)
    readers  the linears whose input the units are: down_proj, o_proj; a calibration Site's names
    columns  [K] int64, the unit of each of the readers' input channels
    rows     per producer [N] int64, the unit of each of its rows: gate and up, or q, k and v
    units    how many there are
    """

    kind: Literal["ffn", "heads"]
    readers: tuple[str, ...]
    columns: Tensor = field(compare=False)
    rows: Mapping[str, Tensor] = field(compare=False)
    units: int

    def renamed(self, prefix: str) -> Prunable:
        return replace(
            self,
            readers=tuple(prefix + name for name in self.readers),
            rows={prefix + name: rows for name, rows in self.rows.items()},
        )


def find_prunable(model: nn.Module) -> list[Prunable]:
    """Everything that can be cut out, in the order of the blocks; what is not proven is absent.

    Which linears belong together follows from the modules and not from their values, so one block of each shape is
    looked at, with values of its own: `model` is only read, and may be one without values.
    Raises ModelError for a model that cannot run block by block.
    """
    toy, alike = _toy(model)
    by_example: dict[str, list[Prunable]] = {}
    for prefix, under, inside in probes(toy, sites(toy)):
        heads = _heads(under, inside)
        ffns = (_ffn(under, readers) for readers in inside if not under.unseen & set(readers))
        by_example[prefix] = [one for one in (heads, *ffns) if one is not None]
    return [one.renamed(f"{name}.") for name, example in alike.items() for one in by_example.get(f"{example}.", [])]


def _toy(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A model with one block of each shape, random values and few tokens; {block of `model`: its example in there}."""
    named = blocks(model)
    holder = named[0][0].rpartition(".")[0]
    shapes = [str([(n, type(m), *(p.shape for p in m._parameters.values() if p is not None))
                   for n, m in block.named_modules()]) for _, block in named]  # fmt: skip
    examples = list(dict.fromkeys(shapes))
    toy = hollow(model)
    inside = toy.get_submodule(holder)
    toy.set_submodule(holder, nn.ModuleList([inside[shapes.index(shape)] for shape in examples]))  # type: ignore[index]
    table: Any = toy.get_input_embeddings()  # type: ignore[operator]
    table.weight, table.padding_idx = nn.Parameter(table.weight[:TOKENS]), None
    generator = torch.Generator().manual_seed(0)
    head = toy.get_output_embeddings()  # type: ignore[operator]
    for module in toy.modules():
        for name, p in module._parameters.items() if module is not head else ():
            if p is not None:
                drawn = torch.randn(p.shape, generator=generator)
                value = drawn * p.shape[-1] ** -0.5 if p.dim() > 1 else 1 + 0.1 * drawn
                module._parameters[name] = nn.Parameter(value, False)
    alike = {name: f"{holder}.{examples.index(shape)}" for (name, _), shape in zip(named, shapes, strict=True)}
    return toy.eval(), alike


def cut(model: nn.Module, what: Prunable, keep: Tensor, reader_weights: Mapping[str, Tensor] | None = None) -> None:
    """Leave the units `keep` [M] only, in ascending order. Linears of `model` are replaced, never written into.

    reader_weights   what the readers multiply the kept channels with, [N, K'] each; their own columns where absent
    """
    for name, rows in what.rows.items():
        layer: Any = model.get_submodule(name)
        kept = _places(rows, keep).to(layer.weight.device)
        bias = None if layer.bias is None else layer.bias.detach()[kept]
        model.set_submodule(name, linear_like(layer, layer.weight.detach()[kept], bias))
    for name in what.readers:
        layer = model.get_submodule(name)
        weight = (reader_weights or {}).get(name)
        if weight is None:
            weight = layer.weight.detach()[:, _places(what.columns, keep).to(layer.weight.device)]
        model.set_submodule(name, linear_like(layer, weight.to(layer.weight), layer.bias))


def pad(model: nn.Module, what: Prunable, keep: Tensor, units: int) -> None:
    """After `cut` of a feed-forward layer, channels of zeros behind the kept ones up to `units`: the same is computed.

    Raises ValueError for rows that are not in the order of the channels, once or several times over.
    """
    count = len(keep)
    for name in (*what.rows, *what.readers):
        layer: Any = model.get_submodule(name)
        reads = name in what.readers
        order = what.columns if reads else what.rows[name]
        if not torch.equal(order, torch.arange(what.units).repeat(len(order) // what.units)):
            raise ValueError(f"{name}: the order of its rows leaves no place for zeros")
        weight = layer.weight.detach()
        if reads:
            padded, bias = nn.functional.pad(weight, (0, units - count)), layer.bias
        else:
            padded = nn.functional.pad(weight.unflatten(0, (-1, count)), (0, 0, 0, units - count)).flatten(0, 1)
            bias = layer.bias
            if bias is not None:
                bias = nn.functional.pad(bias.detach().unflatten(0, (-1, count)), (0, units - count)).flatten()
        model.set_submodule(name, linear_like(layer, padded, bias))


def _places(units: Tensor, keep: Tensor) -> Tensor:
    """Where `units` [N] is one of keep [M], in ascending order."""
    return torch.isin(units, keep.cpu()).nonzero()[:, 0]


def linear_like(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear of weight [N, K] and bias [N], in the mode of `layer`."""
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.contiguous(), layer.weight.requires_grad)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), layer.weight.requires_grad)  # type: ignore
    return made.train(layer.training)


def to_bf16(model: nn.Module, names: Collection[str]) -> None:
    """Round the weights of linears to bf16, what structural steps leave their targets in."""
    for name in names:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, linear_like(layer, layer.weight.detach().bfloat16().float(), layer.bias))


def _ffn(under: Probe, readers: tuple[str, ...]) -> Prunable | None:
    """The channels that `readers` read, where each depends on rows of its own of some linears and on nothing else."""
    count = under.linears[readers[0]].in_features
    rows = _channels(under, readers[0], count)
    if not rows:
        return None
    found = Prunable("ffn", readers, torch.arange(count), rows, count)
    return found if _proven(under, found) else None


def _heads(under: Probe, sites: list[tuple[str, ...]]) -> Prunable | None:
    """Key-value heads, where queries, keys and values are linears that share one input.

    Attention copies whole value heads (fold "values"); query heads follow the layout of its output.
    """
    from compressor.rotations import head_size

    for fold in folds_of(under, sites):
        if fold.kind != "values" or (size := head_size(under, fold)) is None:
            continue
        assert fold.rows is not None
        columns = fold.rows // size
        value = under.linears[fold.producer]
        if value.out_features != (int(columns.max()) + 1) * size:
            continue  # values are part of a fused linear
        beside = next((site for site in sites if fold.producer in site), (fold.producer,))
        queries = [n for n in beside if under.linears[n].out_features == len(columns) and n != fold.producer]
        keys = [n for n in beside if under.linears[n].out_features == value.out_features and n != fold.producer]
        own = torch.arange(value.out_features) // size
        for query, key in ((q, k) for q in queries for k in keys if q != k):
            rows = {query: columns, key: own, fold.producer: own}
            found = Prunable("heads", fold.site, columns, rows, int(columns.max()) + 1)
            if found.units > 1 and _proven(under, found):
                return found
    return None


@torch.enable_grad()
def _channels(under: Probe, reader: str, count: int) -> dict[str, Tensor]:
    """Per linear that acts on `reader`'s input x, the one channel that each of its rows acts on; {} where rows act on
    several.

    With random v, a row p acts on channel k alone exactly where d(v·x)/dp = v_k d(1·x)/dp for every token. A row whose
    slope is zero for all tokens (a ReLU that never fires) goes by the order that all other rows show.
    """
    v = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    slopes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for inputs, outputs in zip(under.inputs, under.outputs, strict=True):
        x = inputs.get(reader)
        if x is None or not x.requires_grad:
            return {}
        leaves = {n: p for n, p in outputs.items() if n in under.linears}
        weighted = (x * v.to(x)).sum()
        one = torch.autograd.grad(x.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(weighted, list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, a, b in zip(leaves, one, other, strict=True):
            if a is not None and b is not None:
                slopes.setdefault(name, []).append((a.flatten(0, -2), b.flatten(0, -2)))
    found: dict[str, Tensor] = {}
    for name, parts in slopes.items():
        rows = _matched(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]), v, under.same)
        if rows is None:
            return {}
        found[name] = rows
    return found


def _matched(one: Tensor, weighted: Tensor, v: Tensor, same: float) -> Tensor | None:
    """[N] the k of each row with weighted [T, N] = v_k one [T, N], or None."""
    one, weighted, v = one.double().cpu(), weighted.double().cpu(), v.cpu()
    strongest = one.abs().argmax(0, keepdim=True)
    top = one.gather(0, strongest)[0]
    live = top != 0
    ratio = weighted.gather(0, strongest)[0] / torch.where(live, top, 1.0)
    order = v.argsort()
    place = torch.searchsorted(v[order], ratio).clamp(1, len(v) - 1) if len(v) > 1 else torch.zeros_like(order)
    lower = (place - 1).clamp_min(0)
    nearer = (ratio - v[order[lower]]).abs() < (ratio - v[order[place]]).abs()
    channel = order[torch.where(nearer, lower, place)]
    wrong = (weighted - v[channel] * one).abs().amax(0) > same * top.abs() * v.abs().amax()
    if bool((wrong & live).any()) or bool(weighted[:, ~live].any()):
        return None
    by_order = torch.arange(one.shape[1]) % len(v)
    if not bool(live.all()):
        if not torch.equal(channel[live], by_order[live]):
            return None
        channel = torch.where(live, channel, by_order)
    return channel


def _proven(under: Probe, what: Prunable) -> bool:
    """Whether the block without half of its units gives what it gives with the readers' columns for them at zero."""
    picks = torch.randperm(what.units, generator=torch.Generator().manual_seed(what.units))
    keep = picks[: max(1, what.units // 2)].sort().values
    stays = torch.zeros(what.units, dtype=torch.bool)
    stays[keep] = True
    columns = stays[what.columns]

    def masked() -> None:
        for name in what.readers:
            layer: Any = under.block.get_submodule(name)
            weight = layer.weight.detach() * columns.to(layer.weight)
            under.block.set_submodule(name, linear_like(layer, weight, layer.bias))

    before = _results(under, what, lambda: None)
    zeroed = _results(under, what, masked)
    try:
        sliced = _results(under, what, lambda: cut(under.block, what, keep))
    except RuntimeError:  # something between the linears has the old width
        return False
    return distance(sliced, zeroed) <= under.same * distance(before, zeroed)


def _results(under: Probe, what: Prunable, change: Callable[[], None]) -> list[Tensor]:
    """What the block gives in each round after `change`, which is undone."""
    held = {name: under.block.get_submodule(name) for name in (*what.rows, *what.readers)}
    try:
        change()
        return list(_rounds(under))
    finally:
        for name, module in held.items():
            under.block.set_submodule(name, module)


@torch.no_grad()
def _rounds(under: Probe) -> Iterator[Tensor]:
    for args, kwargs in under._calls[""]:
        out = under.block(*args, **kwargs)
        yield out if isinstance(out, Tensor) else out[0]
