"""What a mixture of experts loses, or gains, when each token goes to fewer or more experts than it was made for.

A runtime may then choose by `num_experts_per_tok`. Routers do what they always do, with another number: weights are
divided by their sum, or scaled, where the model does so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.evaluate import measure, torch_runner
from compressor.expert_plan import listening
from compressor.fewer_experts import FewerExperts
from compressor.mixtures import MoEView
from compressor.progress import Progress

IN_CONFIG = "num_experts_per_tok"
IN_MODULE = ("top_k", IN_CONFIG)  # of a router or its layer; a config's top_k is another thing
STEPS = 4  # at most so many values on either side of K and K/2


def counts(top_k: int, experts: int) -> list[int]:
    """The numbers tried: from K/2 to 2K or all experts, K among them."""
    step = -(-top_k // STEPS)
    every = (top_k + i * step for i in range(-STEPS, STEPS + 1))
    return [k for k in every if max(1, top_k // 2) <= k <= min(2 * top_k, experts)]


def default_of(model: Any, views: Mapping[str, MoEView]) -> int:
    """The number the model was made for: its config's, else that of a layer of ours. Raises ModelError for neither."""
    found = (vars(holder).get(name) for holder, name in _holders(model, views))
    if (top_k := next((k for k in found if type(k) is int), None)) is None:
        raise ModelError(f"{type(model).__name__}: nothing says how many experts a token goes to; drop expert_plan.")
    return top_k


def _holders(model: Any, views: Mapping[str, MoEView]) -> list[tuple[Any, str]]:
    """Every object, and its attribute, that may hold the number."""
    modules = [m for view in views.values() for m in view.module.modules()]
    return [(model.config, IN_CONFIG), *((m, name) for m in modules for name in IN_MODULE)]


@contextmanager
def going_to(model: Any, views: Mapping[str, MoEView], before: int, k: int) -> Iterator[None]:
    """While this is open, tokens go to k experts where they went to `before`."""
    held = [(holder, name) for holder, name in _holders(model, views) if vars(holder).get(name) == before]
    try:
        for holder, name in held:
            setattr(holder, name, k)
        yield
    finally:
        for holder, name in held:
            setattr(holder, name, before)


def profile(
    model: nn.Module,
    views: Mapping[str, MoEView],
    windows: Tensor,
    parameters: int,
    size: int,
    experts: Mapping[str, tuple[int, list[int]]],
    tolerance: float,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity on windows [S, L], parameters and bytes that a token's products need, by number of experts; as JSON.

    parameters, size   of the whole model, size in bytes
    experts            by layer, what an expert has: parameters, and bytes one by one
    tolerance          a number is allowed up to (1 + tolerance) times the default's perplexity
    Numbers that a router does not follow (groups of experts may hold fewer) are listed and not measured. Where a rule
    chooses how many of K a token keeps, only K is measured, and `used` says how many they are on average.
    Raises ModelError for a model whose tokens do not go to as many experts as it says.
    """
    default = default_of(model, views)
    ruled = any(isinstance(view.module, FewerExperts) for view in views.values())
    asked = [default] if ruled else counts(default, min(len(view) for view in views.values()))
    rows: dict[int, dict[str, float]] = {}
    for k in asked:
        with going_to(model, views, default, k), listening(views) as heard:
            losses = measure(torch_runner(model), windows, progress=progress).losses
        chosen = {name: torch.cat(parts) for name, parts in heard.items()}
        if any(int(one.sum(-1).max()) != k for one in chosen.values()):
            continue
        used = sum(one.sum(-1).double().mean().item() for one in chosen.values()) / len(chosen)
        idle = {name: 1 - one.double().mean(0) for name, one in chosen.items()}  # [E], a token's share not at each
        spared = sum(n * idle[name].sum().item() for name, (n, _) in experts.items())
        unread = sum((idle[name] @ torch.tensor(b).double()).item() for name, (_, b) in experts.items())
        rows[k] = {"active_params": parameters - spared, "active_bytes": size - unread}
        rows[k] |= {"ppl": math.exp(losses.mean()), "used": used}
    if default not in rows:
        raise ModelError(
            f"{type(model).__name__}: its tokens do not go to {default} experts in every layer, as it says; drop "
            f"expert_plan."
        )
    most = (1 + tolerance) * rows[default]["ppl"]
    found = {
        "default": default,
        "k": list(rows),
        "ppl": [round(row["ppl"], 4) for row in rows.values()],
        "active_params": [round(row["active_params"]) for row in rows.values()],
        "active_bytes": [round(row["active_bytes"]) for row in rows.values()],
        "allowed": [k for k, row in rows.items() if row["ppl"] <= most],
        "tokens": windows.shape[0] * (windows.shape[1] - 1),
    }
    if ruled:
        found["used"] = [round(row["used"], 4) for row in rows.values()]
    return found | ({"not_followed": ignored} if (ignored := [k for k in asked if k not in rows]) else {})
