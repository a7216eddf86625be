"""How each kind of step runs on the working model: which statistics it is given, of which linears, in which order.

fold      a transform rewrites parameters, the model computes the same
reshape   a structural step puts modules of other shapes in place of linears
survey    decisions over the whole model, before a block is touched
store     linears are packed, block by block as their statistics are complete
amend     something is added to what earlier steps stored
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import nn

from compressor.calibrate import Calibration, calibrate, calibrate_blocks
from compressor.layers import Packed, build, hadamard_of, hold_dense
from compressor.methods.quantize import LayerPlan
from compressor.methods.structural import Rewriting, Searching, Settling
from compressor.methods.transform import stores
from compressor.model import embedding_name, linears, twin
from compressor.paired import calibrate_pairs
from compressor.plan import targeted
from compressor.recipe import Recipe, Step, shares_a_budget
from compressor.run import Run
from compressor.sensitivity import Fisher, output_fisher
from compressor.table_budget import auto_tables, head_among, weighed
from compressor.tables import HEAD_WINDOWS, head_importance

SURVEY_WINDOWS, FISHER_WINDOWS = 8, 4  # decisions over the whole model need means, not matrices: few tokens do


def fold(model: nn.Module, step: Step, stored: set[str], run: Run) -> Any:
    """One transform on the targeted linears that some step stores; `model` computes the same afterwards.

    What no step stores gains nothing, and could not be kept with a rotated input: only our ops rotate. Means settle
    with few windows. A method that stores layers may fix ranges here, and sees every token.
    """
    options = step.options
    names = [n for n in linears(model) if n in stored and targeted(step, n)]
    needs = options.fold_needs()
    seen = run.windows[: (len(run.windows) if stores(options) else SURVEY_WINDOWS) if needs else 1]
    if options.whole:
        return options.fold(model, calibrate(model, seen, needs, names, run.progress, run.device, run.dtype))
    parts: list[Any] = []

    def fold_block(part: Calibration) -> None:
        parts.append(options.fold(model, part))

    calibrate_blocks(model, seen, needs, fold_block, names, run.progress, run.device, run.dtype)
    return reduce(or_, parts) if parts else None


def reshape(model: nn.Module, step: Step, recipe: Recipe, run: Run) -> dict[str, Any]:
    """One structural step on the targeted linears: `model` has modules of other shapes afterwards."""
    options = step.options
    names = {n for n in linears(model) if targeted(step, n)}
    if isinstance(options, Rewriting):
        return options.rewrite(model, names, run)
    decisions = _decide(model, step, names, recipe, run)
    if isinstance(options, Searching):
        generator = torch.Generator().manual_seed(recipe.seed)
        decisions = options.search(model, names, decisions, run, generator)
    report: dict[str, Any] = {}

    def reshape_part(part: Calibration) -> None:
        report.update(options.reshape(model, part, decisions))

    if options.sequential:
        calibrate_pairs(model, twin(model), run.windows, reshape_part, names, run.progress, run.device, run.dtype)
        return report
    needs = options.needs()
    seen = run.windows if needs else run.windows[:1]
    calibrate_blocks(model, seen, needs, reshape_part, names, run.progress, run.device, run.dtype)
    if isinstance(options, Settling):
        options.settle(model, names, decisions, run)
    return report


def survey(model: nn.Module, step: Step, names: set[str], recipe: Recipe, run: Run) -> Any:
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


def _decide(
    model: nn.Module, step: Step, names: set[str], recipe: Recipe, run: Run, packed: Mapping[str, Packed] | None = None
) -> Any:
    """What the step's method decides about all its linears from a survey of one block at a time.

    packed: what earlier steps stored, for a step that amends.
    """
    options = step.options
    layers = {n: m for n, m in linears(model).items() if n in names}
    fisher = None
    if options.sensitivity != "error":
        fisher = _fisher(model, list(layers), recipe, run, pairs=options.sensitivity == "kfac")
    looked: dict[str, Any] = {}
    if needs := options.survey_needs():

        def look(part: Calibration) -> None:
            inside = {n: m for n, m in layers.items() if n in part}
            looked.update(options.survey(inside, part, fisher, *([] if packed is None else [packed])))

        windows = run.windows[:SURVEY_WINDOWS]
        calibrate_blocks(model, windows, needs, look, names, run.progress, run.device, run.dtype)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    return options.decide(looked, shapes, fisher)


def _fisher(
    model: nn.Module, names: list[str], recipe: Recipe, run: Run, table: str | None = None, pairs: bool = False
) -> Fisher:
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = run.windows[:FISHER_WINDOWS]
    return output_fisher(model, windows, names, generator, run.progress, run.device, table, pairs)


def store(
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
            packed[name] = on_cpu(made)
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


def amend(
    model: nn.Module, step: Step, packed: Mapping[str, Packed], recipe: Recipe, run: Run
) -> tuple[dict[str, Packed], dict[str, Any]]:
    """What one step adds to the targeted linears among `packed`, block by block, and its report."""
    options = step.options
    layers = {n: m for n, m in linears(model).items() if n in packed and targeted(step, n)}
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


def on_cpu(packed: Packed) -> Packed:
    return Packed(packed.kind, {name: t.cpu() for name, t in packed.tensors.items()}, packed.attributes)
