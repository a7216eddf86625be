"""What a runtime that holds only some experts in memory has to know, measured on the compressed model: who is used how
often, who comes next, whom to pin, and what caches of each size would have found.

    freq_e    = (n_e + 1/E) / (Σ n + 1)                      n_e: tokens of expert e; one token is spread over all
    next_ee'  = (n_ee' + K'/E') / (n_e + 1)                  n_ee': those that chose e' in the next layer of experts too
    stick_e   = (n of those whose next token chose e too + K/E) / (n_e + 1)

K is the mean number of experts of a token; a row of `next` sums to K' before it is cut to its largest entries. Plan and
simulation never see the same text: the last tenth of the windows is held out. After Shen et al. 2024, "ExpertFlow"
(arXiv 2410.17954), without its trained predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.artifact import Artifact
from compressor.blockwise import base_of, forward
from compressor.errors import DataError, ModelError
from compressor.mixtures import MoEView, mixtures
from compressor.progress import Progress
from compressor.recipe import ExpertPlan

HELD_OUT = 10  # one window of so many
PIN_SHARE = 4  # where no budget is given: one byte of so many
DIGITS = 4

Chosen = Mapping[str, Tensor]  # by layer: bool [S, L, E], who was chosen for every token


@torch.no_grad()
def expert_plan(
    model: nn.Module, artifact: Artifact, windows: Tensor, options: ExpertPlan, progress: Progress
) -> dict[str, Any]:
    """Cache plan and dynamic-k profile of the compressed `model` on windows [S, L], as JSON for the manifest.

    Raises ModelError for a model without layers of experts, DataError for too little text.
    """
    from compressor.dynamic_k import profile
    from compressor.folder import coverage

    views = check_mixture(model)
    held = held_out(windows)
    progress.stage("plan experts", len(windows))
    with listening(views) as heard:
        for window in windows:
            forward(base_of(model), window)
            progress.advance()
    chosen = {name: torch.stack(parts) for name, parts in heard.items()}
    sizes, weights = sizes_of(artifact, views), {name: weights_of(model, view) for name, view in views.items()}
    whole = coverage(artifact)
    of_experts = {name: (weights[name], sizes[name]) for name in views}
    return {
        "cache": cache_plan(chosen, held, sizes, weights, options.pin_bytes),
        "dynamic_k": profile(
            model, views, windows[-held:], whole["parameters"], whole["size_bytes"], of_experts, options.tolerance,
            progress,
        ),
    }  # fmt: skip


def check_mixture(model: nn.Module) -> dict[str, MoEView]:
    """The layers of experts by name. Raises ModelError where there are none."""
    if not (views := mixtures(model)):
        raise ModelError(f"{type(model).__name__} has no layers of experts to plan for; drop expert_plan.")
    return views


def sizes_of(artifact: Artifact, views: Mapping[str, MoEView]) -> dict[str, list[int]]:
    """Bytes of each expert as stored, by layer."""
    found = {name: [0] * len(view) for name, view in views.items()}
    for tensor, value in artifact.tensors().items():
        for name, view in views.items():
            if tensor.startswith(prefix := f"{view.container}."):
                number = int(tensor.removeprefix(prefix).partition(".")[0])
                found[name][number] += value.numel() * value.element_size()
    return found


def weights_of(model: nn.Module, view: MoEView) -> int:
    """How many weights an expert has."""
    layers: list[Any] = [model.get_submodule(name) for name in view.linears(0)]
    return sum(layer.in_features * layer.out_features for layer in layers)


@contextmanager
def listening(views: Mapping[str, MoEView]) -> Iterator[dict[str, list[Tensor]]]:
    """While this is open, every forward of a layer adds who was chosen, bool [T, E]. Raises ModelError as views do."""
    heard: dict[str, list[Tensor]] = {name: [] for name in views}

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            heard[name].append((views[name].weights(x.reshape(-1, x.shape[-1])) != 0).cpu())

        return see

    handles = [v.module.register_forward_pre_hook(hook(n), with_kwargs=True) for n, v in views.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def held_out(windows: Tensor) -> int:
    """How many windows [S, L] at the end are held out. Raises DataError for fewer than two in all."""
    if len(windows) < 2:
        raise DataError("expert_plan needs 2 windows of text or more, one of them held out; pass a longer text.")
    return max(1, len(windows) // HELD_OUT)


@dataclass(frozen=True)
class Use:
    """A layer's experts, counted: freq and stick float64 [E], next float64 [E, E'] or None behind the last layer."""

    freq: Tensor
    stick: Tensor
    next: Tensor | None


def used(chosen: Tensor, following: Tensor | None) -> Use:
    """chosen bool [S, L, E]; following bool [S, L, E'], the same tokens in the next layer of experts."""
    a = chosen.flatten(0, 1).double()
    count, experts = a.sum(0), a.shape[1]
    before, again = chosen[:, :-1].double(), (chosen[:, :-1] & chosen[:, 1:]).double()
    prior = a.sum() / len(a) / experts
    freq = (count + 1 / experts) / (count.sum() + 1)
    stick = (again.sum((0, 1)) + prior) / (before.sum((0, 1)) + 1)
    if following is None:
        return Use(freq, stick, None)
    b = following.flatten(0, 1).double()
    return Use(freq, stick, (a.T @ b + b.sum() / b.numel()) / (count[:, None] + 1))


def cache_plan(
    chosen: Chosen, held: int, sizes: Mapping[str, list[int]], weights: Mapping[str, int], budget: int | None = None
) -> dict[str, Any]:
    """The plan, as JSON. held: how many windows at the end it is tried on; sizes: bytes of each expert by layer;
    weights: how many an expert of the layer has; budget: bytes of experts to pin, None for a quarter of all."""
    names = list(chosen)
    train = {name: one[:-held] for name, one in chosen.items()}
    test = {name: one[-held:].flatten(0, 1) for name, one in chosen.items()}
    uses = [used(train[n], train[m] if m else None) for n, m in zip(names, [*names[1:], None], strict=True)]
    most = max(int(one.sum(-1).max()) for one in chosen.values())
    budget = sum(map(sum, sizes.values())) // PIN_SHARE if budget is None else budget
    pins = pinned({n: use.freq for n, use in zip(names, uses, strict=True)}, sizes, budget)
    layers, cut = [], []
    for name, use in zip(names, uses, strict=True):
        row: dict[str, Any] = {
            "name": name,
            "bytes": sizes[name],
            "bits": [round(8 * size / weights[name], DIGITS) for size in sizes[name]],
            "freq": _rounded(use.freq),
            "stick": _rounded(use.stick),
            "pin": pins[name],
        }
        if use.next is not None:
            order = use.next.argsort(dim=-1, descending=True, stable=True)[:, : 2 * most]
            share = [_rounded(p) for p in use.next.gather(1, order)]
            row["next"] = {"experts": order.tolist(), "probability": share}
            cut.append(torch.zeros_like(use.next).scatter(1, order, torch.tensor(share, dtype=torch.float64)))
        layers.append(row)
    hits = sum(int(test[n][:, pins[n]].sum()) for n in names)
    return {
        "version": 1,
        "trace_tokens": next(iter(train.values()))[..., 0].numel(),
        "held_out_tokens": len(next(iter(test.values()))),
        "pin": {
            "budget_bytes": budget,
            "bytes": sum(sizes[n][e] for n in names for e in pins[n]),
            "hit_rate": round(hits / max(1, sum(int(one.sum()) for one in test.values())), DIGITS),
        },
        "hit_rates": simulated(list(test.values()), [use.freq for use in uses], cut, most),
        "layers": layers,
    }


def pinned(freq: Mapping[str, Tensor], sizes: Mapping[str, list[int]], budget: int) -> dict[str, list[int]]:
    """The experts of each layer that stay in memory: those of the largest freq / bytes that fit, in that order."""
    every = [(freq[name][e].item() / size, name, e, size) for name in freq for e, size in enumerate(sizes[name])]
    found: dict[str, list[int]] = {name: [] for name in freq}
    left = budget
    for _, name, expert, size in sorted(every, key=lambda one: -one[0]):  # stable: ties by layer and number
        if size <= left:
            left -= size
            found[name].append(expert)
    return {name: sorted(experts) for name, experts in found.items()}


def simulated(chosen: list[Tensor], freq: list[Tensor], following: list[Tensor], most: int) -> dict[str, Any]:
    """Shares of uses, of all layers together, that a cache of C experts a layer would have held when they came.

    chosen bool [T, E] by layer, one text after the other; freq [E]; following [E, E'], one layer fewer; most: experts
    of a token. Caches start with the C most frequent; `lru` then holds who was used last, `pinned` never changes,
    `prefetch` fetches, for every token, the C that its experts in the layer before mostly lead to.
    """
    experts = max(len(f) for f in freq)
    capacities = sorted({c for c in (most, 2 * most, experts // 4, experts // 2, experts) if most <= c <= experts})
    found = torch.zeros(3, experts, dtype=torch.int64)  # uses by the place that the expert had
    for number, (here, often) in enumerate(zip(chosen, freq, strict=True)):
        pinned_place = _places(often).expand(here.shape)
        ahead = pinned_place
        if number:  # experts that the cut rows leave out come by frequency, behind the others
            ahead = _places(chosen[number - 1].double() @ following[number - 1] + 1e-9 * often)
        for row, place in zip(found, (_recency(here, often), pinned_place, ahead), strict=True):
            row += torch.bincount(place[here], minlength=experts)
    rates = found.cumsum(1) / found.sum(1, keepdim=True).clamp_min(1)
    policies = ("lru", "pinned", "prefetch")
    return {"capacity": capacities} | {
        policy: [round(row[c - 1].item(), DIGITS) for c in capacities]
        for policy, row in zip(policies, rates, strict=True)
    }


def _recency(chosen: Tensor, freq: Tensor) -> Tensor:
    """[T, E] the place of every expert in the order of last use when token t comes; at first that of frequency."""
    last = -_places(freq) - 1
    places = torch.empty(chosen.shape, dtype=torch.int64)
    for t, row in enumerate(chosen):
        places[t] = _places(last)
        last = torch.where(row, t, last)
    return places


def _places(values: Tensor) -> Tensor:
    """The place of every entry among the last dimension in falling order, ties by number; int64."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


def _rounded(values: Tensor) -> list[float]:
    return [round(v, DIGITS) for v in values.tolist()]
