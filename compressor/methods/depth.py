"""Depth: the blocks that change the residual stream least are left out (Men et al. 2024, "ShortGPT").

    influence of a block = mean over tokens of the angle between its input and its output, over π

One pass, no training. What is left is numbered anew: names, the layers of the cache, and every list of the config that
has an entry for each layer. Generation suffers long before perplexity does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor.calibrate import calibrate_blocks
from compressor.config_fields import stock_of
from compressor.errors import ModelError, RecipeError
from compressor.model import blocks, linears
from compressor.prunable import to_bf16
from compressor.run import Run
from compressor.statistics import TokenAngle


@dataclass(frozen=True)
class Depth:
    """`drop` is the share of the blocks that goes, to the nearest whole one. The first and the last always stay."""

    drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop {self.drop:g} is not a share of the blocks; give a number from 0 to below 1")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """As many blocks fewer; which, the text says."""
        count = len(blocks(model))
        leave_out(model, range(count - 1 - self._number(count), count - 1))

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Leave out the blocks of least influence; the report has that of every block, by its old name."""
        order = [name for name, _ in blocks(model)]
        turned = angles(model, run)
        inner = sorted(order[1:-1], key=lambda name: turned[name])
        gone = inner[: self._number(len(order))]
        leave_out(model, [order.index(name) for name in gone])
        if gone:
            _check_config(model)
            to_bf16(model, [name for name in linears(model) if name in names])
        return {"turned": {n: round(a, 4) for n, a in turned.items()}, "left_out": sorted(gone, key=order.index)}

    def _number(self, count: int) -> int:
        number = round(count * self.drop)
        if number > count - 2:
            raise RecipeError(
                f"depth: drop {self.drop:g} of {count} blocks is {number}; at most {max(0, count - 2)} can go, since "
                f"the first and the last stay."
            )
        return number


def angles(model: nn.Module, run: Run) -> dict[str, float]:
    """How much each block turns what goes through it, [0, 1], by name."""
    found: dict[str, TokenAngle] = {}
    calibrate_blocks(
        model, run.windows, (), lambda _: None, None, run.progress, run.device, run.dtype, angles=found
    )
    return {name: angle.value() for name, angle in found.items()}


def leave_out(model: nn.Module, gone: Collection[int]) -> None:
    """Take blocks out of `model`, a twin, and number the others anew, in the config too."""
    named = blocks(model)
    stay = [i for i in range(len(named)) if i not in set(gone)]
    holder = named[0][0].rpartition(".")[0]
    model.set_submodule(holder, nn.ModuleList([named[i][1] for i in stay]))
    for new, i in enumerate(stay):
        for module in named[i][1].modules():
            if getattr(module, "layer_idx", None) == i:
                module.layer_idx = new  # type: ignore[assignment]
    config: Any = model.config
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == len(named):
            setattr(config, name, type(value)(value[i] for i in stay))
    config.num_hidden_layers = len(stay)


def _check_config(model: nn.Module) -> None:
    """Raise ModelError where blocks of the model's config would differ from its own, in a window of attention, say.

    What is the same in all blocks is no matter of which of them are left.
    """
    ours, theirs = _told(model), _told(stock_of(model, model.config))
    for key in sorted(set().union(*ours, *theirs)):
        mine, stock = ([block.get(key) for block in told] for told in (ours, theirs))
        if mine != stock and (len(set(mine)) > 1 or len(set(stock)) > 1):
            raise ModelError(
                f"{type(model).__name__}: its config cannot say which blocks are left ({key} is {mine}, and {stock} in "
                f"a model of that config); drop the step depth."
            )


def _told(model: nn.Module) -> list[dict[str, Any]]:
    """Per block, the plain values that its modules hold, by name."""
    return [
        {
            f"{name}.{attribute}".lstrip("."): value
            for name, module in block.named_modules()
            if not isinstance(module, nn.Linear)
            for attribute, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None)))
        }
        for _, block in blocks(model)
    ]
