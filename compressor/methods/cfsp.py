"""CFSP: feed-forward layers lose channels, blocks that turn the residual stream least lose most. See docs/cfsp.md.

    coarse   each block's share of the budget, from how much it turns what goes through it         widths.py
    fine     which channels stay, ranked inside one layer                                          importance.py
    repair   down_proj does, as well as it can, what it did with all channels                      repair.py

All of it from one pass over the calibration text: a layer's Gram matrix waits in a file until the widths are known.
What can be cut out is found by probing, experts and whole key-value heads too (prunable.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.calibrate import Calibration, calibrate_blocks
from compressor.config_fields import say, say_width
from compressor.errors import ModelError, RecipeError
from compressor.importance import Channels, Score, scores, unit_energies
from compressor.model import blocks
from compressor.prunable import Prunable, cut, find_prunable, linear_like, pad, to_bf16
from compressor.repair import least_squares, mean_bias
from compressor.run import Run
from compressor.statistics import ChannelMean, Gram, TokenAngle
from compressor.widths import KAPPA, alignment, apportion, keep_ratios, nearest

Allocation = Literal["cfsp", "uniform", "global"]


@dataclass(frozen=True)
class CFSP:
    """`prune` is the share of all feed-forward channels that goes, `heads` how many key-value heads of every block go
    with the queries that share them, `a` the temperature of CFSP's mapping. A plain config describes the model where
    every layer has one width: `widths: equal` gives all the multiple of the alignment that is nearest to the budget,
    `padded` fills every layer with zeros up to the widest."""

    prune: float = 0.2
    score: Score = "out_energy"
    allocation: Allocation = "cfsp"
    repair: Literal["least_squares", "bias", "none"] = "least_squares"
    widths: Literal["exact", "equal", "padded"] = "exact"
    align: int | None = None
    a: float = 1.0
    heads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune {self.prune:g} is not a share of the channels; give a number from 0 to below 1")
        if self.align is not None and self.align < 1:
            raise ValueError(f"align {self.align} must be 1 or more; 128 is usual")
        if self.widths == "equal" and self.allocation != "uniform":
            raise ValueError(f"widths: equal goes with allocation: uniform, and allocation is '{self.allocation}'")
        if self.score == "obs" and self.allocation == "global":
            raise ValueError(
                "allocation global compares scores between layers, and obs only ranks the channels of one; use "
                "allocation: cfsp or uniform"
            )
        if self.heads < 0:
            raise ValueError(f"heads {self.heads} must be 0 or more key-value heads of a block")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """Every layer at the mean width; which get more is for the text to say."""
        ffns, heads = self._found(model, names)
        if not self._does_anything:
            return
        ratios = [1 - self.prune] * len(ffns)
        keeps = [torch.arange(n) for n in self._widths(ffns, ratios)]
        for what, keep in zip(ffns, keeps, strict=True):
            cut(model, what, keep)
        for what in heads:
            cut(model, what, torch.arange(what.units - self.heads))

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Cut, repair, and say in the config what it can say. Returns widths and errors for the manifest."""
        if not self._does_anything:
            return {"pruned": "nothing: prune and heads are 0"}
        ffns, heads = self._found(model, names)
        angles: dict[str, TokenAngle] = {}
        with tempfile.TemporaryDirectory() as folder:
            kept = _Kept(Path(folder))
            readers = [name for what in (*ffns, *heads) for name in what.readers]

            def keep_statistics(part: Calibration) -> None:
                for what in (*ffns, *heads):
                    if what.readers[0] in part:
                        kept.put(what, part)

            needs = {Gram, ChannelMean}
            calibrate_blocks(
                model, run.windows, needs, keep_statistics, readers, run.progress, run.device, run.dtype, angles=angles
            )
            omega = {name: angle.value() for name, angle in angles.items()}
            run.progress.stage("prune", len(ffns) + len(heads))
            report: dict[str, Any] = {"turned": {name: round(value, 4) for name, value in omega.items()}}
            if self.prune:
                report |= self._prune_ffns(model, ffns, omega, kept, run)
            if self.heads:
                report["heads"] = self._prune_heads(model, heads, kept, run)
        to_bf16(model, names)
        return report

    @property
    def _does_anything(self) -> bool:
        return self.prune > 0 or self.heads > 0

    def _found(self, model: nn.Module, names: Collection[str]) -> tuple[list[Prunable], list[Prunable]]:
        """Feed-forward layers and heads among the targets. Raises ModelError and RecipeError for what cannot be."""
        every = [what for what in find_prunable(model) if {*what.readers, *what.rows} <= set(names)]
        ffns = [what for what in every if what.kind == "ffn"]
        heads = [what for what in every if what.kind == "heads"] if self.heads else []
        if self.prune and not ffns:
            raise ModelError(
                f"{type(model).__name__}: cfsp finds no feed-forward layer to prune among its targets; it needs "
                f"linears each of whose channels goes to one column of another. Set prune: 0, or other targets."
            )
        if self.heads and not heads:
            raise ModelError(
                f"{type(model).__name__}: cfsp finds no attention whose heads can be cut out (separate q, k and v with "
                f"two key-value heads or more); set heads: 0."
            )
        if few := next((what for what in heads if what.units <= self.heads), None):
            raise RecipeError(
                f"cfsp: heads is {self.heads}, and {few.readers[0]} has {few.units} key-value heads; at least one "
                f"must stay."
            )
        return ffns, heads

    def _step(self, ffns: Sequence[Prunable]) -> int:
        """Widths are multiples of it."""
        try:
            return alignment([what.units for what in ffns], self.align)
        except ValueError as error:
            raise RecipeError(f"cfsp: {error}.") from None

    def _widths(self, ffns: Sequence[Prunable], ratios: Sequence[float]) -> list[int]:
        """Channels that each layer keeps, in all (1 − prune) of them to the nearest multiple of the alignment."""
        units, step = [what.units for what in ffns], self._step(ffns)
        if self.widths == "equal":
            return [nearest(n, 1 - self.prune, self.align) for n in units]
        try:
            total = round(sum(units) * (1 - self.prune) / step)
            quotas = [n * r / step for n, r in zip(units, ratios, strict=True)]
            return [n * step for n in apportion(quotas, [n // step for n in units], total)]
        except ValueError as error:
            raise RecipeError(f"cfsp: {error}.") from None

    def _prune_ffns(
        self, model: nn.Module, ffns: list[Prunable], omega: dict[str, float], kept: _Kept, run: Run
    ) -> dict[str, Any]:
        block_of = [next(b for b, _ in blocks(model) if what.readers[0].startswith(f"{b}.")) for what in ffns]
        ratios = [1 - self.prune] * len(ffns)
        if self.allocation == "cfsp":
            used = list(dict.fromkeys(block_of))
            least = self._step(ffns) / min(what.units for what in ffns)
            found = keep_ratios(torch.tensor([omega[b] for b in used]), self.prune, KAPPA * self.a, least)
            by_block = dict(zip(used, found.tolist(), strict=True))
            ratios = [by_block[b] for b in block_of]
        elif self.allocation == "global":
            ratios = self._global_ratios(model, ffns, kept, run)
        widths = self._widths(ffns, ratios)
        rows: dict[str, Any] = {}
        for what, width in zip(ffns, widths, strict=True):
            ranked = self._scores(model, what, kept, run, width)
            keep = ranked.argsort(descending=True, stable=True)[:width].sort().values
            error = self._cut(model, what, keep, kept, run)
            if self.widths == "padded":
                try:
                    pad(model, what, keep, max(widths))
                except ValueError as wrong:
                    raise ModelError(f"{wrong}; set widths: exact.") from None
            rows[what.readers[0]] = {"channels": what.units, "kept": width, "error": error}
            run.progress.advance()
        before, after = {what.units for what in ffns}, {max(widths)} if self.widths == "padded" else set(widths)
        field = None
        if len(before) == len(after) == 1:
            touched = [name for what in ffns for name in (*what.rows, *what.readers)]
            field = say_width(model, touched, before.pop(), after.pop())
        return {"config": field, "kept": sum(widths), "channels": sum(w.units for w in ffns), "layers": rows}

    def _global_ratios(self, model: nn.Module, ffns: list[Prunable], kept: _Kept, run: Run) -> list[float]:
        """FLAP's: scores standardized in every layer, one threshold for all of them."""
        every = [self._scores(model, what, kept, run, 1) for what in ffns]
        standard = [(s - s.mean()) / s.std().clamp_min(1e-30) for s in every]
        order = torch.cat(standard).sort(descending=True, stable=True).values
        threshold = order[round(len(order) * (1 - self.prune)) - 1]
        return [(s >= threshold).float().mean().item() for s in standard]

    def _scores(self, model: nn.Module, what: Prunable, kept: _Kept, run: Run, least: int) -> Tensor:
        gram, mean = kept.get(what)
        down = torch.cat([model.get_parameter(f"{n}.weight").detach() for n in what.readers]).to(run.device)
        rows = tuple((model.get_parameter(f"{n}.weight").detach().to(run.device), r) for n, r in what.rows.items())
        generator = torch.Generator().manual_seed(self.seed + kept.number[what.readers[0]])
        return scores(self.score, Channels(down, gram.to(run.device), mean.to(run.device), rows, least), generator)

    def _cut(self, model: nn.Module, what: Prunable, keep: Tensor, kept: _Kept, run: Run) -> float:
        """The share of the output of `what`'s readers that is lost, by squares."""
        gram, mean = kept.get(what)
        columns = torch.isin(what.columns, keep).nonzero()[:, 0]
        weights: dict[str, Tensor] = {}
        lost = whole = 0.0
        for name in what.readers:
            layer: Any = model.get_submodule(name)
            weight, home = layer.weight.detach().to(run.device), layer.weight.device
            h = gram.to(run.device)
            made = least_squares(weight, h, columns) if self.repair == "least_squares" else weight[:, columns]
            difference = weight.clone()
            difference[:, columns] -= made
            lost += ((difference @ h) * difference).sum().item()
            whole += ((weight @ h) * weight).sum().item()
            weights[name] = made.bfloat16().float().to(home)
            if self.repair == "bias":
                extra = mean_bias(weight, mean, columns).to(home)
                bias = extra if layer.bias is None else layer.bias.detach() + extra
                model.set_submodule(name, linear_like(layer, layer.weight.detach(), bias))
        cut(model, what, keep, weights)
        return round(lost / max(whole, 1e-30), 6)

    def _prune_heads(self, model: nn.Module, heads: list[Prunable], kept: _Kept, run: Run) -> dict[str, Any]:
        """Of each block the key-value heads go whose terms in o_proj's output are the smallest."""
        rows: dict[str, Any] = {}
        for what in heads:
            gram, _ = kept.get(what)
            weight = torch.cat([model.get_parameter(f"{n}.weight").detach() for n in what.readers])
            energy = unit_energies(weight, gram, what.columns, what.units)
            keep = energy.argsort(descending=True, stable=True)[: what.units - self.heads].sort().values
            rows[what.readers[0]] = {"kept": keep.tolist(), "error": self._cut(model, what, keep, kept, run)}
            run.progress.advance()
        query = next(iter(heads[0].rows))  # its rows are those of the whole head
        before, after = heads[0].units, heads[0].units - self.heads
        config: Any = model.config
        size = len(heads[0].rows[query]) // config.num_attention_heads
        fields = {
            "num_attention_heads": config.num_attention_heads * after // before,
            "num_key_value_heads": after,
            "head_dim": size,
        }
        touched = [name for what in heads for name in (*what.rows, *what.readers)]
        if not say(model, touched, **fields):
            raise ModelError(f"{type(model).__name__}: its config cannot say that it has fewer heads; set heads: 0.")
        return rows


class _Kept:
    """Statistics of what is pruned, in files: of a large model they are more than memory holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number: dict[str, int] = {}

    def put(self, what: Prunable, part: Calibration) -> None:
        name = what.readers[0]
        self.number[name] = len(self.number)
        values = part.value(name, Gram).cpu(), part.value(name, ChannelMean).cpu()
        torch.save(values, self.folder / str(self.number[name]))

    def get(self, what: Prunable) -> tuple[Tensor, Tensor]:
        """Gram matrix [K, K] and mean [K] of the readers' input."""
        gram, mean = torch.load(self.folder / str(self.number[what.readers[0]]))
        return gram, mean
