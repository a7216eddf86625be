"""What the pipeline asks of a transform: a step that changes the model's tensors but not what it computes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn

from compressor.calibrate import Calibration
from compressor.statistics import Statistic


@runtime_checkable
class Transform(Protocol):
    whole: bool  # whether `fold` is called once, for the whole model, instead of block by block

    def fold_needs(self) -> set[type[Statistic]]:
        """The statistics of every input that `fold` looks at."""

    def fold(self, model: nn.Module, calibration: Calibration) -> Any:
        """Replace parameters of `model`, a twin of the original; returns a dict of JSON for the manifest.

        Called block by block with that block's statistics, the block being where it ran; the parts are joined by `|`.
        A method that stores layers too returns its decisions instead, which have a report() and go to its `plan`.
        """


def amends(options: object) -> bool:
    """Whether a step's method adds to what earlier steps stored."""
    return hasattr(options, "amend")


def stores(options: object) -> bool:
    """Whether a step's method stores layers: all but a mere transform."""
    return hasattr(options, "place")
