"""Hadamard matrices: entries ±1, orthogonal rows; what a rotation spreads outliers with.

    order 1, 2, and twice any order    Sylvester 1867
    q + 1, q prime, q ≡ 3 mod 4        Paley 1933, I
    2 (q + 1), q prime, q ≡ 1 mod 4    Paley 1933, II
    any product of two orders          the Kronecker product

which reaches the widths of language models (576 = 36 · 16, 896 = 28 · 32, 5120 = 20 · 256). Left out: prime powers q,
Williamson's and later constructions, whose smallest orders are 52, 92 and 100. An order without a construction gets a
random orthogonal matrix.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["hadamard", "random"]
TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


@lru_cache(maxsize=256)
def construction(order: int) -> tuple[int, ...] | None:
    """Orders of the factors of the Kronecker product, powers of two as one; None where no construction gives it."""
    if order > 0 and order & (order - 1) == 0:
        return (order,)
    for small in (2, *range(12, int(order**0.5) + 1, 4)):  # doubling first: it leaves Paley's part as small as possible
        if order % small == 0 and (large := construction(order // small)) and (rest := construction(small)):
            twos = [n for n in (*large, *rest) if n & (n - 1) == 0]
            return (*(n for n in (*large, *rest) if n not in twos), prod(twos))
    return (order,) if _paley(order) is not None else None


def hadamard(order: int) -> Tensor | None:
    """H [n, n] float64 with H Hᵀ = n I and entries ±1, or None where no construction gives the order."""
    factors = construction(order)
    if factors is None:
        return None
    result = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        result = torch.kron(result, _base(factor))
    return result


def rotation(order: int, kind: Kind, generator: torch.Generator) -> tuple[Tensor, str]:
    """(R [n, n] float64 orthogonal, what it is).

    hadamard   diag(±1) H / √n with random signs, so that no input meets the constant row of H by its nature; where
               there is no H of that order, random
    random     uniform over orthogonal matrices: QR of a normal matrix, the signs of diag(R) made positive
    """
    h = hadamard(order) if kind == "hadamard" else None
    if h is not None:
        signs = torch.randint(0, 2, (order, 1), generator=generator).double() * 2 - 1
        return signs * h / order**0.5, f"hadamard, {' x '.join(map(str, construction(order) or ()))}"
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    why = "" if kind == "random" else f", no Hadamard matrix of order {order} is known here"
    return q * r.diagonal().sign(), f"random orthogonal{why}"


def _base(order: int) -> Tensor:
    """A power of two or one of Paley's orders."""
    if order & (order - 1) == 0:
        return torch.ones(1, 1, dtype=torch.float64) if order == 1 else torch.kron(_base(order // 2), TWO)
    q = _paley(order)
    assert q is not None
    border = torch.ones(q + 1, q + 1, dtype=torch.float64)
    border[0, 0] = 0
    border[1:, 1:] = _residues(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if q + 1 == order:
        border[1:, 0] = -1  # skew: S + Sᵀ = 0 and S Sᵀ = q I
        return eye + border
    return torch.kron(border, TWO) + torch.kron(eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))


def _residues(q: int) -> Tensor:
    """[q, q] with 1 where row - column is a square modulo q, -1 where it is not, 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    i = torch.arange(q)
    return character[(i[:, None] - i) % q]


def _paley(order: int) -> int | None:
    """The prime of Paley's construction I or II of this order."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    q = order // 2 - 1
    return q if order % 4 == 0 and q % 4 == 1 and _is_prime(q) else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
