"""The tables that are `auto`: what each way to store them takes and costs, for the budget of a mixed_bits step.

A table is one more group of allocation.py's integer program, with every format of tables.py that its rows fit. Its cost
is in the unit of the linears', from the same few windows (sensitivity.py). As a head it is a linear; as an embedding
it has the errors of the rows that are read, weighed with their gradient. A tied table is stored once and costs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compressor.allocation import Choice, Table
from compressor.layers import build
from compressor.model import embedding_name, head_name, is_tied
from compressor.recipe import Recipe
from compressor.sensitivity import Fisher, costs, row_costs
from compressor.tables import fitting, packed_table, table_choices


def auto_tables(model: nn.Module, recipe: Recipe) -> dict[str, Table]:
    """Module -> what each format takes, for each stored table that is `auto`; nothing is measured, costs are 0."""
    found = {}
    for name, _, choice in table_choices(model, recipe):
        if choice == "auto":
            rows, columns = model.get_parameter(f"{name}.weight").shape
            sizes = {fmt: place.size_bytes for fmt, place in fitting(rows, columns).items()}
            found[name] = Table((rows, columns), tuple(Choice(fmt, size, 0.0) for fmt, size in sizes.items()))
    return found


def head_among(model: nn.Module, tables: Mapping[str, Table]) -> str | None:
    """The module name of the output head where its weight is one of `tables`."""
    head = head_name(model)
    return head if head is not None and (embedding_name(model) if is_tied(model) else head) in tables else None


def weighed(
    model: Any,
    tables: Mapping[str, Table],
    windows: Tensor,
    importance: Tensor | None,
    fisher: Fisher | None,
) -> dict[str, Table]:
    """`tables` with the cost of each format.

    windows     [S, L] int64, whose tokens are the rows that count where there is no Fisher information
    importance  [K] mean square of what the head reads, where the head is among them
    fisher      of the head and the rows of the embedding; None: relative errors, as for linears
    """
    head, embedding = head_among(model, tables), embedding_name(model)
    found = {}
    for name, table in tables.items():
        module = model.get_submodule(name)
        weight = module.weight.detach()
        written = head if name == head or is_tied(model) else None
        options = []
        for choice in table.choices:
            stored = _decoded(module, choice.name, importance if written else None)
            cost = 0.0
            if written is not None:
                cost += costs(weight, {"": stored}, importance, fisher.weights[written] if fisher else None)[""]
            if name == embedding:
                cost += _when_read(weight, stored, windows, fisher)
            options.append(replace(choice, cost=cost))
        found[name] = replace(table, choices=tuple(options))
    return found


def _decoded(module: Any, choice: str, importance: Tensor | None) -> Tensor:
    """What a table holds once it is stored, [V, K]."""
    weight = module.weight.detach()
    if choice == "bf16":
        return weight.bfloat16()
    return build(packed_table(module, choice, fitting(*weight.shape)[choice], importance)).dequantize()


def _when_read(weight: Tensor, stored: Tensor, windows: Tensor, fisher: Fisher | None) -> float:
    """The cost of an embedding; without Fisher information the relative error of what the windows read."""
    if fisher is not None:
        assert fisher.rows is not None, "the Fisher information of this table's rows was not asked for"
        return row_costs(weight, stored, fisher.rows)
    ids = windows.flatten().to(weight.device)
    return costs(weight[ids], {"": stored[ids]}, None, None)[""]
