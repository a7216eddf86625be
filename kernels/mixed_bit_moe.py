"""compressor::mixed_bit_moe — y_t = Σ_e w_te f_e(x_t), f_e(x) = down(act(gate(x)) * up(x)): experts of any widths.

Contract, all on one device; T tokens, H hidden, I intermediate, E experts:
    x                [T, H]     any float dtype; y has the same
    weights          [T, E]     what each expert's output is multiplied by; 0: it is not chosen, and not read
    experts          [bytes]    uint8: one expert after the other, each as `layout` says for its width
    bits             a digit for each expert: 1 | 2 | 3 | 4 | 8
    layout           for each width in `bits`, ascending, eight numbers: the bytes of an expert, and the offsets within
                     it of the codes of gate, up and down and of their scales
    group_size, down_group_size     columns to a scale, of gate and up [I, H], and of down [H, I]; 0: one a row
    hidden, intermediate            H, I
    activation       "gelu" (erf) | "gelu_tanh" | "silu" | "relu"
Codes are rows of int32 words (codec.pack_int), scales bfloat16 [N, ceil(K/group)]. `reference` is the specification:
float32 arithmetic, weights dequantized in full. On a CPU the op runs the fused kernel where it was built (kernels/ort).

`PackedExperts` makes the bytes of a layer of compressed experts; a weight file holds the same (expert_layout.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor import expert_layout
from compressor.kernels import int_linear, native
from compressor.kernels.lowrank_ffn import ACTIVATIONS

if TYPE_CHECKING:
    from compressor.mixtures import MoEView

PARTS = ("gate", "up", "down")
TOLERANCE = 1e-5  # of float32 products in another order, relative to the largest output


@dataclass(frozen=True)
class Place:
    """Where an expert of one width has its tensors: its bytes, and offsets of codes and scales by PARTS."""

    length: int
    codes: tuple[int, int, int]
    scales: tuple[int, int, int]


def places(layout: str) -> dict[int, Place]:
    """The attribute `layout`, by width."""
    n = [int(word) for word in layout.split()]
    return {
        n[i]: Place(n[i + 1], (n[i + 2], n[i + 3], n[i + 4]), (n[i + 5], n[i + 6], n[i + 7]))
        for i in range(0, len(n), 8)
    }


def starts(bits: str, layout: str) -> list[int]:
    """Byte at which each expert begins, and behind them the end of the last."""
    known, found = places(layout), [0]
    for digit in bits:
        found.append(found[-1] + known[int(digit)].length)
    return found


def matrices(
    bits: str, layout: str, group_size: int, down_group_size: int, intermediate: int, hidden: int
) -> Iterator[list[tuple[int, int, int, int, int, int]]]:
    """For each expert (offset of codes, bytes of a row, offset of scales, groups of a row, N, K) by PARTS."""
    known = places(layout)
    for digit, start in zip(bits, starts(bits, layout), strict=False):
        own, rows = known[int(digit)], []
        for part, codes, scales in zip(PARTS, own.codes, own.scales, strict=True):
            n, k = (hidden, intermediate) if part == "down" else (intermediate, hidden)
            group = down_group_size if part == "down" else group_size
            row_bytes = -(-k * int(digit) // 32) * 4
            rows.append((start + codes, row_bytes, start + scales, -(-k // group) if group else 1, n, k))
        yield rows


def reference(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    bits: str,
    layout: str,
    group_size: int,
    down_group_size: int,
    hidden: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    y = torch.zeros_like(x, dtype=torch.float32)
    shapes = matrices(bits, layout, group_size, down_group_size, intermediate, hidden)
    for e, (digit, own) in enumerate(zip(bits, shapes, strict=True)):
        tokens = weights[:, e].nonzero().flatten()
        if not len(tokens):
            continue
        dense = []
        for part, (codes, row_bytes, scales, groups, n, k) in zip(PARTS, own, strict=True):
            words = experts[codes : codes + n * row_bytes].view(torch.int32).view(n, -1)
            step = experts[scales : scales + 2 * n * groups].view(torch.bfloat16).view(n, -1)
            group = down_group_size if part == "down" else group_size
            dense.append(int_linear.dequantize(words, step, int(digit), group, k))
        gate, up, down = dense
        inside = x[tokens].float()
        out = (ACTIVATIONS[activation](inside @ gate.T) * (inside @ up.T)) @ down.T
        y.index_add_(0, tokens, out * weights[tokens, e, None].float())
    return y.to(x.dtype)


def _fused(x, weights, experts, bits, layout, group_size, down_group_size, hidden, intermediate, activation):
    attributes = {
        "bits": bits,
        "layout": layout,
        "group_size": group_size,
        "down_group_size": down_group_size,
        "hidden": hidden,
        "intermediate": intermediate,
        "activation": activation,
    }
    return native.run("MixedBitMoE", attributes, [x.float(), weights.float(), experts], x.shape).to(x.dtype)


mixed_bit_moe = native.op("mixed_bit_moe", reference, _fused)


@mixed_bit_moe.register_fake
def _(x, weights, experts, bits, layout, group_size, down_group_size, hidden, intermediate, activation):
    return torch.empty_like(x)


class PackedExperts(nn.Module):
    """The experts of a layer as the op takes them: ragged, each in its own width."""

    experts: Tensor

    def __init__(self, experts: Tensor, attributes: Mapping[str, Any]):
        super().__init__()
        self.register_buffer("experts", experts)
        self.attributes = dict(attributes)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], weights [T, E] -> [T, H]."""
        return mixed_bit_moe(x, weights, self.experts, **self.attributes)

    @classmethod
    def of(cls, view: MoEView) -> PackedExperts | str:
        """The module, or why the op cannot compute these experts: the rest of a sentence about them."""
        first = view.experts[0]
        if reason := _refusal(view):
            return reason
        names = _roles(view)
        activation = _activation(view)
        if names is None or activation is None:
            return "they are not an activation of a gate, times up, through down"
        layers = [{part: e.get_submodule(n) for part, n in zip(PARTS, names, strict=True)} for e in view.experts]
        pieces, placed = [], {}
        for expert, own in zip(view.experts, layers, strict=True):
            stored = {name: t for name, t in expert.state_dict().items()}
            found = {s.name: s for s in expert_layout.slots(stored, (n for n, _ in expert.named_modules()))}
            end = max(s.offset + s.length for s in found.values())
            codes, scales = (
                tuple(found[f"{n}.{leaf}"].offset for n in names) for leaf in ("weight_packed", "weight_scale")
            )
            placed[own["gate"].attributes["bits"]] = (expert_layout.padded(end), *codes, *scales)
            pieces += [stored[name].contiguous().flatten().view(torch.uint8) for name in found]
            pieces.append(torch.zeros(expert_layout.padded(end) - end, dtype=torch.uint8))
        gate, down = (first.get_submodule(names[i]) for i in (0, 2))
        attributes = {
            "bits": "".join(str(own["gate"].attributes["bits"]) for own in layers),
            "layout": " ".join(str(n) for width in sorted(placed) for n in (width, *placed[width])),
            "group_size": gate.attributes["group_size"] or 0,
            "down_group_size": down.attributes["group_size"] or 0,
            "hidden": gate.in_features,
            "intermediate": gate.out_features,
            "activation": activation,
        }
        return cls(torch.cat(pieces), attributes)


def _refusal(view: MoEView) -> str | None:
    from compressor.experts import Clamped
    from compressor.layers import IntLinear, QuantLinear
    shapes: set[Any] = set()
    for expert in view.experts:
        own: dict[str, Any] = {
            n: m for n, m in expert.named_modules() if isinstance(m, nn.Linear | QuantLinear)
        }
        if any(isinstance(m, Clamped) for m in expert.modules()):
            return "their activation is clamped"
        for layer in own.values():
            if not isinstance(layer, IntLinear) or "weight_packed" not in layer._buffers:
                return "not all of their weights are packed integers"
            a: dict[str, Any] = layer.attributes
            if layer.optional("bias") is not None:
                return "their linears have biases"
            if a["activations"] != "none" or a.get("hadamard") or layer.optional("input_offset") is not None:
                return "their inputs are rounded or rotated"
            if layer.padding or layer.optional("correction_down") is not None:
                return "their inputs are padded, or their rounding is corrected"
            if layer.stored("weight_scale").dtype != torch.bfloat16:
                return "their scales are not bfloat16"
        if len({m.attributes["bits"] for m in own.values()}) > 1:
            return "one of them has linears of several widths"
        shapes.add(tuple((n, m.in_features, m.out_features, m.attributes["group_size"]) for n, m in own.items()))
    return "their shapes differ" if len(shapes) != 1 else None


@torch.no_grad()
def _roles(view: MoEView) -> tuple[str, str, str] | None:
    """The names of gate, up and down inside an expert, tried out."""
    expert, act = view.experts[0], view.activation()
    x = torch.randn(4, view.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(view.weight)
    expected = expert(x)
    names = [n for n, m in expert.named_modules() if hasattr(m, "in_features")]
    for names_of in permutations(names, 3) if len(names) == 3 else ():
        gate, up, down = (expert.get_submodule(n) for n in names_of)
        if not (gate.in_features == up.in_features == down.out_features == x.shape[1]):
            continue
        if gate.out_features == up.out_features == down.in_features:
            y = down(act(gate(x), up(x)))
            if (y - expected).abs().amax() <= TOLERANCE * expected.abs().amax():
                return names_of
    return None


@torch.no_grad()
def _activation(view: MoEView) -> str | None:
    """Which of ACTIVATIONS act(g, u) = a(g) u is."""
    g = torch.linspace(-6, 6, 97)
    found = view.activation()(g, torch.ones_like(g))
    same = (name for name, a in ACTIVATIONS.items() if (a(g) - found).abs().amax() <= 1e-6)
    return next(same, None)
