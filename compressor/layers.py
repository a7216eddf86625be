"""What a compressed module is: buffers plus one op call. No method knows these classes, no layer knows a method.

`Packed` is the stored form (what the safetensors file holds), `build` turns it into a module. Adding a kind
is one class here and one row in LAYERS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels import activations as act
from compressor.kernels import float_linear, fp4_embedding, fp4_linear, fp8_linear, int_embedding, int_linear


@dataclass
class Packed:
    """One module as stored: `kind` names the layer class, `tensors` the file's tensors, `attributes` are JSON."""

    kind: str
    tensors: dict[str, Tensor]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class HadamardLinear(nn.Linear):
    """A linear of the working model that rotates its input in blocks: y = (W H)(H x) + b, what the ops compute.

    `weight` is W H, [N, K]: methods store it as it is, and statistics are of H x (calibrate.py). Nothing else sees H x,
    so a scale per channel of x cannot be folded into this layer, and folds.py will not prove one.
    """

    hadamard: int

    @classmethod
    def rotated(cls, layer: nn.Linear, block: int) -> HadamardLinear:
        """`layer` with its input rotated; its parameters are left alone. `block` must divide in_features."""
        made = cls(1, 1, device="meta")
        made.in_features, made.out_features, made.hadamard = layer.in_features, layer.out_features, block
        weight = act.rotate(layer.weight.detach().double(), block).to(layer.weight.dtype)
        made.weight, made.bias = nn.Parameter(weight, layer.weight.requires_grad), layer.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(act.rotate(x, self.hadamard), self.weight, self.bias)


def hadamard_of(layer: nn.Module) -> int:
    """Block size of the rotation of a linear's input, 0 for none."""
    return layer.hadamard if isinstance(layer, HadamardLinear) else 0


def attributes_of(layer: nn.Linear, padding: int = 0) -> dict[str, object]:
    """What every stored linear says of itself, whatever its kind; methods add the rest."""
    rotation: dict[str, object] = {"hadamard": block} if (block := hadamard_of(layer)) else {}
    return {"in_features": layer.in_features, "out_features": layer.out_features, "padding": padding} | rotation


def build(packed: Packed) -> QuantModule:
    """The runnable module of one Packed, on its tensors (not copied)."""
    return LAYERS[packed.kind](packed)


class QuantModule(nn.Module):
    """Buffers named as in the file. `hold_dense` trades memory for speed where weights are reused often."""

    dense: Tensor | None

    def __init__(self, packed: Packed):
        super().__init__()
        self.attributes = dict(packed.attributes)
        self.in_features: int = self.attributes["in_features"]
        self.out_features: int = self.attributes["out_features"]
        self.padding: int = self.attributes.get("padding", 0)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("dense", None, persistent=False)

    def stored(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def optional(self, name: str) -> Tensor | None:
        return self._buffers.get(name)

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features + padding], exactly what the op multiplies with."""
        raise NotImplementedError

    def hold_dense(self, hold: bool = True) -> None:
        self.dense = self.dequantize() if hold else None

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.attributes.items())


class QuantLinear(QuantModule):
    """A linear layer; y has the dtype of x and the arithmetic is float32.

    One whose rounding error is corrected (methods/correct.py) adds U (V x), x being the input before any rounding:
    `correction_down` V [R, K] and `correction_up` U [N, R], bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.rounded(x)
        if (down := self.optional("correction_down")) is None:
            return y
        up = self.stored("correction_up").to(x.dtype)
        return y + nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up)

    def rounded(self, x: Tensor) -> Tensor:
        """What the stored weights give, without the correction."""
        if self.padding:
            x = nn.functional.pad(x, (0, self.padding))
        if self.dense is None:
            return self.call(x)
        bias, dtype = self.optional("bias"), self.dense.dtype
        y = nn.functional.linear(self.quantize_input(x).to(dtype), self.dense, None if bias is None else bias.to(dtype))
        return y.to(x.dtype)

    def call(self, x: Tensor) -> Tensor:
        """The registered op on this layer's buffers."""
        raise NotImplementedError

    def quantize_input(self, x: Tensor) -> Tensor:
        """float32 values that the op multiplies the weights with."""
        a = self.attributes
        return act.quantize(
            x,
            a["activations"],
            self.optional("input_global_scale"),
            a.get("four_over_six", False),
            self.optional("input_scale"),
            self.optional("input_offset"),
            self.optional("input_shift"),
            self.hadamard,
        )

    @property
    def hadamard(self) -> int:
        """Block size of the rotation of its input, 0 for none. Padding is zeros, which stay zeros."""
        return self.attributes.get("hadamard", 0)


class FP4Linear(QuantLinear):
    def call(self, x: Tensor) -> Tensor:
        return fp4_linear.fp4_linear(
            x,
            self.stored("weight_packed"),
            self.stored("weight_scale"),
            self.optional("weight_global_scale"),
            self.optional("input_global_scale"),
            self.optional("bias"),
            self.attributes["format"],
            self.attributes["activations"],
            self.attributes["four_over_six"],
            self.hadamard,
        )

    def dequantize(self) -> Tensor:
        return fp4_linear.dequantize(
            self.stored("weight_packed"), self.stored("weight_scale"), self.optional("weight_global_scale")
        )


class IntLinear(QuantLinear):
    def values(self) -> Tensor:
        """int8 [N, K], or the int32 words of weight-only integers."""
        return self.stored("weight" if "weight" in self._buffers else "weight_packed")

    def call(self, x: Tensor) -> Tensor:
        return int_linear.int_linear(
            x,
            self.values(),
            self.stored("weight_scale"),
            self.optional("bias"),
            self.attributes["bits"],
            self.attributes["group_size"] or 0,
            self.attributes["activations"],
            self.optional("input_scale"),
            self.optional("input_offset"),
            self.hadamard,
        )

    def dequantize(self) -> Tensor:
        a = self.attributes
        return int_linear.dequantize(
            self.values(),
            self.stored("weight_scale"),
            a["bits"],
            a["group_size"] or 0,
            self.in_features + self.padding,
        )


class FP8Linear(QuantLinear):
    def call(self, x: Tensor) -> Tensor:
        return fp8_linear.fp8_linear(
            x,
            self.stored("weight"),
            self.stored("weight_scale"),
            self.optional("bias"),
            self.attributes["activations"],
            self.hadamard,
        )

    def dequantize(self) -> Tensor:
        return fp8_linear.dequantize(self.stored("weight"), self.stored("weight_scale"))


class FloatLinear(QuantLinear):
    def call(self, x: Tensor) -> Tensor:
        return float_linear.float_linear(
            x,
            self.stored("weight_packed"),
            self.stored("weight_scale"),
            self.optional("weight_global_scale"),
            self.optional("input_scale"),
            self.optional("input_shift"),
            self.optional("bias"),
            self.attributes["format"],
            self.attributes["activations"],
        )

    def dequantize(self) -> Tensor:
        return float_linear.dequantize(
            self.stored("weight_packed"),
            self.stored("weight_scale"),
            self.optional("weight_global_scale"),
            self.attributes["format"],
        )


class QuantEmbedding(QuantModule):
    """A token table [V, K]; out_features is V, in_features is K. `multiplier` scales every row (Gemma 3)."""

    output_dtype = torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        return (self.call(ids) * self.attributes["multiplier"]).to(self.output_dtype)

    def call(self, ids: Tensor) -> Tensor:
        """The registered op on this table's buffers: float32 [..., K]."""
        raise NotImplementedError


class FP4Embedding(QuantEmbedding):
    def call(self, ids: Tensor) -> Tensor:
        return fp4_embedding.fp4_embedding(
            ids,
            self.stored("weight_packed"),
            self.stored("weight_scale"),
            self.optional("weight_global_scale"),
            self.attributes["format"],
        )

    def dequantize(self) -> Tensor:
        return fp4_linear.dequantize(
            self.stored("weight_packed"), self.stored("weight_scale"), self.optional("weight_global_scale")
        )


class IntEmbedding(QuantEmbedding):
    def call(self, ids: Tensor) -> Tensor:
        a = self.attributes
        return int_embedding.int_embedding(
            ids,
            self.stored("weight_packed"),
            self.stored("weight_scale"),
            a["bits"],
            a["group_size"] or 0,
            self.in_features,
        )

    def dequantize(self) -> Tensor:
        a = self.attributes
        return int_linear.dequantize(
            self.stored("weight_packed"), self.stored("weight_scale"), a["bits"], a["group_size"] or 0, self.in_features
        )


LAYERS: dict[str, type[QuantModule]] = {
    "fp4_linear": FP4Linear,
    "int_linear": IntLinear,
    "fp8_linear": FP8Linear,
    "float_linear": FloatLinear,
    "fp4_embedding": FP4Embedding,
    "int_embedding": IntEmbedding,
}


def hold_dense(model: nn.Module, hold: bool = True) -> nn.Module:
    """Keep (or drop) the dequantized float32 weights of every linear: 4 bytes a weight, several times the speed."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.hold_dense(hold)
    return model
