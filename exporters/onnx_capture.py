"""A transformers model as an ONNX graph: inputs and outputs as optimum and onnxruntime-genai name them.

    language model   input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value
    encoder          input_ids, attention_mask, token_type_ids -> last_hidden_state

Batch, sequence and past are dynamic, and the past may be empty. Whether a module is compressed is invisible here: it
calls a registered op, and `onnx_nodes` knows that op's node. What is left out: weights (onnx_weights.py).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.errors import OutputError
from compressor.exporters import onnx_attention, onnx_experts, onnx_nodes, onnx_tracing

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
SIZES = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}  # while tracing; all different, and none of 0 and 1
# The wrapped model below is one attribute deeper than it is in its own state_dict.
PREFIX = "model."


@dataclass(frozen=True)
class Signature:
    """A traceable module with example inputs; `shapes` names the dims of each graph input and output in order."""

    module: nn.Module
    inputs: tuple[Any, ...]
    shapes: dict[str, tuple[str | int, ...]]
    results: dict[str, tuple[str | int, ...]]


class LanguageModel(nn.Module):
    """(input_ids, attention_mask, position_ids or None, [(key, value), …]) -> (logits, [present key, value, …])."""

    def __init__(self, model: nn.Module, grouped: bool = False):
        super().__init__()
        self.model, self.grouped = model, grouped

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        seen = attention_mask.shape[1] - input_ids.shape[1] if self.grouped else None
        _same_sizes(input_ids, attention_mask, position_ids, past, seen)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        cache = filled_cache(past) if seen is None else onnx_attention.cache(past, seen)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        if self.grouped:
            onnx_attention.require_attended(cache)
        return output.logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class Encoder(nn.Module):
    """(input_ids, attention_mask, token_type_ids or None) -> last_hidden_state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        _same_sizes(input_ids, attention_mask, token_type_ids, [])
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state


def _same_sizes(
    ids: Tensor, mask: Tensor, others: Tensor | None, past: list[tuple[Tensor, Tensor]], seen: int | None = None
) -> None:
    """Tell the tracer which of the inputs' dynamic sizes are one, so that it computes each of them once.

    seen: how long the past is by the mask, where the tensors that hold it may be longer.
    """
    batch, sequence = ids.shape
    held = past[0][0].shape[2] if past else 0
    torch._check(mask.shape[0] == batch)
    if seen is None:
        torch._check(mask.shape[1] == held + sequence)
    else:
        torch._check(seen >= 0)
    if others is not None:
        torch._check(others.shape[0] == batch)
        torch._check(others.shape[1] == sequence)
    for tensor in (t for layer in past for t in layer):
        torch._check(tensor.shape[0] == batch)
        torch._check(tensor.shape[2] == held)


def filled_cache(past: list[tuple[Tensor, Tensor]]) -> Any:
    """A DynamicCache that holds `past`; its own constructor would concatenate each tensor with an empty one."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def cache_shapes(model: Any) -> list[list[tuple[int, int]]]:
    """Per layer [(heads, size) of keys, (heads, size) of values], asked of the model without computing anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # the others look at the mask's values
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long)
            cache = model(input_ids=ids, attention_mask=ids, use_cache=True).past_key_values
    finally:
        model.set_attn_implementation(attention)
    return [[(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)] for layer in cache.layers]


def signature(model: Any, kind: str, grouped: bool = False) -> Signature:
    """What the graph of this model takes and returns. grouped: attention and cache as one node."""
    accepted = inspect.signature(model.forward).parameters
    ids = torch.ones(SIZES[BATCH], SIZES[SEQUENCE], dtype=torch.long)
    tokens = (BATCH, SEQUENCE)
    if kind == "encoder":
        shapes: dict[str, tuple[str | int, ...]] = {"input_ids": tokens, "attention_mask": tokens}
        types = None
        if "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1:
            shapes["token_type_ids"], types = tokens, torch.zeros_like(ids)
        inputs = (ids, torch.ones_like(ids), types)
        return Signature(Encoder(model), inputs, shapes, {"last_hidden_state": (*tokens, -1)})
    shapes = {"input_ids": tokens, "attention_mask": (BATCH, TOTAL)}
    positions = None
    if "position_ids" in accepted:
        shapes["position_ids"] = tokens
        positions = torch.arange(SIZES[PAST], SIZES[TOTAL]).repeat(SIZES[BATCH], 1)
    results: dict[str, tuple[str | int, ...]] = {"logits": (*tokens, -1)}
    past = []
    for i, layer in enumerate(cache_shapes(model)):
        for part, (heads, size) in zip(("key", "value"), layer, strict=True):
            shapes[f"past_key_values.{i}.{part}"] = (BATCH, heads, PAST, size)
            results[f"present.{i}.{part}"] = (BATCH, heads, TOTAL, size)
        past.append(tuple(torch.zeros(SIZES[BATCH], heads, SIZES[PAST], size) for heads, size in layer))
    mask = torch.ones(SIZES[BATCH], SIZES[TOTAL], dtype=torch.long)
    return Signature(LanguageModel(model, grouped), (ids, mask, positions, past), shapes, results)


def capture(
    model: nn.Module, kind: str, *, grouped: bool = False, change: Callable[[ir.Model], None] | None = None
) -> ir.Model:
    """The graph of a float32 model, every weight an initializer named as in its state_dict.

    Compressed modules are single nodes named like the module. Nothing else keeps a name or metadata: the exporter's
    contain paths and stack traces. grouped: attention is one node, for a model inside `onnx_attention.grouped`.
    change: called with the graph while its values still have shapes. Raises OutputError for a model that cannot be
    traced, NotGroupedError for one that cannot be traced so.
    """
    try:
        return _capture(model, kind, grouped, change)
    except Exception as error:  # the tracer and the exporter raise dozens of classes
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, onnx_attention.NotGroupedError):
            raise cause from None
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise OutputError(
            f"{type(model).__name__} cannot be written as an ONNX graph ({lines[0][:300]}); "
            f"leave onnx out of the recipe's exports."
        ) from error


def _capture(model: nn.Module, kind: str, grouped: bool, change: Callable[[ir.Model], None] | None) -> ir.Model:
    with onnx_experts.dense(model):
        return _captured(model, kind, grouped, change)


def _captured(model: nn.Module, kind: str, grouped: bool, change: Callable[[ir.Model], None] | None) -> ir.Model:
    what = signature(model, kind, grouped)
    free = torch.export.Dim.DYNAMIC
    dims = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: {0: free, 1: free} if t.dim() == 2 else {0: free, 2: free}, what.inputs
    )
    with _quiet():
        graph = onnx_tracing.to_onnx(
            onnx_tracing.trace(what.module, what.inputs, dims),
            onnx_nodes.translation_table(),
            opset_version=onnx_nodes.OPSET,
            input_names=list(what.shapes),
            output_names=list(what.results),
        )
    if change is not None:
        change(graph)
    _tidy(graph, what)
    return graph


def _tidy(model: ir.Model, what: Signature) -> None:
    """Names and shapes of ours instead of the exporter's, in place."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    graph = model.graph
    for node in graph:
        compressed = node.domain == onnx_nodes.DOMAIN or node.op_type == "MatMulNBits"
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.name = _module_of(node, scopes) if compressed else None
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    for name in list(graph.initializers):
        value = graph.initializers.pop(name)
        value.name = name.removeprefix(PREFIX)
        value.metadata_props.clear()
        if value.uses():
            graph.register_initializer(value)
    named = what.shapes | what.results
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
        assert value.shape is not None and value.name is not None
        dims = zip(value.shape, named[value.name], strict=True)
        value.shape = ir.Shape([found if name == -1 else name for found, name in dims])
    graph.metadata_props.clear()
    model.producer_name, model.producer_version = "compressor", None
    common.ClearMetadataAndDocStringPass()(model)


def _module_of(node: ir.Node, scopes: list[str]) -> str:
    """Whose weights a linear or a table is, which another module may compute (lean.py); else where it was traced."""
    weight = node.inputs[1] if node.op_type.endswith(("Linear", "Embedding", "NBits")) else None
    if weight is None or not weight.is_initializer() or weight.name is None:
        return scopes[-2].removeprefix(PREFIX)
    owner = weight.name.removeprefix(PREFIX).rpartition(".")[0]
    return owner.removesuffix(".down") if node.op_type == "LowRankLinear" else owner


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's remarks about operators and packages that are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
