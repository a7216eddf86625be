"""Folds: per-channel scales s [K] and shifts z [K] of a linear's input move into whatever produces that input.

    x' = (x - z) / s        W' = W diag(s)        b' = b + W z        so that W' x' + b' = W x + b

The producer (a norm, v_proj, up_proj, fc1) is made to give x', every reader is made to expect it, and the model
computes what it did. There is no table of families: candidates come from what modules get and give, and each one is
proven by running the block in float64 with it (fold_probe.py). What cannot be proven is left out. docs/folds.md has
the equations by kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.blockwise import record
from compressor.calibrate import PROBE_TOKENS, Site
from compressor.fold_probe import Probe, probe
from compressor.model import blocks

Kind = Literal["norm", "values", "up", "activation"]


@dataclass(frozen=True)
class Fold:
    """How the input of `site` can be scaled. Names are of modules of the model.

    site      the linears that read this input: a calibration Site's names. Where experts share a norm, the names of
              all their sites one after another, since the norm can be folded once only
    kind      "norm", "values" (v_proj -> o_proj), "up" (gated up -> down) or "activation" (fc1 -> ReLU -> fc2)
    others    further readers of the same input, to be compensated too: routers, the gates of shared experts
    shifts    whether a shift can be folded too
    groups    [K] int64, channels of one number share scale and shift (the copies of a GQA value); None: all are free
    rows      [K] int64, the row of the producer that each channel comes from; None for norms, channel k is weight k
    offset    what a norm adds to its weight before it multiplies: 1 in Gemma
    """

    site: tuple[str, ...]
    kind: Kind
    producer: str
    others: tuple[str, ...]
    shifts: bool
    groups: Tensor | None = field(default=None, compare=False)
    rows: Tensor | None = field(default=None, compare=False)
    offset: float = 0.0


def find_folds(model: nn.Module, sites: Sequence[Site]) -> dict[tuple[str, ...], Fold]:
    """Fold.site -> Fold, in the order of `sites`; a site without a fold that is proven exact is absent.

    The model, in eval mode, is only read. Each block that holds a site is copied in float64 (8 bytes a weight) and
    run on a few random tokens. Raises ModelError for a model that cannot run block by block.
    """
    found: dict[tuple[str, ...], Fold] = {}
    for prefix, under, inside in probes(model, sites):
        for fold in folds_of(under, inside):
            full = renamed(fold, lambda n, prefix=prefix: prefix + n)  # type: ignore[misc]
            found[full.site] = full
    order = {name: i for i, name in enumerate(n for site in sites for n in site.names)}
    return dict(sorted(found.items(), key=lambda item: order[item[0][0]]))


def probes(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, Probe, list[tuple[str, ...]]]]:
    """(prefix of its names, probe, names of its sites inside it) of each block that holds a site."""
    named = blocks(model)
    used = [i for i, (n, _) in enumerate(named) if any(s.names[0].startswith(f"{n}.") for s in sites)]
    if not used:
        return
    named = named[: used[-1] + 1]
    calls = record(model, random_tokens(model), named)
    for i in used:
        name, block = named[i]
        prefix = f"{name}."
        inside = [tuple(n.removeprefix(prefix) for n in s.names) for s in sites if s.names[0].startswith(prefix)]
        yield prefix, probe(block, calls[i]), inside


def is_exact(model: nn.Module, fold: Fold) -> bool:
    """Whether folding a random scale, and a random shift where `fold.shifts`, leaves the fold's block as it is."""
    named = blocks(model)
    number = next(i for i, (n, _) in enumerate(named) if fold.producer.startswith(f"{n}."))
    name, block = named[number]
    call = record(model, random_tokens(model), named)[number]
    inner = renamed(fold, lambda n: n.removeprefix(f"{name}."))
    tried = probe(block, call)
    return _proven(tried, inner, shift=False) and (not fold.shifts or _proven(tried, inner, shift=True))


def share(fold: Fold, values: Tensor, reduce: Literal["max", "min", "mean", "midpoint"] = "max") -> Tensor:
    """Values [K] that obey `fold.groups`: each channel gets its group's maximum, minimum, mean or (max + min) / 2."""
    if fold.groups is None:
        return values.clone()
    groups = fold.groups.to(values.device)

    def reduced(how: str) -> Tensor:
        start = values.new_zeros(int(groups.max()) + 1)
        return start.scatter_reduce(0, groups, values, how, include_self=False)[groups]

    if reduce == "midpoint":
        return (reduced("amax") + reduced("amin")) / 2
    return reduced({"max": "amax", "min": "amin", "mean": "mean"}[reduce])


def bf16_scale(model: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    """The scales nearest to `scale` [K] that leave a norm's weight a bf16 value; other producers take any scale.

    They move by at most 2^-8, and a runtime that loads the folded norm in bf16 changes nothing.
    """
    if fold.kind != "norm":
        return scale
    weight = model.get_parameter(f"{fold.producer}.weight").detach().double() + fold.offset
    divisor = scale.to(weight.device).double()
    moved = weight / ((weight / divisor - fold.offset).bfloat16().double() + fold.offset)
    return torch.where((moved / divisor - 1).abs() < 2**-8, moved, divisor).float().to(scale.device)


def fold_scale(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """x' = x / scale; scale [K] positive. Parameters of `model` are replaced, never written into.

    Raises ValueError for a scale that is not positive and finite, has another shape, or differs within a group.
    """
    scale = _checked(model, fold, scale)
    if not bool((scale > 0).all()):
        raise ValueError(f"{fold.producer}: a scale of {scale.min():g} cannot be folded; scales must be positive.")
    _scale_producer(model, fold, scale)
    _scale_readers(model, fold, scale)


def fold_shift(model: nn.Module, fold: Fold, shift: Tensor) -> None:
    """x' = x - shift; shift [K]. Readers, and a v_proj, that have no bias get one. Parameters are replaced.

    Raises ValueError where `fold.shifts` is False, and for a shift that is not finite, has another shape, or differs
    within a group.
    """
    if not fold.shifts:
        raise ValueError(f"{fold.producer}: no shift of its output can be folded ({fold.kind}); fold a scale only.")
    shift = _checked(model, fold, shift)
    _shift_producer(model, fold, shift)
    _shift_readers(model, fold, shift)


def merge_norm(model: nn.Module, fold: Fold) -> None:
    """fold_scale by the norm's own weight γ: the norm multiplies by one, its readers have γ, and a bias, as their own.

    γ of any sign, zero too: readers are multiplied, nothing is divided. Raises ValueError for a bias that readers
    cannot take (a router).
    """
    norm: Any = model.get_submodule(fold.producer)
    if (bias := norm._parameters.get("bias")) is not None:
        if not fold.shifts:
            raise ValueError(f"{fold.producer}: not everything that reads it can take its bias.")
        _shift_readers(model, fold, bias.detach().double())  # b + W β, before W changes
        replace_parameter(norm, "bias", torch.zeros_like(bias))
    _scale_readers(model, fold, norm.weight.detach().double() + fold.offset)
    replace_parameter(norm, "weight", torch.full_like(norm.weight, 1 - fold.offset))


def _scale_producer(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    module: Any = model.get_submodule(fold.producer)
    divisor = _by_row(module, fold, scale, 1.0)
    offset = fold.offset
    weight = (module.weight.detach().double() + offset) / divisor.view(-1, *[1] * (module.weight.dim() - 1)) - offset
    replace_parameter(module, "weight", weight)
    if module._parameters.get("bias") is not None:
        replace_parameter(module, "bias", module.bias.detach().double() / divisor)


def _scale_readers(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    for module in reader_modules(model, fold):
        replace_parameter(module, "weight", module.weight.detach().double() * scale.to(module.weight.device))


def _shift_producer(model: nn.Module, fold: Fold, shift: Tensor) -> None:
    module: Any = model.get_submodule(fold.producer)
    _add_bias(module, -_by_row(module, fold, shift, 0.0))


def _shift_readers(model: nn.Module, fold: Fold, shift: Tensor) -> None:
    for module in reader_modules(model, fold):
        _add_bias(module, module.weight.detach().double() @ shift.to(module.weight.device))


def reader_modules(model: nn.Module, fold: Fold) -> Iterator[Any]:
    return (model.get_submodule(name) for name in (*fold.site, *fold.others))


def _by_row(module: Any, fold: Fold, values: Tensor, default: float) -> Tensor:
    """Values [K] of channels as values [N] of the producer's rows; `default` for rows that feed none of them."""
    values = values.to(module.weight.device)
    if fold.rows is None:
        return values
    by_row = values.new_full((module.weight.shape[0],), default)
    by_row[fold.rows.to(values.device)] = values
    return by_row


def _add_bias(module: Any, bias: Tensor) -> None:
    if module.bias is not None:
        replace_parameter(module, "bias", module.bias.detach().double() + bias)
    else:
        module.bias = nn.Parameter(bias.to(module.weight.dtype), module.weight.requires_grad)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter in the place of the old one, whose tensor another model may share."""
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), old.requires_grad))


def _checked(model: nn.Module, fold: Fold, values: Tensor) -> Tensor:
    features = model.get_submodule(fold.site[0]).in_features
    if tuple(values.shape) != (features,) or not bool(values.isfinite().all()):
        raise ValueError(
            f"{fold.site[0]}: scales and shifts must be {features} finite values, got {list(values.shape)}"
            f"{'' if bool(values.isfinite().all()) else ' with NaN or Inf'}."
        )
    if not torch.equal(share(fold, values, "max"), share(fold, values, "min")):
        raise ValueError(f"{fold.site[0]}: channels that are copies of one value differ; pass them through share.")
    return values.detach().double()


def folds_of(under: Probe, sites: list[tuple[str, ...]]) -> list[Fold]:
    """Every fold of the block that is proven, at most one for each site."""
    found: list[Fold] = []
    free = [site for site in sites if not under.unseen & set(site) and not under.twice & set(site)]
    by_norm: dict[str, list[tuple[str, ...]]] = {}
    for site in free:
        features = under.linears[site[0]].in_features
        norm = next((n for n in under.norms(features) if all(under.reads(r, n) for r in site)), None)
        if norm is not None:
            by_norm.setdefault(norm, []).append(site)
        else:
            found += _first_proven(under, _from_linears(under, site))
    for norm, fed in by_norm.items():
        found += _first_proven(under, _from_norm(under, norm, fed))
    return found


def _from_norm(under: Probe, norm: str, sites: list[tuple[str, ...]]) -> Iterator[Fold]:
    features = under.linears[sites[0][0]].in_features
    # An expert that no token reached may read this norm too, and would be left as it is.
    if any(under.linears[name].in_features == features for name in under.unseen):
        return
    names = tuple(name for site in sites for name in site)
    others = [r for r in under.readers(features) if r not in names and under.reads(r, norm)]
    offset = under.weight_offset(norm)
    if offset is not None:
        yield Fold(names, "norm", norm, tuple(others), False, offset=offset)


def _from_linears(under: Probe, site: tuple[str, ...]) -> Iterator[Fold]:
    for name in under.linears:
        rows = under.copied(name, site[0]) if name not in site else None
        if rows is not None:
            groups = rows.cpu() if len(rows.unique()) < len(rows) else None
            yield Fold(site, "values", name, (), False, groups, rows.cpu())
    for name, rows, alone in under.linear_in(site[0]):
        groups = rows.cpu() if len(rows.unique()) < len(rows) else None
        yield Fold(site, "activation" if alone else "up", name, (), False, groups, rows.cpu())


def _first_proven(under: Probe, candidates: Iterable[Fold]) -> list[Fold]:
    for fold in candidates:
        if fold.producer not in under.twice and _proven(under, fold, shift=False):
            return [replace(fold, shifts=_can_shift(under, fold) and _proven(under, fold, shift=True))]
    return []


def _can_shift(under: Probe, fold: Fold) -> bool:
    """Whether there is somewhere to put a shift: any nn.Linear can be given a bias, a norm or router cannot."""
    if fold.kind == "norm" and under.module(fold.producer)._parameters.get("bias") is None:
        return False
    return all(isinstance(module, nn.Linear) for module in reader_modules(under.block, fold))


def _proven(under: Probe, fold: Fold, shift: bool) -> bool:
    features = under.linears[fold.site[0]].in_features
    drawn = torch.randn(features, generator=torch.Generator().manual_seed(features), dtype=torch.float64)
    values = share(fold, drawn if shift else drawn.exp())
    producer, readers = (_shift_producer, _shift_readers) if shift else (_scale_producer, _scale_readers)
    return under.unchanged(
        (fold.producer, *fold.site, *fold.others),
        lambda: producer(under.block, fold, values),
        lambda: readers(under.block, fold, values),
    )


def random_tokens(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))


def renamed(fold: Fold, rename: Any) -> Fold:
    return replace(
        fold,
        site=tuple(map(rename, fold.site)),
        producer=rename(fold.producer),
        others=tuple(map(rename, fold.others)),
    )
