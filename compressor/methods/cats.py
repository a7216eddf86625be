"""CATS: neurons of gated feed-forward layers that a token does not use (Lee et al. 2024, "CATS: Contextually-Aware
Thresholding for Sparsity"). See docs/r_sparse.md.

    down (m ⊙ act(g) ⊙ up x)        g = gate x,  m_i = |act(g_i)| > t,  t the quantile of |act(g)| of the layer

The gate is read whole; of a neuron that is left out, neither its row of up nor its column of down is needed. Which
module is the activation of which gate is seen while the model runs, by identity and by value, not by names.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from compressor import sparsity
from compressor.blockwise import base_of
from compressor.calibrate import PROBE_TOKENS, calibrate
from compressor.errors import ModelError, RecipeError
from compressor.model import linears
from compressor.run import Run
from compressor.sparse import SparseActivation
from compressor.sparsity import Activations


@dataclass(frozen=True)
class Gate:
    """Names of linears, and of the module between gate and product."""

    linear: str
    activation: str
    up: str
    down: str


@dataclass(frozen=True)
class CATS:
    """`sparsity` is the share of all targeted linears' weights that a token does not need, as that of r_sparse is."""

    sparsity: float = 0.25
    tokens: Literal["decode", "all"] = "decode"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity:g} is not a share; give a number from 0 to below 1")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """No linear changes."""

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Raises ModelError for a model without gates, RecipeError for more than its neurons' weights."""
        gates = [gate for gate in find_gates(model) if gate.linear in names]
        if not gates:
            raise ModelError(
                f"cats: no targeted linear of {type(model).__name__} is the gate of a feed-forward layer with an "
                f"activation of its own; use r_sparse."
            )
        layers = linears(model)
        total = sum(layers[name].weight.numel() for name in names)
        spared = sum(layers[name].weight.numel() for gate in gates for name in (gate.up, gate.down))
        share = self.sparsity * total / spared
        if share >= 1:
            raise RecipeError(
                f"cats: sparsity {self.sparsity:g} is more than up and down of all neurons, which are "
                f"{spared / total:.3f} of the targeted weights; set a lower one, or use r_sparse."
            )
        seen = calibrate(
            model, run.windows, {Activations}, [gate.linear for gate in gates], run.progress, run.device, run.dtype
        )
        report: dict[str, Any] = {}
        for gate in gates:
            module, layer = model.get_submodule(gate.activation), layers[gate.linear]
            x = sparsity.usual(seen.value(gate.linear, Activations)).to(layer.weight)
            with torch.no_grad():
                values = module(layer(x)).float()
            ones = torch.ones(values.shape[1], device=values.device)
            threshold = sparsity.thresholds(sparsity.ranked(values, ones), ones, share)
            model.set_submodule(gate.activation, SparseActivation(_name_of(module, gate), threshold, self.tokens))
            report[gate.activation] = {"neurons_left_out": round(share, 4)}
        return report


@torch.no_grad()
def find_gates(model: nn.Module) -> list[Gate]:
    """Gates whose activation, times what up gives, is what down reads; seen with a few random tokens."""
    from transformers.activations import ACT2FN

    # What is stored, since to make every one of them says which packages are missing.
    classes = {made[0] if isinstance(made, tuple) else made for made in dict.values(ACT2FN)}
    layers = linears(model)
    others = {n: m for n, m in model.named_modules() if type(m) in classes}
    seen: dict[str, tuple[Any, Any]] = {}  # what each got and gave, kept so that an id means one tensor
    ran: list[str] = []

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            seen[name] = args[0], out
            ran.append(name)

        return hook

    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        for name, module in {**layers, **others}.items():
            stack.callback(module.register_forward_hook(see(name)).remove)
        base_of(model)(input_ids=tokens.to(next(model.parameters()).device))
    producers = {id(seen[name][1]): name for name in layers if name in seen}
    found = []
    for name in others:
        if ran.count(name) != 1 or (linear := producers.get(id(seen[name][0]))) is None:
            continue
        beside = [n for n in layers if n in seen and n != linear and seen[n][0] is seen[linear][0]]
        for up in (n for n in beside if seen[n][1].shape == seen[linear][1].shape):
            product = seen[name][1] * seen[up][1]
            downs = [n for n in layers if n in seen and seen[n][0].shape == product.shape]
            found += [Gate(linear, name, up, down) for down in downs if torch.equal(seen[down][0], product)]
    return found


def _name_of(module: nn.Module, gate: Gate) -> str:
    """By which transformers makes an activation like `module`."""
    from transformers.activations import ACT2FN

    for name in ACT2FN:
        if type(made := ACT2FN[name]) is type(module) and repr(made) == repr(module):
            return name
    raise ModelError(f"cats: {gate.activation} is none of transformers' activations; leave {gate.linear} out.")
