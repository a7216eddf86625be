"""The straight line: recipe -> model -> [calibrate -> reshape | plan -> apply] per step and block -> Artifact.

The model that comes in is read and never changed: methods are pure and what they return lives in the Artifact,
so the original is still there to measure against. Steps work on a twin that shares its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import data as text
from compressor import evaluate
from compressor.artifact import Artifact
from compressor.blockwise import device_of, placed
from compressor.calibrate import Calibration, calibrate, calibrate_blocks, fast_dtype
from compressor.errors import DataError, ModelError, RecipeError
from compressor.layers import Packed, build, hadamard_of, hold_dense
from compressor.methods.quantize import LayerPlan, Placement
from compressor.methods.structural import Rewriting, Structural
from compressor.methods.transform import Transform, amends, stores
from compressor.model import (
    Loaded,
    as_loaded,
    embedding_name,
    is_tied,
    linears,
    load_model,
    skeleton,
    twin,
    unaccounted,
    untie,
)
from compressor.paired import calibrate_pairs
from compressor.progress import Progress, Silent
from compressor.recipe import Recipe, Step, shares_a_budget
from compressor.run import Run
from compressor.sensitivity import Fisher, output_fisher
from compressor.structure import Structure, as_json, between, hollow, unit_of
from compressor.table_budget import auto_tables, head_among, weighed
from compressor.tables import HEAD_WINDOWS, head_importance, pack_tables, place_tables

QUALITY_WINDOWS = 16
SURVEY_WINDOWS, FISHER_WINDOWS = 8, 4  # decisions over the whole model need means, not matrices: few tokens do


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


def compress(
    model: nn.Module | str | Path | None,
    recipe: Recipe | str | Path,
    *,
    tokenizer: Any | None = None,
    data: str | Path | None = None,
    quality_text: str | Path | None = None,
    measure: bool = True,
    device: str | None = None,
    progress: Progress = Silent(),
) -> Artifact:
    """Compress a language model or encoder.

    model         a transformers model (left unchanged), or a folder, hub id, .gguf file or demo name; None takes
                  the recipe's own
    data          calibration text: a file, a hub dataset id, or None for the recipe's, else for shipped prose
    quality_text  text to measure before and after on; by default the part of `data` that calibration left over
    measure       False skips that measurement
    device        where blocks run, one at a time; None: where the model is. Weights stay where they are, those of a
                  model that is loaded here in main memory, so a device needs room for one block (to measure: for all)
    Raises RecipeError, ModelError, DataError, NumericsError.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    progress.stage("load")
    loaded = _load(model, recipe, tokenizer)
    where = torch.device(device) if device else device_of(loaded.model)
    placements, _ = _place(loaded.model, recipe)
    torch.manual_seed(recipe.seed)

    source = data if data is not None else recipe.calibration.data
    content, described = text.text_of(source)
    if source is None:
        progress.note(f"calibrating on {described}")
    count, length = recipe.calibration.windows, recipe.calibration.length
    windows = _windows(loaded, content, count, length)
    if len(windows) < count:
        progress.note(f"the text has {len(windows)} windows of {length} tokens, {count} were asked for")

    chosen = recipe.calibration.dtype
    dtype = fast_dtype(where) if chosen == "auto" else getattr(torch, chosen)
    run = Run(windows, dtype, where, progress, loaded.model, lambda n: _windows(loaded, content, n, length))
    held_out = None
    if measure:  # read before the long work: a typo should not cost the compression
        given = content if source is not None else None
        held_out = _quality_windows(loaded, given, quality_text, len(windows), length)
    working = twin(loaded.model)
    packed: dict[str, Packed] = {}
    details: dict[str, dict[str, Any]] = {}
    stored = _stored(placements, outlined(loaded.model, recipe))
    structure: Structure = {}
    reports: dict[str, Any] = {}
    ledger: list[dict[str, Any]] = []  # what is left of the model after each step that changed its shapes
    decided: dict[str, str] = {}  # the formats of tables that are auto
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step.options, Structural):
            reports[f"{number} {step.method}"] = _reshape(working, step, recipe, run)
            structure = between(skeleton(working.config, loaded.kind), working)
            placements, _ = _place(working, recipe, number)
            stored = _stored(placements, outlined(working, recipe, number))
            ledger.append({"after": f"{number} {step.method}", "parameters": _count(working)})
            if held_out is not None:
                ledger[-1] |= _quality(loaded, working, held_out, run)
            continue
        if amends(step.options):
            changed, reports[f"{number} {step.method}"] = _amend(working, step, packed, recipe, run)
            packed |= changed
            continue
        names = {n for n, (owner, place) in placements.items() if owner is step and place.kept is None}
        if isinstance(step.options, Transform):
            decisions = _fold(working, step, stored, run)
        else:
            decisions = _survey(working, step, names, recipe, run)
            decided |= getattr(decisions, "table_formats", {})
        if decisions is not None:
            reports[f"{number} {step.method}"] = decisions if isinstance(decisions, dict) else decisions.report()
        if stores(step.options):
            packed |= _compress(working, step, names, decisions, details, run)

    progress.stage("tables")
    tables = pack_tables(working, recipe, windows=windows, decided=decided)
    packed |= {name: _on_cpu(table) for name, table in tables.packed.items()}
    kept, tied = _kept(working, packed, tables.dtypes, tables.tied)
    artifact = Artifact(
        config=working.config,  # a transform may have untied the head
        kind=loaded.kind,
        tokenizer=loaded.tokenizer,
        recipe=recipe.model_copy(update={"model": loaded.source}),
        packed=packed,
        kept=kept,
        tied=tied,
        structure=structure,
        generation_config=getattr(loaded.model, "generation_config", None),
        record={
            "model": loaded.source,
            "calibration": {"text": described, "windows": len(windows), "length": length, "dtype": str(dtype)[6:]},
            "steps": reports,
            "layers": details,
            "kept": {n: p.kept for n, (_, p) in placements.items() if p.kept}
            | {n: p.kept for n, (_, p) in tables.placements.items() if p.kept},
        },
    )
    if ledger:
        artifact.record |= {"parameters": _count(loaded.model), "ledger": ledger, "structure": as_json(structure)}
    if held_out is not None:
        compressed = artifact.model(dense=True, device=run.device)
        artifact.record["quality"] = _quality(loaded, compressed, held_out, run)
    return artifact


def _amend(
    model: nn.Module, step: Step, packed: Mapping[str, Packed], recipe: Recipe, run: Run
) -> tuple[dict[str, Packed], dict[str, Any]]:
    """What one step adds to the targeted linears among `packed`, block by block, and its report."""
    options = step.options
    layers = {n: m for n, m in linears(model).items() if n in packed and _targeted(step, n)}
    decisions = _decide(model, step, set(layers), recipe, run, packed)
    made: dict[str, Packed] = {}
    report: dict[str, Any] = {}

    def amend_block(part: Calibration) -> None:
        inside = {n: m for n, m in layers.items() if n in part}
        changed, rows = options.amend(inside, part, packed, decisions)
        made.update(changed)
        report.update(rows)

    calibrate_blocks(model, run.windows, options.needs(), amend_block, layers, run.progress, run.device, run.dtype)
    return made, report


def _decide(
    model: nn.Module, step: Step, names: set[str], recipe: Recipe, run: Run, packed: Mapping[str, Packed] | None = None
) -> Any:
    """Decisions over the whole model from a survey of one block at a time; packed: of a step that amends."""
    options = step.options
    layers = {n: m for n, m in linears(model).items() if n in names}
    looked: list[Any] = []
    if needs := options.survey_needs():
        fisher = _fisher(model, list(layers), recipe, run)

        def look(part: Calibration) -> None:
            inside = {n: m for n, m in layers.items() if n in part}
            looked.append(options.survey(inside, part, fisher, *([] if packed is None else [packed])))

        windows = run.windows[:SURVEY_WINDOWS]
        calibrate_blocks(model, windows, needs, look, names, run.progress, run.device, run.dtype)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    return options.decide(reduce(or_, looked) if looked else None, shapes)


def _fisher(model: nn.Module, names: list[str], recipe: Recipe, run: Run, rows: str | None = None) -> Fisher:
    generator = torch.Generator().manual_seed(recipe.seed)
    return output_fisher(model, run.windows[:FISHER_WINDOWS], names, generator, run.progress, run.device, rows)


def _stored(placements: Mapping[str, tuple[Step | None, Placement]], model: nn.Module) -> set[str]:
    """The linears that some step packs, and those whose factors it packs; `model` has the shapes that are packed."""
    names = {n for n, (owner, place) in placements.items() if owner is not None and place.kept is None}
    return names | {unit_of(model, n) for n in names}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _reshape(model: nn.Module, step: Step, recipe: Recipe, run: Run) -> dict[str, Any]:
    """One structural step on the targeted linears: `model` has modules of other shapes afterwards."""
    options = step.options
    names = {n for n in linears(model) if _targeted(step, n)}
    if isinstance(options, Rewriting):
        return options.rewrite(model, names, run)
    decisions = (_decide if hasattr(options, "decide") else _survey)(model, step, names, recipe, run)
    needs = options.needs()
    seen = run.windows if needs else run.windows[:1]
    if options.whole:
        found = calibrate(model, seen, needs, names, run.progress, run.device, run.dtype)
        return options.reshape(model, found, decisions)
    parts: list[dict[str, Any]] = []

    def reshape_block(part: Calibration) -> None:
        parts.append(options.reshape(model, part, decisions))

    if getattr(options, "paired", False):
        calibrate_pairs(model, twin(model), seen, reshape_block, names, run.progress, run.device, run.dtype)
        return reduce(or_, parts, {})
    sequential = options.sequential and bool(needs)
    calibrate_blocks(model, seen, needs, reshape_block, names, run.progress, run.device, run.dtype, sequential)
    return reduce(or_, parts, {})


def _fold(model: nn.Module, step: Step, stored: set[str], run: Run) -> Any:
    """One transform on the targeted linears that some step stores; `model` computes the same afterwards.

    What no step stores gains nothing, and could not be kept with a rotated input: only our ops rotate. Means settle
    with few windows. A method that stores layers may fix ranges here, and sees every token.
    """
    options = step.options
    names = [n for n in linears(model) if n in stored and _targeted(step, n)]
    needs = options.fold_needs()
    seen = run.windows[: (len(run.windows) if stores(options) else SURVEY_WINDOWS) if needs else 1]
    if options.whole:
        return options.fold(model, calibrate(model, seen, needs, names, run.progress, run.device, run.dtype))
    parts: list[Any] = []

    def fold_block(part: Calibration) -> None:
        parts.append(options.fold(model, part))

    calibrate_blocks(model, seen, needs, fold_block, names, run.progress, run.device, run.dtype)
    return reduce(or_, parts) if parts else None


def _targeted(step: Step, name: str) -> bool:
    return any(fnmatchcase(name, p) for p in step.targets) and not any(fnmatchcase(name, p) for p in step.ignore)


def _survey(model: nn.Module, step: Step, names: set[str], recipe: Recipe, run: Run) -> Any:
    """What the step's method decides about all its linears at once, and about tables that share their budget.

    None where it has nothing to decide.
    """
    options = step.options
    if not (needs := options.survey_needs()):
        return None
    layers = {n: m for n, m in linears(model).items() if n in names}
    windows = run.windows[:SURVEY_WINDOWS]
    calibration = calibrate(model, windows, needs, names, run.progress, run.device, run.dtype)
    tables = auto_tables(model, recipe) if shares_a_budget(step) else {}
    head, embedding = head_among(model, tables), embedding_name(model)
    fisher = None
    if options.sensitivity == "kl":
        asked = [*layers, *([head] if head else [])]
        fisher = _fisher(model, asked, recipe, run, embedding if embedding in tables else None)
    if not tables:
        return options.survey(layers, calibration, fisher)
    importance = head_importance(model, windows[:HEAD_WINDOWS]) if head else None
    return options.survey(layers, calibration, fisher, weighed(model, tables, windows, importance, fisher))


def _compress(
    model: nn.Module,
    step: Step,
    names: set[str],
    decisions: Any,
    details: dict[str, dict[str, Any]],
    run: Run,
) -> dict[str, Packed]:
    """One step on the linears of `names`, block by block as their statistics are complete; adds to `details`.

    A sequential step leaves its compressed modules in `model`, where the blocks behind them see what they compute.
    """
    options = step.options
    sequential = options.sequential and bool(options.needs())
    packed: dict[str, Packed] = {}
    unseen: list[str] = []

    def compress_block(part: Calibration) -> None:
        unseen.extend(part.unseen)
        hold_dense(model, False)
        layers = {n: m for n, m in linears(model).items() if n in names and n in part}
        for name, plan in options.plan(layers, part, decisions).items():
            made = options.apply(layers[name], plan)
            assert made.attributes.get("hadamard", 0) == hadamard_of(layers[name]), f"{step.method} lost a rotation"
            details[name] = _detail(layers[name], made, plan) | ({"unseen": True} if name in part.unseen else {})
            packed[name] = _on_cpu(made)
            if sequential:
                model.set_submodule(name, hold_dense(build(made)))

    # Without statistics one window still shows which linears share an input.
    needs = options.needs()
    seen = run.windows if needs else run.windows[:1]
    calibrate_blocks(model, seen, needs, compress_block, names, run.progress, run.device, run.dtype, sequential)
    if unseen:
        run.progress.note(
            f"{len(unseen)} layers saw no calibration token and use the statistics of their siblings: "
            f"{', '.join(unseen[:3])}"
        )
    return packed


def plan_of(model: nn.Module | str | Path | None, recipe: Recipe) -> Plan:
    """Every weight matrix, what happens to it and the bytes it will take. No calibration text is read."""
    loaded = _load(model, recipe, None)
    rows = []
    model = outlined(loaded.model, recipe)
    inside, tables = _place(loaded.model, recipe)
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
        step.options.outline(model, [n for n in linears(model) if _targeted(step, n)])
    return model


def _load(model: nn.Module | str | Path | None, recipe: Recipe, tokenizer: Any) -> Loaded:
    if isinstance(model, nn.Module):
        return as_loaded(model, tokenizer)
    return load_model(model if model is not None else recipe.model)


def _as_stored(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with the tables that will be stored: a step may untie them."""
    if is_tied(model) and any(getattr(step.options, "unties", False) for step in recipe.steps):
        untie(model := twin(model))
    return model


def _place(
    model: nn.Module, recipe: Recipe, done: int = 0
) -> tuple[dict[str, tuple[Step | None, Placement]], dict[str, tuple[tuple[int, int], Placement]]]:
    """The step that takes each linear, and what it will do; shape and placement of each table.

    model   what comes in, or the working model after the first `done` steps
    Raises RecipeError and ModelError for what nobody takes.
    """
    if any(isinstance(step.options, Structural) for step in recipe.steps[done:]):
        model = hollow(model)
    layers = linears(model)
    reshaped: dict[str, str] = {}
    placed: dict[str, tuple[Step | None, Placement]] = {}
    misfits: list[str] = []
    stored = _as_stored(model, recipe)
    tables, auto = place_tables(stored, recipe).placements, auto_tables(stored, recipe)
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
                step.options.outline(model, [n for n in layers if _targeted(step, n)])
                layers = linears(model)
            reshaped |= {n: f"{where}: bf16" for n in layers if _targeted(step, unit_of(model, n))}
        if amends(step.options):
            for name, (owner, place) in placed.items():
                if owner is not None and place.kept is None and _targeted(step, name):
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


def _windows(loaded: Loaded, content: str, count: int, length: int) -> Tensor:
    if loaded.tokenizer is None:
        raise DataError("calibration text needs the model's tokenizer; pass tokenizer=….")
    return text.windows(loaded.tokenizer, content, count, length)


def _quality_windows(
    loaded: Loaded, content: str | None, quality_text: str | Path | None, used: int, length: int
) -> Tensor | None:
    """Held-out windows: of the text that was asked for, else what calibration left of its own."""
    if quality_text is not None:
        return _windows(loaded, text.text_of(quality_text)[0], QUALITY_WINDOWS, length)
    if content is None:
        return None
    rest = _windows(loaded, content, used + QUALITY_WINDOWS, length)[used:]
    return rest if len(rest) else None


def _quality(loaded: Loaded, compressed: nn.Module, windows: Tensor, run: Run) -> dict[str, Any]:
    compare = evaluate.compare_encoders if loaded.kind == "encoder" else evaluate.compare
    with placed(loaded.model, run.device), placed(compressed, run.device):
        runners = [evaluate.torch_runner(model) for model in (compressed, loaded.model)]
        return compare(runners[0], windows, runners[1], progress=run.progress)


def _on_cpu(packed: Packed) -> Packed:
    return Packed(packed.kind, {name: t.cpu() for name, t in packed.tensors.items()}, packed.attributes)


def _detail(layer: nn.Linear, packed: Packed, plan: LayerPlan) -> dict[str, Any]:
    place = plan.placement
    module = build(packed)
    weight = layer.weight.detach().float()
    error = (module.dequantize()[:, : weight.shape[1]] - weight).norm() / weight.norm().clamp_min(1e-30)
    bits = 8 * sum(
        t.numel() * t.element_size() for n, t in packed.tensors.items() if n.startswith("weight_") or n == "weight"
    )
    return (
        {
            "format": place.format,
            "group_size": place.group_size,
            "padding": place.padding,
            "bits_per_weight": round(bits / weight.numel(), 4),
            "relative_error": round(error.item(), 6),
        }
        | ({"note": place.note} if place.note else {})
        | dict(getattr(plan, "detail", {}))
    )


def _kept(
    model: nn.Module, packed: dict[str, Packed], dtypes: dict[str, torch.dtype], tied: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor that is not packed, in the dtype it is stored in, and the aliases among all of them.

    Tensors without a chosen dtype are stored in bf16 where that loses nothing, else as they were loaded.
    """
    inside = tuple(f"{name}." for name in packed)
    kept: dict[str, Tensor] = {}
    aliases = dict(tied)
    owner: dict[int, str] = {}
    table_first = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: (item[0] not in dtypes, item[0]))
    for name, tensor in table_first:
        if name.startswith(inside):
            continue
        if id(tensor) in owner:
            aliases[name] = owner[id(tensor)]
            continue
        if name in aliases:
            continue
        owner[id(tensor)] = name
        value = tensor.detach()
        if name in dtypes:
            value = value.to(dtypes[name])
        elif value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
            value = value.bfloat16()
        kept[name] = value.cpu().contiguous()
    return kept, aliases
