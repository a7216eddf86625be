"""Which way to store each group of layers, so that a budget in bytes is met at the least cost. Pure.

    minimise  Σ_g Σ_c cost_gc x_gc    subject to  Σ_g Σ_c size_gc x_gc <= budget,  Σ_c x_gc = 1,  x_gc in {0, 1}

the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11), solved as a
0/1 program by CBC through pulp. Where costs come from is sensitivity.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.errors import NumericsError, RecipeError

# CBC proves optimality up to this share of the cost, far below what a cost estimate is worth, and looks at so many
# nodes at most. A node limit and not a time limit: the same input must give the same answer on a slow machine.
GAP, NODES = 1e-6, 20_000
OBJECTIVE = 1e4  # costs are scaled to this sum: CBC's tolerances are absolute, 1e-7
RETRIES = 8


@dataclass(frozen=True)
class Choice:
    """One way to store one group of layers."""

    name: str
    size_bytes: int
    cost: float


@dataclass(frozen=True)
class Table:
    """A token table that takes part: its choices have names of their own, and so has what it is compared with."""

    shape: tuple[int, int]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Allocation:
    """The choice of each group, and what storing every group the same way would have given."""

    choices: dict[str, str]
    size_bytes: int
    cost: float
    budget_bytes: int
    # Choice name -> (size_bytes, cost, fits), for the names that every group has, tables apart.
    uniform: dict[str, tuple[int, float, bool]] = field(default_factory=dict)
    # Choice name -> what all tables have there: the best of what they all could have within the budget, else the
    # smallest. Tables have names of their own, so that "the same everywhere" is one name for them and one for the rest.
    uniform_tables: dict[str, str] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()  # which groups are tables

    def sentence(self) -> str:
        """One line: the mixture against every uniform choice."""
        beside = self.uniform_tables
        names = [choice for group, choice in self.choices.items() if group not in self.tables]
        counts = [f"{names.count(n)} {n}" for n in [*self.uniform, *sorted(set(names) - {*self.uniform})]]
        counts += [f"{group} {self.choices[group]}" for group in sorted(self.tables)]
        others = "".join(
            f"; all {name}{f', tables {beside[name]}' if beside else ''}: {cost:.4g} in {size / 1e6:.2f} MB"
            f"{'' if fits else ' (over budget)'}"
            for name, (size, cost, fits) in self.uniform.items()
        )
        return (
            f"mixed ({', '.join(counts)}): cost {self.cost:.4g} in {self.size_bytes / 1e6:.2f} of "
            f"{self.budget_bytes / 1e6:.2f} MB{others}"
        )


def allocate(
    groups: Mapping[str, Sequence[Choice]], budget_bytes: int, tables: Collection[str] = ()
) -> Allocation:
    """The cheapest choices that fit, never worse than the best uniform choice that fits.

    groups: every group has at least one choice, with names that differ; tables: which of them are token tables, which
    a uniform choice may store in another format than the rest. The answer depends neither on the order of the
    groups nor on that of their choices. Raises RecipeError when even the smallest choices exceed the budget,
    NumericsError for a cost that is not finite.
    """
    for name, options in groups.items():
        if not options or len({c.name for c in options}) < len(options):
            raise ValueError(f"group {name}: choices must be there and have different names, got {list(options)}")
        if not all(math.isfinite(c.cost) for c in options):
            raise NumericsError(f"{name}: the cost of storing it is NaN or Inf; check its weights and calibration.")
    table = {name: sorted(groups[name], key=lambda c: (c.size_bytes, c.cost, c.name)) for name in sorted(groups)}
    smallest = {name: options[0] for name, options in table.items()}
    if (least := _size(smallest)) > budget_bytes:
        raise RecipeError(
            f"the budget is {budget_bytes} bytes, but the smallest choices together take {least}; give a budget of "
            f"{least} bytes or more, or allow a smaller format."
        )
    uniform = _uniform({name: options for name, options in table.items() if name not in tables})
    beside: dict[str, str] = {}
    if tables:
        pairs = _with_tables(uniform, _uniform({name: table[name] for name in tables}), budget_bytes)
        beside = {name: other for name, (other, _) in pairs.items()}
        uniform = {name: whole for name, (_, whole) in pairs.items()}
    candidates = [smallest, *(u for u in uniform.values() if _size(u) <= budget_bytes)]
    if (solved := _solve(table, budget_bytes)) is not None:
        candidates.insert(0, solved)
    best = min(candidates, key=lambda chosen: (_cost(chosen), _size(chosen)))
    return Allocation(
        {name: best[name].name for name in groups},
        _size(best),
        _cost(best),
        budget_bytes,
        {name: (_size(u), _cost(u), _size(u) <= budget_bytes) for name, u in uniform.items()},
        beside,
        frozenset(tables),
    )


def _with_tables(
    uniform: Mapping[str, dict[str, Choice]], tables: Mapping[str, dict[str, Choice]], budget: int
) -> dict[str, tuple[str, dict[str, Choice]]]:
    """Of each uniform choice of the rest, the uniform choice of the tables that goes best with it, and both."""
    found = {}
    for name, rest in uniform.items():
        whole = {beside: rest | chosen for beside, chosen in tables.items()}
        fit = [beside for beside in whole if _size(whole[beside]) <= budget]
        best = min(fit, key=lambda b: _cost(whole[b])) if fit else min(whole, key=lambda b: _size(whole[b]))
        found[name] = (best, whole[best])
    return found


def _size(chosen: Mapping[str, Choice]) -> int:
    return sum(c.size_bytes for c in chosen.values())


def _cost(chosen: Mapping[str, Choice]) -> float:
    return math.fsum(c.cost for c in chosen.values())


def _uniform(table: Mapping[str, Sequence[Choice]]) -> dict[str, dict[str, Choice]]:
    """Choice name -> that choice in every group, smallest first."""
    named = {group: {c.name: c for c in options} for group, options in table.items()}
    common = set.intersection(*(set(options) for options in named.values())) if named else set()
    found = {name: {group: options[name] for group, options in named.items()} for name in sorted(common)}
    return dict(sorted(found.items(), key=lambda item: _size(item[1])))


def _solve(table: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice] | None:
    """The solver's choices, None where it found none that fit. Exact in bytes: they are checked as integers."""
    useful = {name: _undominated(options) for name, options in table.items()}
    chosen = {name: options[0] for name, options in useful.items()}
    room = budget - _size(chosen)  # what is left when all are at their smallest
    open_groups = {
        name: fitting
        for name, options in useful.items()
        if len(fitting := [c for c in options if c.size_bytes - options[0].size_bytes <= room]) > 1
    }
    if not open_groups:
        return chosen
    allowed = room
    for _ in range(RETRIES):
        picked = _program(open_groups, allowed)
        if picked is None:
            return None
        over = _size(picked) - _size({name: chosen[name] for name in picked}) - room
        if over <= 0:
            return _in_order(useful, chosen | picked)
        allowed -= over  # x may be 1e-6 from 0 or 1, which is bytes when sizes are large
        if allowed < 0:
            return None
    return None


def _undominated(options: Sequence[Choice]) -> list[Choice]:
    """Of choices by size, those that cost less than every smaller one."""
    kept: list[Choice] = []
    for option in options:
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _program(groups: Mapping[str, Sequence[Choice]], room: int) -> dict[str, Choice] | None:
    """The 0/1 program; sizes count from each group's smallest choice, in units of their greatest common divisor."""
    import pulp  # here, because importing it costs a fifth of a second

    unit = math.gcd(*(c.size_bytes - options[0].size_bytes for options in groups.values() for c in options)) or 1
    # From the cheapest of each group, so that large constants do not eat the digits of small differences.
    spread = math.fsum(options[0].cost - options[-1].cost for options in groups.values())
    scale = OBJECTIVE / spread
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = {
        (name, i): pulp.LpVariable(f"x_{g}_{i}", cat=pulp.LpBinary)
        for g, (name, options) in enumerate(groups.items())
        for i in range(len(options))
    }
    problem += pulp.lpSum((groups[n][i].cost - groups[n][-1].cost) * scale * v for (n, i), v in x.items())
    problem += (
        pulp.lpSum((groups[n][i].size_bytes - groups[n][0].size_bytes) // unit * v for (n, i), v in x.items())
        <= room // unit
    )
    for name, options in groups.items():
        problem += pulp.lpSum(x[name, i] for i in range(len(options))) == 1
    problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=GAP, maxNodes=NODES))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    return {
        name: max(enumerate(options), key=lambda item: x[name, item[0]].value() or 0.0)[1]
        for name, options in groups.items()
    }


def _in_order(table: Mapping[str, Sequence[Choice]], chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """Groups with equal choices are interchangeable: the first of them by name get the largest."""
    alike: dict[tuple[Choice, ...], list[str]] = {}
    for name, options in table.items():
        alike.setdefault(tuple(options), []).append(name)
    settled = dict(chosen)
    for names in alike.values():
        settled |= zip(names, sorted((chosen[n] for n in names), key=lambda c: -c.size_bytes), strict=True)
    return settled
