"""The straight line: recipe -> model -> [calibrate -> reshape | plan -> apply] per step and block -> Artifact.

The model that comes in is read and never changed: methods are pure and what they return lives in the Artifact,
so the original is still there to measure against. Steps work on a twin that shares its tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import data as text
from compressor import evaluate
from compressor.artifact import Artifact
from compressor.blockwise import device_of, placed
from compressor.calibrate import fast_dtype
from compressor.errors import DataError
from compressor.expert_plan import check_mixture, expert_plan
from compressor.layers import Packed, build, hold_dense
from compressor.methods.structural import Structural
from compressor.methods.transform import Transform, amends, stores
from compressor.model import Loaded, skeleton, twin
from compressor.plan import loaded_for, outlined, placements_of, stored_by
from compressor.progress import Progress, Silent
from compressor.recipe import Recipe
from compressor.run import Run
from compressor.steps import amend, fold, on_cpu, reshape, store, survey
from compressor.structure import Structure, as_json, between
from compressor.tables import pack_tables

QUALITY_WINDOWS = 16


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
    loaded = loaded_for(recipe, model, tokenizer)
    where = torch.device(device) if device else device_of(loaded.model)
    placements, _ = placements_of(loaded.model, recipe)
    if recipe.expert_plan is not None:
        check_mixture(outlined(loaded.model, recipe))
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
        trained_on = [getattr(step.options, "windows", 0) for step in recipe.steps]
        held_out = _quality_windows(loaded, given, quality_text, max(len(windows), *trained_on), length)
        if held_out is None and given is not None:
            progress.note("calibration uses the whole text, and no other was given to measure on: quality is not known")
    working = twin(loaded.model)
    packed: dict[str, Packed] = {}
    details: dict[str, dict[str, Any]] = {}
    stored = stored_by(placements, outlined(loaded.model, recipe))
    structure: Structure = {}
    reports: dict[str, Any] = {}
    ledger: list[dict[str, Any]] = []  # the model after each step that changed its shapes or that a later one amends
    decided: dict[str, str] = {}  # the formats of tables that are auto
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step.options, Structural):
            reports[f"{number} {step.method}"] = reshape(working, step, recipe, run)
            structure = between(skeleton(working.config, loaded.kind), working)
            placements, _ = placements_of(working, recipe, number)
            stored = stored_by(placements, outlined(working, recipe, number))
            ledger.append({"after": f"{number} {step.method}", "parameters": _count(working)})
            if held_out is not None:
                ledger[-1] |= _quality(loaded, working, held_out, run)
            continue
        if amends(step.options):
            if held_out is not None:
                stage = {"after": f"{number - 1} {recipe.steps[number - 2].method}"}
                ledger.append(stage | _quality(loaded, _stored_in(working, packed), held_out, run))
            changed, reports[f"{number} {step.method}"] = amend(working, step, packed, recipe, run)
            packed |= changed
            continue
        names = {n for n, (owner, place) in placements.items() if owner is step and place.kept is None}
        if isinstance(step.options, Transform):
            decisions = fold(working, step, stored, run)
        else:
            decisions = survey(working, step, names, recipe, run)
            decided |= getattr(decisions, "table_formats", {})
        if decisions is not None:
            reports[f"{number} {step.method}"] = decisions if isinstance(decisions, dict) else decisions.report()
        if stores(step.options):
            packed |= store(working, step, names, decisions, details, run)

    progress.stage("tables")
    tables = pack_tables(working, recipe, windows=windows, decided=decided)
    packed |= {name: on_cpu(table) for name, table in tables.packed.items()}
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
    if any(isinstance(step.options, Structural) for step in recipe.steps):
        artifact.record |= {"parameters": _count(loaded.model), "structure": as_json(structure)}
    if ledger:
        artifact.record["ledger"] = ledger
    if held_out is not None or recipe.expert_plan is not None:
        compressed = artifact.model(dense=True, device=run.device)
        if held_out is not None:
            artifact.record["quality"] = _quality(loaded, compressed, held_out, run)
        if recipe.expert_plan is not None:
            seen = run.text(recipe.expert_plan.windows)
            artifact.record["expert_plan"] = expert_plan(compressed, artifact, seen, recipe.expert_plan, progress)
    return artifact


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _stored_in(model: nn.Module, packed: dict[str, Packed]) -> nn.Module:
    """A twin of the working model with what is stored so far."""
    made = twin(model)
    for name, one in packed.items():
        made.set_submodule(name, hold_dense(build(one)))
    return made


def _windows(loaded: Loaded, content: str, count: int, length: int) -> Tensor:
    if loaded.tokenizer is None:
        raise DataError("calibration text needs the model's tokenizer; pass tokenizer=….")
    return text.windows(loaded.tokenizer, content, count, length)


def _quality_windows(
    loaded: Loaded, content: str | None, quality_text: str | Path | None, used: int, length: int
) -> Tensor | None:
    """Held-out windows: of the text that was asked for, else what calibration and training left of their own."""
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
