"""The token embedding and the output head: the tables that a 4-bit file of a small model mostly consists of.

The recipe chooses for each; a tied pair is one table and takes one choice. `FORMAT` alone is the usual block of that
format, a suffix is another one:

    keep                        as loaded
    bf16
    int8-row                    one bf16 scale a row
    int8, int4                  a bf16 scale per group of 32 along the hidden size
    int4-g64, int4-g128         a bf16 scale per group of 64 or 128
    nvfp4, mxfp4                FP4 blocks of 16 or 32, as the linears store them
    auto                        one of these but keep, which the budget of the mixed_bits step pays (table_budget.py)

Round to nearest with the scale search of methods/quantize.py. As an output matrix, a table is judged by the error of
the logits, so its search can be weighted with what the head reads (`head_importance`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError, ModelError, NumericsError, RecipeError
from compressor.layers import Packed
from compressor.methods.quantize import LayerPlan, Placement, Quantize
from compressor.model import embedding_name, head_name, is_tied
from compressor.recipe import Recipe
from compressor.statistics import ChannelSquare

TABLE_GROUP = 32  # what onnxruntime's own builder uses, so figures compare
TABLE_METHODS: Mapping[str, Quantize] = {
    "int8-row": Quantize("int8"),
    "int8": Quantize("int8", group_size=TABLE_GROUP),
    "int4": Quantize("int4", group_size=TABLE_GROUP),
    "int4-g64": Quantize("int4", group_size=64),
    "int4-g128": Quantize("int4", group_size=128),
    "nvfp4": Quantize("nvfp4"),
    "mxfp4": Quantize("mxfp4"),
}
HEAD_WINDOWS = 4  # 2048 tokens settle K means of squares
# Stored beside the rows and their scales, in bytes: the global scale [1] float32, the shape [2] int64.
EXTRA_BYTES = {"nvfp4": 4, "mxfp4": 0, "int4": 16, "int8": 16}
EMBEDDING_KINDS = {"fp4_linear": "fp4_embedding", "int_linear": "int_embedding"}


@dataclass
class Tables:
    """What to store for the tables: packed modules, tensors to keep in a given dtype, and aliases."""

    packed: dict[str, Packed] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # tensor name -> dtype it is kept in
    tied: dict[str, str] = field(default_factory=dict)
    placements: dict[str, tuple[tuple[int, int], Placement]] = field(default_factory=dict)  # module -> shape, placement


def place_tables(model: nn.Module, recipe: Recipe, decided: Mapping[str, str] = MappingProxyType({})) -> Tables:
    """What will be stored, and its exact bytes.

    decided      module -> format, for tables that are `auto`; one that is not in it is left out
    Raises RecipeError when a tied pair is given two formats, or a table's hidden size does not fit its format.
    """
    tables = Tables()
    embedding, head = embedding_name(model), head_name(model)
    tied = head is not None and is_tied(model)
    if tied and recipe.lm_head != recipe.embedding:
        raise RecipeError(
            f"lm_head: {recipe.lm_head} differs from embedding: {recipe.embedding}, but {head} and {embedding} of this "
            f"model are one tied table; give both the same value."
        )
    for name, option, choice in table_choices(model, recipe, decided):
        if choice == "auto":
            continue
        weight = model.get_parameter(f"{name}.weight")
        rows, columns = weight.shape
        tables.placements[name] = ((rows, columns), _place(weight, name, option, choice, name in decided))
        if choice == "bf16":
            tables.dtypes[f"{name}.weight"] = torch.bfloat16
    if tied:
        tables.tied[f"{head}.weight"] = f"{embedding}.weight"
    return tables


def table_choices(
    model: nn.Module, recipe: Recipe, decided: Mapping[str, str] = MappingProxyType({})
) -> list[tuple[str, str, str]]:
    """(module, the recipe's key, what to store it as) of each table that is stored; `auto` where it is undecided."""
    found: list[tuple[str, str, str]] = [(embedding_name(model), "embedding", recipe.embedding)]
    head = head_name(model)
    if head is not None and not is_tied(model):
        found.append((head, "lm_head", recipe.lm_head))
    return [(name, option, decided.get(name, choice)) for name, option, choice in found]


def fitting(rows: int, columns: int) -> dict[str, Placement]:
    """Every format that a [rows, columns] table fits, bf16 too. Tables are never padded."""
    placed = {choice: method.place(rows, columns) for choice, method in TABLE_METHODS.items()}
    found = {
        choice: replace(place, size_bytes=place.size_bytes + EXTRA_BYTES[place.format])
        for choice, place in placed.items()
        if place.format is not None
    }
    return found | {"bf16": Placement(kept="recipe: bf16", size_bytes=rows * columns * 2)}


def _place(weight: Tensor, name: str, option: str, choice: str, decided: bool) -> Placement:
    rows, columns = weight.shape
    if choice == "keep":  # which is stored in bf16 where that loses nothing
        value = weight.detach()
        size = 2 if torch.equal(value.bfloat16().to(value.dtype), value) else value.element_size()
        return Placement(kept="recipe: keep", size_bytes=rows * columns * size)
    fit = fitting(rows, columns)
    if choice not in fit:
        raise RecipeError(
            f"{option}: {choice} does not fit {name}, whose rows of {columns} are not whole blocks of that format; "
            f"use {', '.join(fit)} or keep."
        )
    place = fit[choice]
    return replace(place, kept="budget: bf16") if decided and place.kept else place


def pack_tables(
    model: nn.Module,
    recipe: Recipe,
    importance: Tensor | None = None,
    *,
    windows: Tensor | None = None,
    decided: Mapping[str, str] = MappingProxyType({}),
) -> Tables:
    """The tables of `place_tables`, packed.

    importance   [K] float32, the mean square of each channel that the head reads; weights the scale search of the head,
                 or of the table it is tied to. An untied embedding has no use for it: its rows are read one by one
    windows      [S, L] int64 to measure the importance on, where it is not given and some table has a use for it
    decided      as for `place_tables`; here every table must have a format
    """
    tables = place_tables(model, recipe, decided)
    head = head_name(model)
    tied = f"{head}.weight" in tables.tied
    read = next(iter(tables.placements)) if tied else head
    if importance is None and windows is not None and read is not None and tables.placements[read][1].format:
        importance = head_importance(model, windows[:HEAD_WINDOWS])
    for name, option, choice in table_choices(model, recipe, decided):
        placement = tables.placements[name][1]
        if placement.format is None:
            continue
        module = model.get_submodule(name)
        stored = packed_table(module, choice, placement, importance if tied or option == "lm_head" else None)
        if option == "lm_head":
            tables.packed[name] = _as_head(stored, recipe)
            continue
        tables.packed[name] = _as_embedding(module, stored)
        if tied:
            assert head is not None
            bias = getattr(model.get_submodule(head), "bias", None)
            own = {} if bias is None else {"bias": bias.detach().clone()}
            tables.packed[head] = _as_head(Packed(stored.kind, stored.tensors | own, stored.attributes), recipe)
            tables.tied = {f"{head}.{t}": f"{name}.{t}" for t in stored.tensors}
    return tables


def packed_table(module: Any, choice: str, placement: Placement, importance: Tensor | None) -> Packed:
    """A table in one of TABLE_METHODS, seen as a linear [V, K]. importance as for `pack_tables`."""
    return TABLE_METHODS[choice].apply(_as_linear(module), LayerPlan(placement, importance=importance))


def _as_linear(module: Any) -> nn.Linear:
    """A linear on the same weight, for a method to read: the head itself, or a table seen as one."""
    if isinstance(module, nn.Linear):
        return module
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = module.weight.shape
    linear.weight = module.weight
    return linear


def _as_embedding(module: Any, stored: Packed) -> Packed:
    names = ("format", "bits", "group_size", "in_features", "out_features")
    attributes = {name: stored.attributes[name] for name in names if name in stored.attributes}
    attributes["multiplier"] = float(getattr(module, "embed_scale", 1.0))
    return Packed(EMBEDDING_KINDS[stored.kind], dict(stored.tensors), attributes)


def _as_head(stored: Packed, recipe: Recipe) -> Packed:
    return replace(stored, attributes=stored.attributes | {"activations": recipe.head_activations})


class _Read(Exception):
    """The head's input is there: the logits need not be computed."""


def head_importance(model: Any, windows: Tensor) -> Tensor:
    """Mean square of each channel that the head reads (what the final norm gives) over windows [S, L]: [K] float32.

    The head's weight error dW costs E|dW x|² on the logits, whose diagonal part weights column k with E x_k².
    Raises DataError for no tokens, ModelError for a model without a head, NumericsError for NaN or Inf before it.
    """
    if windows.dim() != 2 or not windows.numel():
        raise DataError(f"windows for the head's importance must be [S, L] with S, L >= 1, got {list(windows.shape)}.")
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head, so there is nothing to measure before it.")
    seen = ChannelSquare.start(head.weight.shape[1])

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add(args[0].reshape(-1, args[0].shape[-1]))
        raise _Read

    handle = head.register_forward_pre_hook(see)
    try:
        with torch.inference_mode():
            for window in windows:
                try:
                    model(input_ids=window.unsqueeze(0).to(head.weight.device), use_cache=False)
                except _Read:
                    pass
    finally:
        handle.remove()
    if not seen.total.isfinite().all():
        raise NumericsError("NaN or Inf in the input of the output head; check the weights before it.")
    return seen.value()
