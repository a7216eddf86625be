"""The initializers of a graph as pointers into the safetensors file beside it: no second copy of any weight.

The file's dtype is the one declared; where the graph computes in another, one Cast follows (behind the Gather of an
embedding, so that only the rows in use are converted). Packed integers are declared as the bytes that their op reads.
Only what the model computes itself (rotary frequencies and the like) is stored in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import OutputError
from compressor.exporters.onnx_nodes import DOMAIN, FACTORS, INPUTS, STOCK_DOMAIN
from compressor.exporters.safetensors_file import header

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 64 * 1024  # a constant of this size or more may not live in the graph
DTYPES = {
    "F32": "FLOAT",
    "F16": "FLOAT16",
    "BF16": "BFLOAT16",
    "F8_E4M3": "FLOAT8E4M3FN",
    "U8": "UINT8",
    "I8": "INT8",
    "I32": "INT32",
    "I64": "INT64",
}


def bind(model: ir.Model, weights: Path, tied: Mapping[str, str], state: Collection[str]) -> None:
    """Point every initializer of `model` into the file `weights`, in place.

    tied: tensor name -> the name that the file stores it under. state: names of the model's own tensors, which must
    come from the file. Raises OutputError for one that is not there or has another shape, and for a large constant.
    """
    import onnx_ir as ir

    file = _File(weights, model.graph)
    for name in sorted(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        source = tied.get(name, name)
        if isinstance(value.const_value, ir.ExternalTensor):  # in the file already (onnx_moe.py)
            model.graph.register_initializer(value)
        elif source in file.entries:
            file.replace(value, source)
        elif name in state or value.const_value is None or value.const_value.nbytes >= INLINE_BYTES:
            raise OutputError(
                f"{weights.name}: '{name}' {_shape(value)} of the ONNX graph is not in the file, and the graph may "
                f"only hold computed constants below {INLINE_BYTES // 1024} KB; leave onnx out of the recipe's exports."
            )
        else:
            model.graph.register_initializer(value)
    file.register()
    _require_small_constants(model)


class _File:
    """What the graph uses of one safetensors file, each tensor declared once."""

    def __init__(self, path: Path, graph: ir.Graph):
        self.location = path.name
        self.entries = header(path)
        self.graph = graph
        self.declared: dict[str, ir.Value] = {}
        self.casts: dict[str, ir.Node] = {}

    def declare(self, source: str, view: tuple[int, ...] | None = None) -> ir.Value:
        """The stored tensor, or its bytes as uint8 in the shape `view`."""
        import onnx_ir as ir

        dtype, stored, offset, length = self.entries[source]
        kind = ir.DataType[DTYPES[dtype]] if view is None else ir.DataType.UINT8
        shape = ir.Shape(stored if view is None else view)
        name = source if view is None else f"{source}.{'x'.join(map(str, view))}"
        if name not in self.declared:
            tensor = ir.ExternalTensor(self.location, offset, length, kind, shape=shape, name=name)
            self.declared[name] = ir.Value(name=name, type=ir.TensorType(kind), shape=shape, const_value=tensor)
        return self.declared[name]

    def cast(self, source: str, kind: ir.DataType) -> ir.Value:
        """The stored tensor in another dtype: one node for all users."""
        import onnx_ir as ir

        name = f"{source}.{kind.name.lower()}"
        if name not in self.casts:
            self.casts[name] = ir.node("Cast", [self.declare(source)], {"to": kind})
            self.casts[name].outputs[0].name = name
        return self.casts[name].outputs[0]

    def replace(self, value: ir.Value, source: str) -> None:
        """Connect the users of `value` to the file's tensor `source`."""
        dtype, shape = self.entries[source][:2]
        if _shape(value) != list(shape):
            raise OutputError(
                f"{self.location}: '{source}' is {list(shape)} in the file and {_shape(value)} in the ONNX graph; "
                f"this is a fault of compressor, not of the model: please report it."
            )
        for node, index in list(value.uses()):
            assert value.dtype is not None
            if view := _byte_view(node, index, shape):
                node.replace_input_with(index, self.declare(source, view))
            elif DTYPES[dtype] == value.dtype.name or (dtype == "BF16" and _reads_bf16(node, index)):
                node.replace_input_with(index, self.declare(source))
            elif node.op_type == "Gather" and index == 0:
                node.replace_input_with(index, self.declare(source))
                self._cast_result(node, value.dtype)
            else:
                node.replace_input_with(index, self.cast(source, value.dtype))

    def _cast_result(self, node: ir.Node, kind: ir.DataType) -> None:
        import onnx_ir as ir

        rows = node.outputs[0]
        cast = ir.node("Cast", [ir.Value(name="unused")], {"to": kind})
        rows.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, rows)
        cast.outputs[0].name = f"{rows.name}.{kind.name.lower()}"
        self.graph.insert_after(node, cast)

    def register(self) -> None:
        for name in sorted(self.declared):
            self.graph.register_initializer(self.declared[name])
        if self.casts:
            self.graph.insert_before(self.graph[0], [self.casts[name] for name in sorted(self.casts)])


def _shape(value: ir.Value) -> list[Any]:
    return list(value.shape or ())


def _byte_view(node: ir.Node, index: int, shape: Any) -> tuple[int, ...] | None:
    """The uint8 shape in which this input of the node reads stored bytes, None where it reads the tensor as stored."""
    if (node.domain, node.op_type, index) == (DOMAIN, "FP4Embedding", 2):
        return shape[0], shape[1]  # onnxruntime's Gather takes no float8
    if index != 1:
        return None
    if (node.domain, node.op_type) == (STOCK_DOMAIN, "MatMulNBits"):
        block, bits = (node.attributes.get_int(name) for name in ("block_size", "bits"))
        return shape[0], node.attributes.get_int("K") // block, block * bits // 8
    packed = node.op_type == "IntEmbedding" or (node.op_type == "IntLinear" and node.attributes.get_int("packed"))
    return (shape[0], shape[1] * 4) if node.domain == DOMAIN and packed else None


def _reads_bf16(node: ir.Node, index: int) -> bool:
    """Factors of low-rank ops: the kernel reads what is stored, the body casts it."""
    return node.op_type.startswith("LowRank") and INPUTS[node.op_type][index].endswith(FACTORS)


def _require_small_constants(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = node.attributes["value"].value
            if math.prod(tensor.shape.numpy()) and tensor.nbytes >= INLINE_BYTES:
                raise OutputError(
                    f"The ONNX graph would hold a constant of {tensor.nbytes} bytes ('{node.outputs[0].name}'), and "
                    f"the limit is {INLINE_BYTES // 1024} KB; leave onnx out of the recipe's exports."
                )
