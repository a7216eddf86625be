"""Recover: low-rank updates trained until a changed model says again what the original says, then merged.

    loss = mean over tokens of KL(original ‖ changed), or 1 − cosine of the hidden states of an encoder

LoRA by PEFT on the targeted linears, more ranks where a block turns the residual stream more (CFSP's coarse
importance). After the merge nothing of it is left: shapes, files and speed are those of the changed model. The whole
model, its original and the activations of one window must fit on the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import forward, placed
from compressor.distillation import batches, distance, pace
from compressor.errors import DataError, NumericsError, RecipeError
from compressor.methods.depth import angles
from compressor.model import blocks, linears
from compressor.prunable import linear_like, to_bf16
from compressor.run import Run
from compressor.widths import KAPPA, apportion

FEW = 8  # windows that tell how much blocks turn the stream


@dataclass(frozen=True)
class Recover:
    """`rank` is the mean over blocks; `windows` of the calibration text are trained on, `batch` a step, `epochs` times.

    warmup: the share of the steps in which the learning rate rises to `lr`; then it falls to zero.
    checkpoint: a file, written every `save_every` steps, from which the same step of the same recipe goes on.
    """

    windows: int = 256
    epochs: int = 1
    batch: int = 4
    rank: int = 8
    lr: float = 1e-4
    warmup: float = 0.05
    checkpoint: str | None = None
    save_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "epochs", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if self.rank < 2 or self.rank % 2:
            raise ValueError(f"rank {self.rank} must be an even number of 2 or more; 8 is usual")
        if not self.lr > 0:
            raise ValueError(f"lr {self.lr:g} must be above 0; 1e-4 is usual")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup {self.warmup:g} is not a share of the steps; give a number from 0 to below 1")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """No shape changes."""

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Train and merge. Raises RecipeError without PEFT, DataError for a foreign checkpoint, NumericsError."""
        try:
            import peft
        except ImportError:
            raise RecipeError(
                "recover trains with PEFT, which is not installed; pip install 'compressor[recover]'."
            ) from None
        if self.checkpoint and not Path(self.checkpoint).absolute().parent.is_dir():
            raise DataError(f"recover: checkpoint {self.checkpoint} is in a folder that does not exist; make it first.")
        windows = run.text(self.windows)
        names = [name for name in linears(model) if name in names]
        ranks = self._ranks(model, names, run)
        for name in names:  # PEFT merges into the tensor that is there, and that is the original's
            layer: Any = model.get_submodule(name)
            model.set_submodule(name, linear_like(layer, layer.weight.detach().clone(), layer.bias))
        start = torch.stack([_sample(model.get_parameter(f"{name}.weight")) for name in names])
        # Its scale is α / rank, the same for all blocks.
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=list(names),
            rank_pattern={rf"{re.escape(block)}\..*": rank for block, rank in ranks.items()},
            alpha_pattern={rf"{re.escape(block)}\..*": 2 * rank for block, rank in ranks.items()},
        )
        flags = [(p, p.requires_grad) for p in model.parameters()]  # PEFT freezes what the original shares
        try:
            # What is trained is made where it is trained, so that it comes home afterwards; the merge writes into
            # weights, and those that only visited the device would be dropped with it.
            with placed(nn.ModuleList([run.original, model]), run.device):
                with torch.random.fork_rng(), torch.enable_grad():
                    torch.manual_seed(self.seed)
                    wrapped: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
                    losses = self._train(model, windows, start, run)
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        wrapped.merge_and_unload()
        to_bf16(model, names)
        if hasattr(model, "peft_config"):
            del model.peft_config
        part = max(1, len(losses) // 10)
        return {
            "windows": len(windows),
            "steps": len(losses),
            "ranks": ranks,
            "loss_first": round(sum(losses[:part]) / part, 5),
            "loss_last": round(sum(losses[-part:]) / part, 5),
        }

    def _ranks(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, int]:
        """Even ranks of the blocks that hold a target, `rank` in the mean, none above four times that."""
        used = [block for block, _ in blocks(model) if any(n.startswith(f"{block}.") for n in names)]
        found = angles(model, dataclasses.replace(run, windows=run.windows[:FEW]))
        omega = torch.tensor([found[block] for block in used], dtype=torch.float64)
        y = torch.sigmoid(KAPPA * (omega - omega.mean()))
        half = self.rank * len(used) // 2
        pairs = apportion((half * y / y.sum()).tolist(), [2 * self.rank] * len(used), half)
        return {block: 2 * n for block, n in zip(used, pairs, strict=True)}

    def _train(self, model: nn.Module, windows: Tensor, start: Tensor, run: Run) -> list[float]:
        """Losses of all steps, those before a resumed one too. start: of the weights that are trained from."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=self.lr, weight_decay=0.0)
        order = batches(len(windows), self.batch, self.epochs, self.seed)
        checkpoint = _Checkpoint(self.checkpoint, self._key(trained, windows), start)
        losses = checkpoint.load(trained, optimizer)
        run.progress.stage("recover", len(order))
        run.progress.advance(len(losses))
        on = torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32)
        for number in range(len(losses), len(order)):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * pace(number / len(order), self.warmup)
            total = 0.0
            for i in order[number]:
                with torch.no_grad(), on:
                    wanted = forward(run.original, windows[i])
                with on:
                    loss = distance(forward(model, windows[i]), wanted) / len(order[number])
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):
                raise NumericsError(f"recover: the loss is {total} in step {number + 1}; use a smaller lr.")
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            if self.checkpoint and (len(losses) % self.save_every == 0 or len(losses) == len(order)):
                checkpoint.save(trained, optimizer, losses)
            run.progress.advance()
        return losses

    def _key(self, trained: dict[str, nn.Parameter], windows: Tensor) -> str:
        """What a checkpoint must be of: these options, parameters and text."""
        options = dataclasses.replace(self, checkpoint=None, save_every=1)
        shapes = [(n, tuple(p.shape)) for n, p in trained.items()]
        return hashlib.sha256(repr((options, shapes)).encode() + windows.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Checkpoint:
    """What training goes on from: a file at `path` of the run that `key` says, from weights like `start`."""

    path: str | None
    key: str
    start: Tensor

    def load(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """The losses of the steps that were done, none without a file. Raises DataError for another run's."""
        if not self.path or not Path(self.path).is_file():
            return []
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises half a dozen kinds for what is no file of its own
            raise DataError(f"recover: {self.path} is not a checkpoint; remove it or name another file.") from None
        # Weights within a tolerance: what pruned them need not give the same bits twice on a GPU.
        if not isinstance(saved, dict) or saved.get("key") != self.key or _differ(saved["start"], self.start):
            raise DataError(
                f"recover: {self.path} is a checkpoint of other options, another model or other text; remove it or "
                f"name another file."
            )
        for name, p in trained.items():
            p.data.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["optimizer"])
        return list(saved["losses"])

    def save(
        self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        assert self.path is not None
        path = Path(self.path)
        partial = path.with_name(f".{path.name}.partial")
        parameters = {n: p.detach().cpu() for n, p in trained.items()}
        state = {"parameters": parameters, "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save({"key": self.key, "start": self.start, **state}, partial)
        partial.replace(path)


def _sample(weight: Tensor) -> Tensor:
    """[64] of its values, in units of their RMS."""
    places = torch.linspace(0, weight.numel() - 1, 64, dtype=torch.float64).long()  # float32 ends at 2²⁴
    values = weight.detach().flatten()[places].float().cpu()
    return values / values.square().mean().sqrt().clamp_min(1e-30)


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or bool((a - b).abs().max() > 0.1)
