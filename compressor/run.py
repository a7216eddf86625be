"""What every step is given beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.progress import Progress


@dataclass(frozen=True)
class Run:
    """Calibration windows [S, L], what products are computed in, and where blocks run.

    original   the model that came in, which no step changes: a teacher
    text       the first n windows of the calibration text, fewer where it is short
    """

    windows: Tensor
    dtype: torch.dtype
    device: torch.device
    progress: Progress
    original: nn.Module
    text: Callable[[int], Tensor]
