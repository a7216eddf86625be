"""The token embedding and the output head: the tables that a 4-bit file of a small model mostly consists of.

The recipe chooses `keep` (as loaded), `bf16`, `int8` or `int4` (symmetric groups along the hidden size, bf16
scales) for each; a tied pair is one table and takes one choice. Round to nearest with the scale search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.layers import Packed
from compressor.methods.quantize import Placement, Quantize, pack_int_weight
from compressor.model import embedding_name, head_name, is_tied
from compressor.recipe import Recipe

TABLE_GROUP = 32  # what onnxruntime's own builder uses, so figures compare


@dataclass
class Tables:
    """What to store for the tables: packed modules, tensors to keep in a given dtype, and aliases."""

    packed: dict[str, Packed] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # tensor name -> dtype it is kept in
    tied: dict[str, str] = field(default_factory=dict)
    placements: dict[str, tuple[tuple[int, int], Placement]] = field(default_factory=dict)  # module -> shape, placement


def place_tables(model: nn.Module, recipe: Recipe) -> Tables:
    """What will be stored, from shapes alone. Raises RecipeError when a tied pair is given two formats."""
    tables = Tables()
    embedding, head = embedding_name(model), head_name(model)
    tied = head is not None and is_tied(model)
    if tied and recipe.lm_head != recipe.embedding:
        raise RecipeError(
            f"lm_head: {recipe.lm_head} differs from embedding: {recipe.embedding}, but {head} and {embedding} of this "
            f"model are one tied table; give both the same value."
        )
    choices = {embedding: recipe.embedding} | ({head: recipe.lm_head} if head and not tied else {})
    for name, choice in choices.items():
        rows, columns = model.get_parameter(f"{name}.weight").shape
        shape = (rows, columns)
        tables.placements[name] = (shape, _place(shape, choice))
        if choice == "bf16":
            tables.dtypes[f"{name}.weight"] = torch.bfloat16
    if tied:
        tables.tied[f"{head}.weight"] = f"{embedding}.weight"
    return tables


def _place(shape: tuple[int, int], choice: str) -> Placement:
    rows, columns = shape
    if choice in ("keep", "bf16"):
        size = rows * columns * (2 if choice == "bf16" else 4)
        return Placement(kept=f"recipe: {choice}", size_bytes=size)
    return Quantize(weights=choice, group_size=TABLE_GROUP, on_misfit="smaller").place(rows, columns)  # type: ignore[arg-type]


def pack_tables(model: nn.Module, recipe: Recipe) -> Tables:
    """The tables of `place_tables`, packed."""
    tables = place_tables(model, recipe)
    head = head_name(model)
    for name, (_, placement) in tables.placements.items():
        if placement.format is None:
            continue
        module = model.get_submodule(name)
        bits = int(placement.format.removeprefix("int"))
        stored = pack_int_weight(
            model.get_parameter(f"{name}.weight").detach().float(), bits, placement.group_size, None, True, words=True
        )
        if name != head:
            tables.packed[name] = _embedding(module, stored, bits, placement.group_size)
        if name == head or f"{head}.weight" in tables.tied:
            assert head is not None
            tables.packed[head] = _head(model.get_submodule(head), stored, bits, placement.group_size)
        if f"{head}.weight" in tables.tied:
            tables.tied = {f"{head}.{t}": f"{name}.{t}" for t in stored}
    return tables


def _embedding(module: Any, stored: dict[str, Tensor], bits: int, group: int | None) -> Packed:
    rows, columns = module.weight.shape
    attributes = {
        "bits": bits,
        "group_size": group,
        "in_features": columns,
        "out_features": rows,
        "multiplier": float(getattr(module, "embed_scale", 1.0)),
    }
    return Packed("int_embedding", dict(stored), attributes)


def _head(module: Any, stored: dict[str, Tensor], bits: int, group: int | None) -> Packed:
    rows, columns = module.weight.shape
    bias = {"bias": module.bias.detach().clone()} if getattr(module, "bias", None) is not None else {}
    attributes = {
        "bits": bits,
        "group_size": group,
        "activations": "none",
        "in_features": columns,
        "out_features": rows,
        "padding": 0,
    }
    return Packed("int_linear", {**stored, **bias}, attributes)
