"""Running an exported folder in onnxruntime: prefill, cached decode, greedy tokens, and looking inside the graph.

Only what evaluation and verification need; a deployed model is run by optimum, onnxruntime-genai or the user's
own session. Stock onnxruntime, CPU provider; the library of fused ops only where asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from compressor.kernels import native

GRAPH = "model.onnx"


class OnnxSession:
    """One loaded graph. `graph` replaces the folder's model.onnx (its weights still come from the folder)."""

    def __init__(self, folder: Path, graph: onnx.ModelProto | None = None, library: bool = False):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if library:
            native.register_ops(options)
        source: str | bytes = str(folder / GRAPH)
        if graph is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            source = graph.SerializeToString()
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past_names = [n for n in self.inputs if n.startswith("past_key_values.")]

    def run(
        self,
        ids: Tensor,
        past: dict[str, np.ndarray] | None = None,
        mask: Tensor | None = None,
        more: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """All outputs by name for ids [B, L] after `past` (a cache that `prefill` returned; empty when None).

        mask: [B, past + L], 0 where a text is padded; None: nowhere. more: what else the graph asks for, by name.
        """
        batch, length = ids.shape
        if past is None:
            past = {n: np.zeros(self._past_shape(n, batch), np.float32) for n in self.past_names}
        seen = next(iter(past.values())).shape[2] if past else 0
        attended = torch.ones(batch, seen + length, dtype=torch.long) if mask is None else mask
        positions = positions_of(attended)[:, seen:]
        feeds = {
            "input_ids": ids.numpy(),
            "attention_mask": attended.numpy(),
            "position_ids": positions.numpy(),
            "token_type_ids": np.zeros((batch, length), np.int64),
            **past,
            **(more or {}),
        }
        values = self.session.run(None, {n: np.ascontiguousarray(v) for n, v in feeds.items() if n in self.inputs})
        return dict(zip(self.outputs, values, strict=True))

    def prefill(
        self,
        ids: Tensor,
        past: dict[str, np.ndarray] | None = None,
        mask: Tensor | None = None,
        more: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        """(logits or hidden states of ids [B, L], the cache to continue with)."""
        outputs = self.run(ids, past, mask, more)
        cache = {n: outputs[n.replace("past_key_values", "present")] for n in self.past_names}
        return torch.from_numpy(outputs[self.outputs[0]]), cache

    def greedy(self, ids: Tensor, count: int) -> list[int]:
        """`count` greedy tokens after ids [1, L], one cached step each."""
        tokens: list[int] = []
        logits, past = self.prefill(ids)
        while True:
            tokens.append(int(logits[0, -1].argmax()))
            if len(tokens) == count:
                return tokens
            logits, past = self.prefill(torch.tensor([[tokens[-1]]]), past)

    def _past_shape(self, name: str, batch: int) -> list[int]:
        heads, size = self.inputs[name].shape[1], self.inputs[name].shape[3]
        return [batch, heads, 0, size]


def positions_of(mask: Tensor) -> Tensor:
    """[B, L] of a mask: a padded text starts at 0 where it starts."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def torch_greedy(model: torch.nn.Module, ids: Tensor, count: int) -> list[int]:
    """The same with a transformers model and its cache; no sampling, no stop token."""
    tokens: list[int] = []
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=True)
        while True:
            tokens.append(int(output.logits[0, -1].argmax()))
            if len(tokens) == count:
                return tokens
            output = model(
                input_ids=torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values, use_cache=True
            )


def read_graph(folder: Path) -> onnx.ModelProto:
    """The graph without its weights."""
    return onnx.load(str(folder / GRAPH), load_external_data=False)


def expose(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make intermediate values outputs of the graph too, in place."""
    present = {o.name for o in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names) if n not in present)
