"""How sparse feed-forward layers are, and what is massive in a model: `compress probe --sparsity`. Nothing is changed.

left_out   the share of a layer's neurons that PPL-p % leaves out (cett.py)
massive    criteria of massive.py
excluded   the share of tokens that thresholds are not taken from, because they are massive in that layer's input
moved      by what factor they would have moved the layer's median contribution
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import cett, massive, sparsity
from compressor import data as text
from compressor.calibrate import calibrate
from compressor.errors import ModelError
from compressor.model import blocks, load_model
from compressor.progress import Progress, Silent
from compressor.prunable import find_prunable
from compressor.sparsity import Activations


def probe_sparsity(
    source: str | Path | None,
    data: str | Path | None = None,
    *,
    windows: int = 16,
    length: int = 512,
    percent: float = 1.0,
    progress: Progress = Silent(),
) -> dict[str, Any]:
    """{percent, cett, ratio, left_out, layers: [...], massive: {...}}; raises as `compress` does.

    The first half of the windows gives thresholds, the second, 16 at most, perplexity and the shares.
    """
    progress.stage("load")
    loaded = load_model(source)
    if loaded.kind != "causal-lm":
        raise ModelError(f"{loaded.source} is an encoder, which has no perplexity; probe it without --sparsity.")
    ids = text.windows(loaded.tokenizer, text.text_of(data)[0], windows, length)
    return measured(loaded.model, ids, percent, progress)


def measured(model: nn.Module, ids: torch.Tensor, percent: float, progress: Progress) -> dict[str, Any]:
    """The result of `probe_sparsity`, for windows [S, L]."""
    fit, judge = cett.halves(ids)
    names = [name for what in find_prunable(model) if what.kind == "ffn" for name in what.readers]
    if not names:
        raise ModelError(f"{type(model).__name__}: no feed-forward layer of it could be told apart; probe another.")
    seen = calibrate(model, fit, {Activations}, names, progress)
    curves = cett.curves(model, names, seen, progress)
    best = cett.search(model, curves, judge, percent, progress)
    found = massive.find(model, ids, progress)
    layers = []
    for name in names:
        block = next(b for b, _ in blocks(model) if name.startswith(f"{b}."))
        excluded, moved = _excluded(seen.value(name, Activations), curves[name].columns)
        row = {"layer": name, "block": block, "left_out": round(best.left_out[name], 4), "dip": curves[name].dip}
        layers.append(row | {"excluded": excluded, "moved": moved, "ratio": round(found.ratios[block], 1)})
    return {
        "percent": percent,
        "cett": round(best.cett, 5),
        "ratio": round(best.ratio, 5),
        "left_out": round(sum(best.left_out.values()) / len(best.left_out), 4),
        "windows": [len(fit), len(judge), ids.shape[1]],
        "layers": layers,
        "massive": asdict(found),
    }


def _excluded(x: torch.Tensor, columns: torch.Tensor) -> tuple[float, float]:
    """Of inputs x [T, K]: the share of tokens that `usual` leaves out, and the median contribution with them over that
    without."""
    rest = sparsity.usual(x)
    middles = [(part.abs() * columns.cpu()).median().item() for part in (x, rest)]
    return round(1 - len(rest) / len(x), 4), round(middles[0] / middles[1], 4) if middles[1] else 1.0
