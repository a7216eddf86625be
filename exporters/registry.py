"""Every format a folder can hold, in the order they are written: one line each.

An exporter is a function (artifact, folder) -> files written. It never imports a method.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compressor.artifact import Artifact
from compressor.exporters import onnx_graph, peft_adapter, safetensors_file

EXPORTERS: dict[str, Callable[[Artifact, Path], list[Path]]] = {
    "safetensors": safetensors_file.export,
    "onnx": onnx_graph.export,  # its weights are the bytes of the safetensors file
    "lora": peft_adapter.export,  # the pairs of a correct step, and the model that they go on
}
