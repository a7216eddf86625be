"""What steps that train share: how far the changed model is from the original, and the order and pace of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def distance(found: Any, wanted: Any) -> Tensor:
    """Mean over tokens of KL(wanted ‖ found) of what two models give; of an encoder's hidden states, 1 − cosine."""
    if not hasattr(found, "logits"):
        states = found.last_hidden_state.float(), wanted.last_hidden_state.float()
        return (1 - torch.cosine_similarity(*states, dim=-1)).mean()
    return nn.functional.kl_div(
        found.logits.float().log_softmax(-1).flatten(0, 1),
        wanted.logits.float().log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )


def pace(done: float, warmup: float) -> float:
    """Factor of the learning rate when a share `done` of the steps is: linear warm-up, then half a cosine."""
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def batches(count: int, size: int, epochs: int, seed: int) -> list[Sequence[int]]:
    """The windows of every step: each epoch has every window once."""
    generator = torch.Generator().manual_seed(seed)
    every = [torch.randperm(count, generator=generator).tolist() for _ in range(epochs)]
    return [epoch[i : i + size] for epoch in every for i in range(0, count, size)]
