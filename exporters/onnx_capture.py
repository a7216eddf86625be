"""A transformers model as an ONNX graph: inputs and outputs as optimum and onnxruntime-genai name them.

    language model   input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value
    encoder          input_ids, attention_mask, token_type_ids -> last_hidden_state

Batch, sequence and past are dynamic, and the past may be empty. Whether a module is compressed is invisible here: it
calls a registered op and `onnx_functions` knows that op's node. What is left out: weights (onnx_weights.py).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.exporters import onnx_functions

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class LanguageModel(nn.Module):
    """(input_ids, attention_mask, position_ids or None, ((key, value), …)) -> (logits, present keys and values)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        cache = filled_cache(past)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        return output.logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class Encoder(nn.Module):
    """(input_ids, attention_mask, token_type_ids or None) -> last_hidden_state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state


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


def cache_shapes(model: nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Per layer ((heads, size) of keys, (heads, size) of values), asked of the model without computing anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        cache = model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True).past_key_values
    return [tuple((t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)) for layer in cache.layers]


def capture(model: nn.Module, kind: str) -> ir.Model:
    """The graph of a float32 model with every weight as an initializer named as in its state_dict.

    Compressed modules are single nodes named like the module; nothing else keeps a name or metadata, because the
    exporter's contain paths and traces.
    """
    dim = torch.export.Dim
    # Two and more while tracing, so that no size is taken for a broadcast; the graph itself runs with one or none.
    batch, sequence, past = (dim(name, min=2) for name in (BATCH, SEQUENCE, PAST))
    accepted = inspect.signature(model.forward).parameters
    ids = torch.ones(2, 3, dtype=torch.long)
    if kind == "encoder":
        has_types = "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * has_types
        wrapper: nn.Module = Encoder(model)
        inputs: tuple[Any, ...] = (ids, ids, torch.zeros_like(ids) if has_types else None)
        dims: tuple[Any, ...] = ({0: batch, 1: sequence},) * 2 + ({0: batch, 1: sequence} if has_types else None,)
        results = ["last_hidden_state"]
    else:
        seen = 5
        shapes = cache_shapes(model)
        has_positions = "position_ids" in accepted
        cached = [f"{i}.{part}" for i in range(len(shapes)) for part in ("key", "value")]
        names = ["input_ids", "attention_mask"] + ["position_ids"] * has_positions
        names += [f"past_key_values.{name}" for name in cached]
        results = ["logits"] + [f"present.{name}" for name in cached]
        wrapper = LanguageModel(model)
        mask = torch.ones(2, seen + 3, dtype=torch.long)
        positions = torch.arange(seen, seen + 3).repeat(2, 1) if has_positions else None
        empty = [tuple(torch.zeros(2, heads, seen, size) for heads, size in layer) for layer in shapes]
        inputs = (ids, mask, positions, empty)
        dims = (
            {0: batch, 1: sequence},
            {0: batch, 1: dim.DYNAMIC},
            {0: batch, 1: sequence} if has_positions else None,
            [({0: batch, 2: past},) * 2 for _ in shapes],
        )
    with torch.no_grad(), _quiet():
        program = torch.export.export(wrapper, inputs, dynamic_shapes=dims, strict=False)
        graph = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=onnx_functions.OPSET,
            input_names=names,
            output_names=results,
            custom_translation_table=onnx_functions.translation_table(),
        ).model
    return _tidy(graph)


def _tidy(model: ir.Model) -> ir.Model:
    import onnx_ir as ir
    from onnx_ir.passes import common

    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        compressed = node.domain in (onnx_functions.DOMAIN, onnx_functions.STOCK_DOMAIN)
        node.name = scopes[-2].removeprefix("model.") if compressed else None
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
                value.type = None
    for name in list(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix("model.")
        if value.uses():
            model.graph.register_initializer(value)
    for value in model.graph.inputs:
        if value.name == "attention_mask" and value.shape[1] != model.graph.inputs[0].shape[1]:
            value.shape = ir.Shape([value.shape[0], TOTAL])
    for value in model.graph.outputs:
        if value.name.startswith("present."):
            value.shape = ir.Shape([value.shape[0], value.shape[1], TOTAL, value.shape[3]])
    model.producer_name, model.producer_version = "compressor", None
    model.graph.metadata_props.clear()
    common.ClearMetadataAndDocStringPass()(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's progress and its remarks about operators and packages that are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
