"""A linear that reads only what is large in its input: around any linear, which later steps treat like any other; and
an activation that gives only what is large.

    y = W_s (m ⊙ x) + A (B x) + b        m_j = |x_j| > threshold_j, W_s = W - A B

The pair A B, of what is left out, is optional and sees all of x: so a token whose m is all ones gets W x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from compressor.kernels.sparsify import TOKENS, reference, sparsify

_EVERYWHERE: ContextVar[float | None] = ContextVar("_EVERYWHERE", default=None)


@contextmanager
def everywhere(dense: float = 0.0) -> Iterator[None]:
    """Sparsify every token but the first of a text, as decoding it token by token would: how quality is measured.

    dense: the share of its tokens, from the first on, that stay as they are; papers measure with half or more.
    """
    token = _EVERYWHERE.set(dense)
    try:
        yield
    finally:
        _EVERYWHERE.reset(token)


class SparseLinear(nn.Module):
    """`inner` [N, K] with the bias, `threshold` [K] float32; with a pair also `down` [R, K] and `up` [N, R].

    tokens   which of them lose their small values: kernels/sparsify.py
    """

    down: nn.Linear | None
    up: nn.Linear | None

    def __init__(
        self,
        inner: nn.Linear,
        threshold: Tensor,
        tokens: str,
        down: nn.Linear | None = None,
        up: nn.Linear | None = None,
    ):
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"tokens '{tokens}' is unknown; allowed: {', '.join(TOKENS)}")
        self.inner, self.down, self.up, self.tokens = inner, down, up, tokens
        self.register_buffer("threshold", threshold)
        self.in_features: int = inner.in_features
        self.out_features: int = inner.out_features

    @classmethod
    def shaped(
        cls, out_features: int, in_features: int, tokens: str, *, bias: bool = False, rank: int = 0
    ) -> SparseLinear:
        """One without values, on the meta device."""
        inner = nn.Linear(in_features, out_features, bias, device="meta")
        threshold = torch.empty(in_features, device="meta")
        if not rank:
            return cls(inner, threshold, tokens)
        down = nn.Linear(in_features, rank, False, device="meta")
        return cls(inner, threshold, tokens, down, nn.Linear(rank, out_features, False, device="meta"))

    @property
    def rank(self) -> int:
        return 0 if self.down is None else int(self.down.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(_kept(x, self.get_buffer("threshold"), self.tokens))
        return y if self.down is None or self.up is None else y + self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, rank={self.rank}"


class SparseActivation(nn.Module):
    """`activation`, one of transformers' by name, whose small values are 0: the neurons of a gate that a token uses.

    threshold [D] float32 of D neurons; tokens as of SparseLinear.
    """

    def __init__(self, activation: str, threshold: Tensor, tokens: str):
        super().__init__()
        from transformers.activations import ACT2FN

        self.activation, self.tokens = activation, tokens
        self.function: nn.Module = ACT2FN[activation]
        self.register_buffer("threshold", threshold)

    @classmethod
    def shaped(cls, features: int, activation: str, tokens: str) -> SparseActivation:
        """One without values, on the meta device."""
        return cls(activation, torch.empty(features, device="meta"), tokens)

    def forward(self, x: Tensor) -> Tensor:
        return _kept(self.function(x), self.get_buffer("threshold"), self.tokens)

    def extra_repr(self) -> str:
        return f"{self.activation}, tokens={self.tokens}"


def _kept(x: Tensor, threshold: Tensor, tokens: str) -> Tensor:
    """x [..., S, K] with what `tokens`, or `everywhere`, leaves of it."""
    if (dense := _EVERYWHERE.get()) is None:
        return sparsify(x, threshold, tokens)
    kept = reference(x, threshold, "all")
    if dense and x.dim() > 1:
        first = int(dense * x.shape[-2])
        kept[..., :first, :] = x[..., :first, :]
    return kept
