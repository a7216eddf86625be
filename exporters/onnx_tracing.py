"""Tracing a transformers model once instead of three times.

The ONNX exporter retraces a program twice to decompose it, which for a language model is more than half of all the
time and finds nothing to do: nearly every operator that the trace holds has a translation. Here the trace is kept
free of what needs decomposing (transformers 4 builds masks under vmap, rotary embeddings run under autocast), the
few operators left get translations, and only a program that holds more is decomposed after all.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def trace(module: nn.Module, inputs: tuple[Any, ...], dims: Any) -> torch.export.ExportedProgram:
    """The program of `module` on inputs with these dynamic dims."""
    with torch.no_grad(), _plain_masks(), mock.patch.object(torch, "autocast", _no_autocast):
        return torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)


def to_onnx(program: torch.export.ExportedProgram, table: Mapping[Any, Callable[..., Any]], **options: Any) -> Any:
    """The onnx_ir model of a program; `table` translates operators that the exporter does not know."""

    def export(table: dict[Any, Callable[..., Any]]) -> Any:
        result = torch.onnx.export(
            program, dynamo=True, optimize=False, verbose=False, custom_translation_table=table, **options
        )
        assert result is not None
        return result.model

    if _is_plain(program.graph):
        # Tell the exporter that decomposing gives the same program; should an operator have no translation of its own,
        # its parts may.
        with (
            contextlib.suppress(torch.onnx.errors.OnnxExporterError),
            mock.patch.object(program, "run_decompositions", lambda *_: program),
        ):
            return export({**table, **_left_over()})
    return export(dict(table))


def _is_plain(graph: torch.fx.Graph) -> bool:
    """Whether the graph changes no tensor in place and holds no control flow."""
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(node.meta.get("val"), Tensor):
            return False
        if node.op != "call_function" or node.target in (operator.getitem, torch.ops.aten.detach_.default):
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return False
    return True


def _left_over() -> dict[Any, Callable[..., Any]]:
    """Translations of the operators that the exporter expects to be decomposed."""
    from onnxscript import opset21 as op

    def to_dtype(x: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return op.Identity(x) if x.dtype is not None and x.dtype.value == dtype else op.Cast(x, to=dtype)

    def to_device(x: Any, device: str, dtype: int, *_: Any, **__: Any) -> Any:
        return to_dtype(x, dtype)

    def to_layout(x: Any, dtype: int | None = None, **_: Any) -> Any:
        return op.Identity(x) if dtype in (None, -1) else to_dtype(x, dtype)

    def both(a: Any, b: Any) -> Any:
        boolean = a.dtype is not None and a.dtype.name == "BOOL"
        return op.And(a, b) if boolean else op.BitwiseAnd(a, b)

    aten = torch.ops.aten
    return {
        aten.to.dtype: to_dtype,
        aten.to.device: to_device,
        aten.to.dtype_layout: to_layout,
        aten.__and__.Tensor: both,
        aten.detach_.default: op.Identity,
    }


@contextlib.contextmanager
def _plain_masks() -> Iterator[None]:
    """Let transformers 4 build attention masks as 5 does: by broadcasting the indices instead of under vmap."""
    from transformers import __version__, masking_utils

    if int(__version__.partition(".")[0]) >= 5:
        yield
        return
    functions = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    functions["sdpa"] = _broadcast_mask
    try:
        yield
    finally:
        del functions["sdpa"]  # what is left is the library's own


def _broadcast_mask(
    batch_size: int,
    cache_position: Tensor,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """bool [batch, 1, queries, keys], True where attended. The padding mask, if any, covers all keys."""
    from transformers.masking_utils import and_masks, padding_mask_function

    if attention_mask is not None:
        mask_function = and_masks(mask_function, padding_mask_function(attention_mask))
    rows = torch.arange(batch_size)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    keys = torch.arange(kv_length)[None, None, None, :]
    return mask_function(rows, head, cache_position[None, None, :, None], keys).expand(batch_size, 1, -1, -1)


def _no_autocast(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    """The model is float32 throughout, so autocast, which is off anyway, has nothing to say."""
    return contextlib.nullcontext()
