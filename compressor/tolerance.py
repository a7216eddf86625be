"""What a model would bear to lose, block by block, without changing or training anything: `compress probe`.

    turned      how much a block turns what goes through it, [0, 1]: depth goes where this is small
    channels    per feed-forward layer, the share of its channels that can go, best ones last and the rest making up for
                them, until `error` of the squares of its output is lost
    heads       per attention, the share of its output's squares that the least key-value head accounts for

Figures are of one layer at a time; what several of them cost together is for perplexity to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import data as text
from compressor.calibrate import Calibration, calibrate_blocks
from compressor.importance import ROUNDS, unit_energies
from compressor.model import blocks, load_model
from compressor.progress import Progress, Silent
from compressor.prunable import Prunable, find_prunable
from compressor.repair import eliminate
from compressor.statistics import Gram, TokenAngle


def probe(
    source: str | Path | None,
    data: str | Path | None = None,
    *,
    windows: int = 16,
    length: int = 512,
    error: float = 0.05,
    progress: Progress = Silent(),
) -> list[dict[str, Any]]:
    """One row a block: {block, turned, channels: {layer: share}, heads: {layer: share}}. Raises as `compress` does."""
    progress.stage("load")
    loaded = load_model(source)
    content, _ = text.text_of(data)
    return tolerances(loaded.model, text.windows(loaded.tokenizer, content, windows, length), error, progress)


def tolerances(model: nn.Module, windows: Tensor, error: float, progress: Progress) -> list[dict[str, Any]]:
    """The rows of `probe`, for windows [S, L]."""
    found = find_prunable(model)
    readers = {what.readers[0]: what for what in found}
    rows = {name: {"block": name, "turned": 0.0, "channels": {}, "heads": {}} for name, _ in blocks(model)}
    turned: dict[str, TokenAngle] = {}

    def measure(part: Calibration) -> None:
        for name, what in readers.items():
            if name in part:
                kind = "channels" if what.kind == "ffn" else "heads"
                row: Any = rows[next(b for b in rows if name.startswith(f"{b}."))]
                row[kind][name] = round(_share(model, what, part.value(name, Gram), error), 4)

    calibrate_blocks(model, windows, {Gram}, measure, list(readers), progress, angles=turned)
    for name, angle in turned.items():
        rows[name]["turned"] = round(angle.value(), 4)
    return list(rows.values())


def _share(model: nn.Module, what: Prunable, gram: Tensor, error: float) -> float:
    weight = torch.cat([model.get_parameter(f"{n}.weight").detach() for n in what.readers])
    whole = ((weight @ gram) * weight).sum().item()
    if what.kind == "heads":
        return unit_energies(weight, gram, what.columns, what.units).min().item() / max(whole, 1e-30)
    _, costs = eliminate(weight, gram, at_once=max(1, what.units // ROUNDS))
    return ((costs <= error * whole).sum().item() - 1) / what.units

