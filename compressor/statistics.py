"""Running reductions over the inputs of a layer: constant memory, associative merge, no activation is kept.

    s = ChannelSquare.start(K); s.add(x) for every x [T, K]; s.merge(other); s.value()

Cutting the tokens anywhere and merging the parts in any order gives the same value (sums to float64 rounding,
maxima exactly), so calibration over many machines is one all-reduce. A new reduction (a quantile, …) is one more
subclass: calibration only knows these four verbs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressor.kernels import codec


class Statistic(ABC):
    """`x` is [T, K] of any float dtype and device; the state lives on the CPU unless a subclass says otherwise."""

    tokens: int = 0  # T seen so far
    singular: ClassVar[bool] = False  # whether the value is a matrix that fewer tokens than K leave without full rank

    @classmethod
    @abstractmethod
    def start(cls, features: int) -> Self:
        """Nothing seen yet, K = features."""

    @abstractmethod
    def add(self, x: Tensor) -> None:
        """Take T more tokens."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take everything that `other` has seen; `other` stays as it is."""

    @abstractmethod
    def value(self) -> Tensor:
        """The reduction, float32. Raises ValueError when no token was seen: there is no neutral answer."""

    def _require_tokens(self) -> None:
        if not self.tokens:
            raise ValueError(f"{type(self).__name__} has seen no token")


class _Products(Statistic):
    """A sum of products of channels, [K, K] float32, which stays where the inputs are: at K = 14336 it is 0.8 GB, too
    much to move for every window."""

    def __init__(self, features: int):
        self.features = features
        self.total: Tensor | None = None

    @classmethod
    def start(cls, features: int) -> Self:
        return cls(features)

    def _sum(self, x: Tensor) -> Tensor:
        """The sum so far, zeros where `x` is if it is the first."""
        if self.total is None:
            self.total = x.new_zeros(self.features, self.features)
        return self.total

    def merge(self, other: Self) -> None:
        if other.total is not None:
            self.total = other.total.clone() if self.total is None else self.total + other.total.to(self.total.device)
            self.tokens += other.tokens

    def value(self) -> Tensor:
        self._require_tokens()
        assert self.total is not None
        return self.total / self.tokens


class Gram(_Products):
    """Mean of x xᵀ, [K, K]: H = XᵀX / T, what second-order methods work on.

    It is symmetric, so only the blocks on and above the diagonal are added up: 5/8 of the products.
    """

    PARTS = 4
    singular = True

    def add(self, x: Tensor) -> None:
        x = x.float()
        total, width = self._sum(x), -(-self.features // self.PARTS)
        for start in range(0, self.features, width):
            rows = slice(start, start + width)
            total[rows, start:].addmm_(x[:, rows].T, x[:, start:])
        self.tokens += len(x)

    def value(self) -> Tensor:
        upper = super().value().triu_()
        return upper.add_(upper.triu(1).T)


class CrossGram(_Products):
    """Mean of x₀ xᵀ, [K, K], x an input and x₀ what it was before the layers in front of it were changed."""

    def add(self, x: Tensor) -> None:
        """Tokens that are what they were."""
        self.add_pair(x, x)

    def add_pair(self, x: Tensor, before: Tensor) -> None:
        """The same T tokens now and before, both [T, K]."""
        x, before = x.float(), before.float()
        self._sum(x).addmm_(before.T, x)
        self.tokens += len(x)


class BlockNoise(Statistic):
    """Mean squared error of rounding x to E2M1 in blocks of 16 with their ideal scale, per channel, [K].

    What 4-bit activations cost, before any weight is looked at. Zeros fill the last block where 16 does not divide K.
    """

    def __init__(self, features: int):
        self.total = torch.zeros(features, dtype=torch.float64)

    @classmethod
    def start(cls, features: int) -> Self:
        return cls(features)

    def add(self, x: Tensor) -> None:
        blocks = codec.blocks_of(torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 16)), 16)
        step = (blocks.abs().amax(-1, keepdim=True) / codec.E2M1_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        error = (codec.round_e2m1(blocks / step) * step - blocks).flatten(-2)[:, : x.shape[-1]]
        self.total += error.square().sum(0, dtype=torch.float64).cpu()
        self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.tokens += other.tokens

    def value(self) -> Tensor:
        self._require_tokens()
        return (self.total / self.tokens).float()


class AbsMax(Statistic):
    """Largest |x| over all channels, a scalar []."""

    def __init__(self) -> None:
        self.top = torch.zeros(())

    @classmethod
    def start(cls, features: int) -> Self:
        return cls()

    def add(self, x: Tensor) -> None:
        if len(x):
            low, high = x.aminmax()
            self.top = torch.maximum(self.top, torch.maximum(-low, high).float().cpu())
            self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self.top = torch.maximum(self.top, other.top)
        self.tokens += other.tokens

    def value(self) -> Tensor:
        self._require_tokens()
        return self.top.clone()


class ChannelMean(Statistic):
    """Mean of x per channel, [K]."""

    def __init__(self, features: int):
        self.total = torch.zeros(features, dtype=torch.float64)

    @classmethod
    def start(cls, features: int) -> Self:
        return cls(features)

    def add(self, x: Tensor) -> None:
        self.total += self.term(x.float()).sum(0, dtype=torch.float64).cpu()
        self.tokens += len(x)

    def term(self, x: Tensor) -> Tensor:
        return x

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.tokens += other.tokens

    def value(self) -> Tensor:
        self._require_tokens()
        return (self.total / self.tokens).float()


class ChannelSquare(ChannelMean):
    """Mean of x² per channel, [K]: the diagonal of XᵀX / T."""

    def term(self, x: Tensor) -> Tensor:
        return x.square()


class ChannelAbsMean(ChannelMean):
    """Mean of |x| per channel, [K]."""

    def term(self, x: Tensor) -> Tensor:
        return x.abs()


class ChannelMinMax(Statistic):
    """Smallest and largest x per channel, [2, K]."""

    def __init__(self, features: int):
        self.low = torch.full((features,), float("inf"))
        self.high = torch.full((features,), -float("inf"))

    @classmethod
    def start(cls, features: int) -> Self:
        return cls(features)

    def add(self, x: Tensor) -> None:
        if len(x):
            low, high = x.aminmax(dim=0)
            self.low = torch.minimum(self.low, low.float().cpu())
            self.high = torch.maximum(self.high, high.float().cpu())
            self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.tokens += other.tokens

    def value(self) -> Tensor:
        self._require_tokens()
        return torch.stack((self.low, self.high))


class ChannelAbsMax(ChannelMinMax):
    """Largest |x| per channel, [K]."""

    def value(self) -> Tensor:
        return super().value().abs().amax(0)


class TokenSample(Statistic):
    """SIZE of the tokens, or all where there are fewer, [M, K]: what errors of whole outputs are measured on.

    A token's rank is a hash of its values, so the choice depends on neither the order of the tokens nor on a seed. Kept
    in bfloat16: 128 tokens of K = 14336 are 3.7 MB.
    """

    SIZE = 128

    def __init__(self, features: int):
        self.kept = torch.empty(0, features, dtype=torch.bfloat16)
        self.ranks = torch.empty(0, dtype=torch.long)  # of the kept rows, ascending

    @classmethod
    def start(cls, features: int) -> Self:
        return cls(features)

    def add(self, x: Tensor) -> None:
        rows = x.bfloat16()
        # Odd multipliers that differ from channel to channel, then the middle bits of the sum: plain modular hashing.
        factors = torch.arange(rows.shape[1], device=x.device) * 2_654_435_761 % (1 << 31) | 1
        ranks = ((rows.view(torch.int16).long() * factors).sum(-1) * 40_503 >> 13) % (1 << 31)
        self._keep(rows, ranks)
        self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self._keep(other.kept, other.ranks)
        self.tokens += other.tokens

    def _keep(self, rows: Tensor, ranks: Tensor) -> None:
        if len(self.kept) == self.SIZE:  # most rows of a long text end here
            better = ranks < self.ranks[-1].item()
            rows, ranks = rows[better], ranks[better]
        rows, ranks = torch.cat((self.kept, rows.cpu())), torch.cat((self.ranks, ranks.cpu()))
        first = ranks.argsort(stable=True)[: self.SIZE]
        self.kept, self.ranks = rows[first], ranks[first]

    def value(self) -> Tensor:
        self._require_tokens()
        return self.kept.float()


class TokenAngle:
    """How much a block turns the residual stream: the mean over tokens of the angle between its input and output, over
    π, in [0, 1]; of two inputs, unlike the reductions above, but merged as they are."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y [T, H]: what went into the block and what came out. A zero vector is at a right angle to any."""
        cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1)
        self.total += cosine.arccos().sum().item() / math.pi
        self.tokens += len(x)

    def merge(self, other: TokenAngle) -> None:
        self.total += other.total
        self.tokens += other.tokens

    def value(self) -> float:
        if not self.tokens:
            raise ValueError("TokenAngle has seen no token")
        return self.total / self.tokens
