"""What a recipe will do to a model, from shapes alone: which step takes which linear, and the bytes that come out.

What `--dry-run` prints is what the pipeline runs by: both ask `placements_of`. No calibration text is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from compressor.errors import ModelError, RecipeError
from compressor.methods.quantize import Placement
from compressor.methods.structural import Structural
from compressor.methods.transform import Transform, amends, stores
from compressor.model import Loaded, as_loaded, is_tied, linears, load_model, twin, unaccounted, untie
from compressor.recipe import Recipe, Step, shares_a_budget
from compressor.structure import hollow, unit_of
from compressor.table_budget import auto_tables
from compressor.tables import place_tables


@dataclass(frozen=True)
class Row:
    """One weight matrix of the plan."""

    name: str
    shape: tuple[int, ...]
    action: str
    bits_per_weight: float
    bytes_before: int  # in bf16
    bytes_after: int
    note: str


@dataclass
class Plan:
    """What a recipe will do to a model, before any calibration."""

    rows: list[Row]
    bytes_before: int  # of the original's weight matrices, whatever takes their place
    bytes_after: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_after = sum(r.bytes_after for r in self.rows)


def plan_of(model: nn.Module | str | Path | None, recipe: Recipe) -> Plan:
    """Every weight matrix, what happens to it and the bytes it will take. No calibration text is read."""
    loaded = loaded_for(recipe, model, None)
    rows = []
    model = outlined(loaded.model, recipe)
    inside, tables = placements_of(loaded.model, recipe)
    placed = [(n, tuple(m.weight.shape), inside[n][1]) for n, m in linears(model).items()]
    placed += [(n, shape, place) for n, (shape, place) in tables.items()]
    for name, shape, place in placed:
        weights = shape[0] * shape[1]
        after = place.size_bytes or weights * 2
        action = place.kept or (place.format or "") + (f" g{place.group_size}" if place.group_size else "")
        rows.append(Row(name, shape, action, after * 8 / weights, weights * 2, after, place.note))
    inside_before = sum(m.weight.numel() for m in linears(loaded.model).values())
    return Plan(rows, 2 * (inside_before + sum(shape[0] * shape[1] for shape, _ in tables.values())))


def outlined(model: nn.Module, recipe: Recipe, done: int = 0) -> nn.Module:
    """The model with the shapes that the budgets of the recipe's structural steps imply, and then without values.

    model   what comes in, or the working model after the first `done` steps
    """
    steps = [step for step in recipe.steps[done:] if isinstance(step.options, Structural)]
    model = hollow(model) if steps else model
    for step in steps:
        step.options.outline(model, [n for n in linears(model) if targeted(step, n)])
    return model


def _as_stored(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with the tables that will be stored: a step may untie them."""
    if is_tied(model) and any(getattr(step.options, "unties", False) for step in recipe.steps):
        untie(model := twin(model))
    return model


def placements_of(
    model: nn.Module, recipe: Recipe, done: int = 0
) -> tuple[dict[str, tuple[Step | None, Placement]], dict[str, tuple[tuple[int, int], Placement]]]:
    """The step that takes each linear, and what it will do; shape and placement of each table.

    model   what comes in, or the working model after the first `done` steps
    Raises RecipeError and ModelError for what nobody takes.
    """
    stored = _as_stored(model, recipe)
    tables, auto = place_tables(stored, recipe).placements, auto_tables(stored, recipe)
    if any(isinstance(step.options, Structural) for step in recipe.steps[done:]):
        model = hollow(model)
    layers = linears(model)
    reshaped: dict[str, str] = {}
    placed: dict[str, tuple[Step | None, Placement]] = {}
    misfits: list[str] = []
    for number, step in enumerate(recipe.steps, 1):
        where = f"step {number} ({step.method})"
        if getattr(step.options, "four_over_six", False) and recipe.runtime != "compressor":
            raise RecipeError(
                f"{where}: only our own ops compute four_over_six activations; set runtime: compressor too, or drop it."
            )
        for pattern in step.targets if number > done else ():
            if not any(fnmatchcase(n, pattern) for n in layers):
                raise RecipeError(
                    f"{where}: target '{pattern}' matches no linear of this model; names look like "
                    f"{', '.join(list(layers)[:3])}."
                )
        if isinstance(step.options, Transform | Structural):  # it must not find linears that are stored already
            if taken := next((n for n, (owner, _) in placed.items() if owner is not None), None):
                raise RecipeError(
                    f"{where}: {taken} is already compressed by an earlier step; put {step.method} before it."
                )
        if isinstance(step.options, Structural):
            if number > done:
                step.options.outline(model, [n for n in layers if targeted(step, n)])
                layers = linears(model)
            reshaped |= {n: f"{where}: bf16" for n in layers if targeted(step, unit_of(model, n))}
        if amends(step.options):
            amended = [n for n, (owner, p) in placed.items() if owner and p.kept is None and targeted(step, n)]
            if not amended:
                raise RecipeError(
                    f"{where}: no step before it stores a linear that it targets; put it behind the step that does."
                )
            for name in amended:
                owner, place = placed[name]
                assert owner is not None
                if owner.options.sequential:
                    raise RecipeError(
                        f"{where}: needs the weights that {owner.method} replaces where sequential is true; set "
                        f"{owner.method}.sequential=false."
                    )
                size = place.size_bytes + step.options.extra_bytes(*layers[name].weight.shape)
                note = f"{place.note}; " if place.note else ""
                placed[name] = (owner, replace(place, size_bytes=size, note=f"{note}{step.method} on average"))
        if not stores(step.options):
            continue
        for name, layer in layers.items():
            if not any(fnmatchcase(name, p) for p in step.targets):
                continue
            if any(fnmatchcase(name, p) for p in step.ignore):
                placed.setdefault(name, (None, Placement(kept=f"{where}: ignore")))
                continue
            if name in placed and placed[name][0] is not None:
                raise RecipeError(
                    f"{where}: {name} is already compressed by an earlier step; add it to this step's ignore."
                )
            place = step.options.place(*layer.weight.shape)
            if place.kept and step.options.on_misfit != "keep":
                misfits.append(f"{name}: {place.kept}")
            placed[name] = (step, place)
        if shares_a_budget(step):
            mine = {n: tuple(layers[n].weight.shape) for n, (owner, _) in placed.items() if owner is step}
            shared = step.options.place_all(mine, auto)
            placed |= {n: (step, shared[n]) for n in mine}
            tables |= {n: (auto[n].shape, shared[n]) for n in auto}
        if misfits:
            raise RecipeError(
                f"{where}: {len(misfits)} layers cannot be stored this way ({misfits[0]}); "
                f"set on_misfit: pad or on_misfit: keep."
            )
    for name in layers:
        placed.setdefault(name, (None, Placement(kept=reshaped.get(name, "in no step's targets"))))
    if left := unaccounted(model, {f"{n}.weight" for n in layers}):
        listed = ", ".join(f"{n} {list(shape)}" for n, shape in left[:5])
        raise ModelError(
            f"{len(left)} large weights would stay uncompressed and no rule of the recipe says so: {listed}"
            f"{', …' if len(left) > 5 else ''}; this version compresses linears only."
        )
    return placed, tables


def stored_by(placements: Mapping[str, tuple[Step | None, Placement]], model: nn.Module) -> set[str]:
    """The linears that some step packs, and those whose factors it packs; `model` has the shapes that are packed."""
    names = {n for n, (owner, place) in placements.items() if owner is not None and place.kept is None}
    return names | {unit_of(model, n) for n in names}


def targeted(step: Step, name: str) -> bool:
    """Whether a step is for the linear `name`."""
    return any(fnmatchcase(name, p) for p in step.targets) and not any(fnmatchcase(name, p) for p in step.ignore)


def loaded_for(recipe: Recipe, model: nn.Module | str | Path | None, tokenizer: Any) -> Loaded:
    """The model that is given, as it is or loaded, else the recipe's own."""
    if isinstance(model, nn.Module):
        return as_loaded(model, tokenizer)
    return load_model(model if model is not None else recipe.model)
