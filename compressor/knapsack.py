"""The program of allocation.py solved exactly by dynamic programming: what its solver is checked against. Pure.

    best[b] = least cost of the groups so far in b units or fewer;  a unit is what divides all differences in size

O(G · B · C) for G groups, C choices and B units of budget: 256 experts of 1 to 3 bits have 512 units. Budgets of more
than MOST_CELLS steps are left to the solver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from compressor.allocation import Choice

MOST_CELLS = 50_000_000


def exact(groups: Mapping[str, Sequence[Choice]], budget_bytes: int) -> dict[str, str] | None:
    """Group -> the name of its choice, of the least cost within the budget; None where that is too much work.

    Raises ValueError when the smallest choices exceed the budget. Of equal costs, the first choice by size wins.
    """
    table = {name: sorted(options, key=lambda c: (c.size_bytes, c.cost, c.name)) for name, options in groups.items()}
    room = budget_bytes - sum(options[0].size_bytes for options in table.values())
    if room < 0:
        raise ValueError(f"the smallest choices take {-room} bytes more than the budget")
    extra = {name: [c.size_bytes - options[0].size_bytes for c in options] for name, options in table.items()}
    unit = math.gcd(*(size for sizes in extra.values() for size in sizes)) or 1
    units = min(room, sum(max(sizes) for sizes in extra.values())) // unit
    if units * sum(map(len, table.values())) > MOST_CELLS:
        return None
    best = np.zeros(units + 1)
    taken: list[np.ndarray] = []
    for name, options in table.items():
        costs = np.full((len(options), units + 1), np.inf)
        for row, option, size in zip(costs, options, extra[name], strict=True):
            if (step := size // unit) <= units:
                row[step:] = best[: units + 1 - step] + option.cost
        taken.append(costs.argmin(0))
        best = costs.min(0)
    chosen, left = {}, units
    for (name, options), rows in zip(reversed(table.items()), reversed(taken), strict=True):
        option = options[rows[left]]
        left -= extra[name][rows[left]] // unit
        chosen[name] = option.name
    return {name: chosen[name] for name in groups}
