"""What the pipeline asks of a structural step: one that puts modules of other shapes in place of linears.

Such steps come before all that store layers. Nothing else knows about them afterwards: later steps see the linears that
are there then, under their names, and `structure.between` finds what the artifact has to remember.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from compressor.calibrate import Calibration
from compressor.run import Run
from compressor.sensitivity import Fisher
from compressor.statistics import Statistic


@runtime_checkable
class Structural(Protocol):
    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """Give `model`, whose parameters have no values, the shapes that the budget implies for the linears `names`.

        What data decides (which layer gets how much of the budget) is left at its mean: this is the dry run.
        """


class ByBlock(Structural, Protocol):
    """A structural step that gets the statistics of linears' inputs block by block."""

    sequential: bool  # whether `reshape` gets one site at a time, measured beside the model as it was (paired.py)

    @property
    def sensitivity(self) -> str:
        """The Fisher information that decisions need: "error" none, "kl" by output, "kfac" of all pairs of outputs."""

    def survey_needs(self) -> set[type[Statistic]]:
        """The statistics for decisions over the whole model, often none."""

    def survey(
        self, layers: Mapping[str, nn.Linear], calibration: Calibration, fisher: Fisher | None
    ) -> dict[str, Any]:
        """Of each linear of one block, what decisions look at. Not called where `survey_needs` is empty."""

    def decide(self, looked: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], fisher: Fisher | None) -> Any:
        """Anything that `reshape` takes. looked: the surveys of all blocks; shapes: [N, K] of the step's linears."""

    def needs(self) -> set[type[Statistic]]:
        """The statistics of every input that `reshape` looks at."""

    def reshape(self, model: nn.Module, calibration: Calibration, decisions: Any) -> dict[str, Any]:
        """Replace the linears of `model`, a twin of the original, that `calibration` has; JSON for the manifest.

        Called block by block with that block's statistics, the block being where it ran.
        """


@runtime_checkable
class Searching(Structural, Protocol):
    """A step by block that may better its decisions by running the model with them."""

    def search(
        self, model: nn.Module, names: Collection[str], decisions: Any, run: Run, generator: torch.Generator
    ) -> Any:
        """What `reshape` takes in place of `decisions`; `model` stays as it is."""


@runtime_checkable
class Settling(Structural, Protocol):
    """A step by block whose modules look once more at what they get when all of them are there."""

    def settle(self, model: nn.Module, names: Collection[str], decisions: Any, run: Run) -> None:
        """Change, in place, values of the modules that `reshape` made."""


@runtime_checkable
class Rewriting(Structural, Protocol):
    """A structural step that runs the model itself: what it decides needs every block, or it trains.

    One that takes more text than the calibration windows, by `run.text`, has a field `windows` that says how much:
    quality is measured on text behind it.
    """

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """As `reshape`, on the linears `names` of the whole model, without statistics."""
