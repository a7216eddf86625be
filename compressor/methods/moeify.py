"""Moeify: dense feed-forward layers become mixtures of experts, without training. See docs/moe.md.

    groups   channels that act on the same tokens; the busiest make the shared expert     carving.py
    router   which experts would add most, by least squares on the layer's input          carving.py
    layer    y = shared(x) + Σ of the top_k experts                                       routed.py

No weight changes: with all experts active the layer is what it was. Each layer sees what those carved before it give.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import Spool, device_of, run_blocks
from compressor.calibrate import up_to_last
from compressor.carving import Carving, Fit, carve, energies, markers
from compressor.errors import ModelError, RecipeError
from compressor.mixtures import roles
from compressor.model import blocks, linears
from compressor.parts import experts_of
from compressor.prunable import linear_like, to_bf16
from compressor.routed import Names, RoutedFFN, activation, expert_of
from compressor.run import Run

ACTIVATIONS = ("hidden_act", "hidden_activation")  # the config's fields that name it


@dataclass(frozen=True)
class Moeify:
    """Channels make `experts` parts of one size: `shared` of them for every token, and of the rest each token gets
    `top_k`. The first and the last `dense` layers stay as they are. `markers`: of how many channels a token says that
    they act; None: one of 48."""

    experts: int = 16
    shared: int = 4
    top_k: int = 8
    dense: int = 1
    markers: int | None = None

    def __post_init__(self) -> None:
        if self.shared < 1 or self.experts - self.shared < 2:
            raise ValueError(f"shared {self.shared} of {self.experts} experts; at least 1 is shared and 2 are not")
        if not 1 <= self.top_k <= self.experts - self.shared:
            raise ValueError(f"top_k {self.top_k} must be 1 to {self.experts - self.shared}, the experts not shared")
        if self.dense < 0:
            raise ValueError(f"dense {self.dense} must be 0 or more layers at either end")
        if self.markers is not None and self.markers < 1:
            raise ValueError(f"markers {self.markers} must be 1 or more channels")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """Layers of the shapes they will have; who goes where, the text says."""
        for name, ffn in self._layers(model, names).items():
            parts = torch.arange(ffn.channels).view(self.experts, -1)
            carving = Carving(parts[: self.shared].flatten(), parts[self.shared :])
            router = torch.empty(self.experts - self.shared, ffn.features, device="meta")
            self._replace(model, name, ffn, carving, router, router[:, 0])

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Carve block by block; of every layer the report has the share of h² that stays, the
        share of the output's squares that is lost, and of how many tokens each expert is, on the last window."""
        layers = {name: self._proven(model, name, ffn) for name, ffn in self._layers(model, names).items()}
        inside = [f"{name}.{ffn.names[0]}" for name, ffn in layers.items()]
        rows: dict[str, Any] = {}
        with tempfile.TemporaryFile() as file:
            held: _Held | None = None

            @contextmanager
            def around(block: str) -> Iterator[None]:
                nonlocal held
                if not (mine := [name for name in layers if name.startswith(f"{block}.")]):
                    yield
                    return
                if held is None or held.name != mine[0]:
                    ffn = layers[mine[0]]
                    most = min(ffn.channels, self.markers or max(1, ffn.channels // 48))
                    held = _Held(model.get_submodule(mine[0]), mine[0], ffn, most, Spool(file))
                with held.listening():
                    yield

            def after(block: str) -> None:
                if held is not None and held.name.startswith(f"{block}."):
                    rows[held.name] = self._carve(model, held)

            run_blocks(
                model, run.windows, up_to_last(blocks(model), inside), around, run.progress, run.device, run.dtype,
                after, sequential=True,
            )  # fmt: skip
        to_bf16(model, [n for n in linears(model) if n in names or n.startswith(tuple(f"{name}." for name in layers))])
        found = sum(row["energy"] for row in rows.values()) / len(rows)
        active = (self.shared + self.top_k) / self.experts
        summary = f"{len(rows)} layers, {active:.1%} of their channels a token, with {found:.1%} of the energy"
        return {"summary": summary, "layers": rows}

    def _layers(self, model: Any, names: Collection[str]) -> dict[str, _FFN]:
        """The layers to carve, by name. Raises ModelError and RecipeError for what cannot be."""
        act = next((a for f in ACTIVATIONS if isinstance(a := getattr(model.config, f, None), str)), "")
        containers = tuple(f"{container}." for _, container, _ in experts_of(model))
        found: dict[str, _FFN] = {}
        for name, module in model.named_modules():
            own = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
            if len(own) != 3 or sum(isinstance(m, nn.Linear) for m in module.modules()) != 3:
                continue
            if name.startswith(containers) or not {f"{name}.{n}" for n in own} <= set(names):
                continue
            wide = [n for n, m in own.items() if m.out_features > m.in_features]
            if len(wide) == 2:
                (down,) = set(own) - set(wide)
                shapes = {(m.in_features, m.out_features) for m in (own[wide[0]], own[wide[1]])}
                if shapes == {(own[down].out_features, own[down].in_features)}:
                    found[name] = _FFN((wide[0], wide[1], down), act, own[down].in_features, own[down].out_features)
        if not found:
            raise ModelError(
                f"{type(model).__name__}: moeify finds no feed-forward layer with a gate, an up and a down projection "
                f"among its targets; target all three, or drop the step."
            )
        for name, ffn in found.items():
            if ffn.channels % self.experts:
                allowed = [n for n in range(3, 65) if ffn.channels % n == 0]
                raise RecipeError(
                    f"moeify: experts {self.experts} does not divide the {ffn.channels} channels of {name}; "
                    f"use one of {', '.join(map(str, allowed))}."
                )
        order = list(found)[self.dense : len(found) - self.dense]
        if not order:
            raise RecipeError(f"moeify: dense {self.dense} leaves none of {len(found)} layers to carve; set less.")
        return {name: found[name] for name in order}

    def _proven(self, model: nn.Module, name: str, ffn: _FFN) -> _FFN:
        """With the roles of its linears, found by trying. Raises ModelError for what computes something else."""
        module = model.get_submodule(name)
        weight = model.get_parameter(f"{name}.{ffn.names[0]}.weight")
        x = torch.randn(4, ffn.features, generator=torch.Generator().manual_seed(0)).to(weight)
        names = roles(module, activation(ffn.act), x) if ffn.act else None
        if names is None:
            raise ModelError(
                f"{name} is not down({ffn.act or 'an activation'}(gate(x)) up(x)); moeify needs that. Drop the step."
            )
        return _FFN(names, ffn.act, ffn.channels, ffn.features)

    def _carve(self, model: nn.Module, held: _Held) -> dict[str, Any]:
        """Replace one layer; its row of the report, from the last window that it saw."""
        carving = carve(held.together, self.experts, self.shared)
        fit = Fit(held.ffn.features, len(carving.experts))
        for x in held.inputs():
            fit.add(x, energies(held.size(x), carving))
        layer = self._replace(model, held.name, held.ffn, carving, *fit.value())
        weights, size, expected = layer.weights(x), held.size(x), held.module(x)
        always = size[:, carving.shared.to(size.device)].square().sum()
        kept = always + (energies(size, carving) * weights).sum()
        return {
            "energy": round((kept / size.square().sum()).item(), 4),
            "error": round(((layer(x) - expected).square().sum() / expected.square().sum()).item(), 4),
            "use": [round(share, 4) for share in weights.mean(0).tolist()],
        }

    def _replace(
        self, model: nn.Module, name: str, ffn: _FFN, carving: Carving, weight: Tensor, bias: Tensor
    ) -> RoutedFFN:
        """Put the layer in parts in the place of `name`, with the router weight [E, H], bias [E]."""
        gate, up, down = (model.get_submodule(f"{name}.{n}") for n in ffn.names)
        parts = [_part(ffn, gate, up, down, channels, with_bias=False) for channels in carving.experts]
        shared = _part(ffn, gate, up, down, carving.shared, with_bias=True)
        like: Any = gate
        router = linear_like(like, weight.to(like.weight), bias.to(like.weight))
        made = RoutedFFN(router, parts, shared, self.top_k, ffn.act).train(model.training)
        model.set_submodule(name, made)
        return made


@dataclass(frozen=True)
class _FFN:
    """A layer down(act(gate(x)) up(x)): the names of its linears inside it, n channels, H features."""

    names: Names
    act: str
    channels: int
    features: int


def _part(ffn: _FFN, gate: Any, up: Any, down: Any, channels: Tensor, with_bias: bool) -> Any:
    """The expert of these channels; only one of all may have the bias of the output."""
    at = channels.to(gate.weight.device)

    def rows(layer: Any) -> nn.Linear:
        return linear_like(layer, layer.weight.detach()[at], None if layer.bias is None else layer.bias.detach()[at])

    last = linear_like(down, down.weight.detach()[:, at], down.bias if with_bias else None)
    return expert_of(ffn.names, rows(gate), rows(up), last, ffn.act)


class _Held:
    """One layer while its block runs: which channels act together, and its inputs, in a file."""

    def __init__(self, module: nn.Module, name: str, ffn: _FFN, most: int, spool: Spool):
        self.module, self.name, self.ffn, self.most, self.spool = module, name, ffn, most, spool
        self.windows = 0
        device = device_of(module)
        self.together = torch.zeros(ffn.channels, ffn.channels, device=device)
        self.norm = module.get_parameter(f"{ffn.names[2]}.weight").detach().norm(dim=0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        handle = self.module.register_forward_pre_hook(lambda _, args: self._add(args[0]))
        try:
            yield
        finally:
            handle.remove()

    def _add(self, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):  # counts are whole numbers
            x = x.float()
            acts = markers(self.size(x.flatten(0, -2)), self.most)
            self.together += acts.T @ acts
        self.spool.write(self.windows, x)
        self.windows += 1

    def size(self, x: Tensor) -> Tensor:
        """x [T, H] -> |h|, what each channel adds to the output, float32 [T, n]."""
        gate, up = (self.module.get_submodule(n)(x) for n in self.ffn.names[:2])
        return activation(self.ffn.act)(gate, up).abs() * self.norm

    def inputs(self) -> Iterator[Tensor]:
        """[T, H] of every window."""
        device = self.together.device
        for number in range(self.windows):
            yield self.spool.read(number).to(device).flatten(0, -2)

