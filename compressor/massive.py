"""Massive activations: single values of the residual stream, of few tokens, that are larger than all others by orders
of magnitude (Sun et al. 2024, "Massive Activations in Large Language Models").

Of the hidden states h [L, H] that a block gives for one window, with med the median of |h| over all L·H:

    strict     |a| > 100 and |a| >= 1000 med
    relative   |a| >= 1000 med
    small      |a| >= 50 med, in the same channel in 80 % of the windows and 25 % of the blocks: what small models have

Why it matters here: such a token makes the inputs of linears behind it unlike all others, and would move quantiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import run_blocks
from compressor.model import blocks
from compressor.progress import Progress, Silent

TOP = 5
ABSOLUTE, RATIO = 100.0, 1000.0
SMALL, SMALL_WINDOWS, SMALL_BLOCKS = 50.0, 0.8, 0.25
JUMP = 10.0


@dataclass(frozen=True)
class Value:
    """One value |h[token, channel]| of a window, and how many medians it is."""

    size: float
    ratio: float
    token: int
    channel: int

    @property
    def strict(self) -> bool:
        return self.size > ABSOLUTE and self.relative

    @property
    def relative(self) -> bool:
        return self.ratio >= RATIO


@dataclass(frozen=True)
class Massive:
    """Channels and token places of each criterion's values, and the blocks between which the top jumps tenfold.

    ratios: per block, the mean over windows of max |h| / med
    onset, offset: the blocks that first give, and first no longer give, a top JUMP times that of the block before
    """

    strict: Places
    relative: Places
    small: Places
    ratios: dict[str, float]
    tops: dict[str, float]
    onset: str | None
    offset: str | None


@dataclass(frozen=True)
class Places:
    """channels: their numbers; tokens: how many values of all windows and blocks are at each place, by place."""

    channels: list[int]
    tokens: dict[int, int]

    def __bool__(self) -> bool:
        return bool(self.channels)


Found = dict[str, list[list[Value]]]  # by block, by window, the TOP largest


def largest(hidden: Tensor) -> list[Value]:
    """The TOP largest values of hidden [L, H]."""
    sizes = hidden.abs().float()
    middle = sizes.median().clamp_min(torch.finfo(torch.float32).tiny).item()
    values, places = sizes.flatten().topk(min(TOP, sizes.numel()))
    pairs = zip(values.tolist(), places.tolist(), strict=True)
    return [Value(v, v / middle, p // hidden.shape[1], p % hidden.shape[1]) for v, p in pairs]


def find(
    model: nn.Module, windows: Tensor, progress: Progress = Silent(), device: str | torch.device | None = None
) -> Massive:
    """Massive activations of windows [S, L], after every block. Raises ModelError as calibration does."""
    seen: Found = {}

    @contextmanager
    def around(name: str) -> Iterator[None]:
        def see(_module: nn.Module, _args: Any, out: Any) -> None:
            seen.setdefault(name, []).append(largest((out if isinstance(out, Tensor) else out[0])[0]))

        handle = model.get_submodule(name).register_forward_hook(see)
        try:
            yield
        finally:
            handle.remove()

    run_blocks(model, windows, blocks(model), around, progress, device)
    return judge(seen)


def judge(seen: Found) -> Massive:
    """The criteria, on what `largest` says of each block and window; neither order matters but that of the blocks."""
    every = [v for rows in seen.values() for row in rows for v in row]
    often = _often(seen)
    ratios = {name: sum(row[0].ratio for row in rows) / len(rows) for name, rows in seen.items()}
    tops = {name: sum(row[0].size for row in rows) / len(rows) for name, rows in seen.items()}
    steps = list(zip(list(tops), list(tops)[1:], strict=False))
    onset = next((b for a, b in steps if tops[b] >= JUMP * tops[a]), None)
    offset = next((b for a, b in steps if tops[a] >= JUMP * tops[b]), None)
    return Massive(
        _places(v for v in every if v.strict),
        _places(v for v in every if v.relative),
        _places(v for v in every if v.ratio >= SMALL and v.channel in often),
        ratios,
        tops,
        onset,
        offset,
    )


def _often(seen: Found) -> Collection[int]:
    """Channels with a value of SMALL medians in enough windows of enough blocks."""
    blocks_with: Counter[int] = Counter()
    for rows in seen.values():
        windows_with = Counter(c for row in rows for c in {v.channel for v in row if v.ratio >= SMALL})
        blocks_with.update(c for c, n in windows_with.items() if n >= SMALL_WINDOWS * len(rows))
    return {c for c, n in blocks_with.items() if n >= SMALL_BLOCKS * len(seen)}


def _places(values: Any) -> Places:
    kept = list(values)
    return Places(sorted({v.channel for v in kept}), dict(sorted(Counter(v.token for v in kept).items())))
