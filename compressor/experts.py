"""Experts held as one parameter [E, ., .] become linears, one set an expert, so that every method sees them.

transformers 5 fuses the experts of a layer, transformers 4 does so for GPT-OSS and Granite-MoE. A container's layout
is read off its shapes; what takes its place must compute what it did, on random tokens, or the model is refused.
Names are those of transformers 4, where it names experts one by one: they are the names in checkpoints, and a folder
written under one version opens under the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError

PROBE_TOKENS, TOLERANCE = 8, 1e-4  # of float32, relative to the largest output
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# Where a checkpoint names an expert's linears or the layer that holds them differently: class of the container ->
# (gate, up, down), and (the attribute of its block, the name that checkpoints have for it).
NAMES = {"MixtralExperts": ("w1", "w3", "w2")}
RENAMED = {"MixtralExperts": ("mlp", "block_sparse_moe")}


class Clamped(nn.Module):
    """GPT-OSS: (min(max(u, -limit), limit) + 1) g σ(α g), g cut off above at limit."""

    def __init__(self, alpha: float, limit: float):
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


class Gated(nn.Module):
    """act(g) u."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


class Expert(nn.Module):
    """Three linears under the names that checkpoints use; x [T, H] -> [T, H]."""

    def __init__(self, names: tuple[str, str, str], gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: nn.Module):
        super().__init__()
        self.names = names
        for name, linear in zip(names, (gate, up, down), strict=True):
            self.add_module(name, linear)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(x), up(x)))


class Experts(nn.ModuleList):
    """In place of a fused container, and called as that was; an expert runs on the tokens that chose it only.

    dense: weights come as [T, E], zero where not chosen (GPT-OSS in transformers 4), and not beside the indices.
    """

    dense = False

    def forward(self, hidden_states: Tensor, router_indices: Any = None, routing_weights: Any = None) -> Tensor:
        """hidden [..., H], indices int64 [T, K] (E: nobody), weights [T, K] or [T, E] -> the weighted sum, [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = routing_weights
        if not self.dense:
            weights = x.new_zeros(len(x), len(self) + 1).scatter_add(1, router_indices, weights.to(x.dtype))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens = (router_indices == number).any(-1).nonzero().flatten()
            if len(tokens):
                y.index_add_(0, tokens, (expert(x[tokens]) * weights[tokens, number, None]).to(y.dtype))
        return y.view_as(hidden_states)


class Router(nn.Module):
    """Granite-MoE in transformers 4 under the names of 5: softmax over the K largest logits."""

    def __init__(self, weight: nn.Parameter, top_k: int):
        super().__init__()
        self.weight, self.top_k = weight, top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> (indices [T, K], weights [T, K], logits float32 [T, E])."""
        logits = nn.functional.linear(x, self.weight).float()
        top, indices = logits.topk(self.top_k, dim=-1)
        return indices, torch.softmax(top, dim=-1).type_as(x), logits


class Mixture(nn.Module):
    """Granite-MoE's layer in transformers 4, whose experts are two parameters apart; gives what that gives."""

    def __init__(self, router: Router, experts: Experts):
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, layer_input: Tensor) -> tuple[Tensor, Tensor]:
        indices, weights, logits = self.router(layer_input.flatten(0, -2))
        return self.experts(layer_input, indices, weights), logits


def unfuse(model: nn.Module) -> None:
    """Replace every fused container of `model` in place. Values are shared where the layout allows.

    Raises ModelError for a container of unknown layout or one that computes something else than gated experts.
    """
    for name, module in list(model.named_modules()):
        parent_name = name.rpartition(".")[0]
        if fused := parallel(module):
            made: nn.Module = _mixture(module)
            call: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x.unsqueeze(0))[0][0]  # noqa: E731
        elif fused := container(module):
            made = experts = _experts(module, name)
            call = _routed(len(experts), experts.dense)
        else:
            continue
        if not fused[0].is_meta:
            _prove(name, module, made, call, fused)
        model.set_submodule(name, made)
        attribute, known = RENAMED.get(type(module).__name__, ("", ""))
        if attribute and parent_name.endswith(f".{attribute}"):
            block, layer = model.get_submodule(parent_name.rpartition(".")[0]), model.get_submodule(parent_name)
            block.add_module(known, block._modules.pop(attribute))
            vars(block)[attribute] = layer  # the block's forward finds it; no list of modules has it twice


def put(model: nn.Module, name: str, made: nn.Module) -> None:
    """`made` in the place of the module `name`, also where its block's forward finds that under another name."""
    old, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    model.set_submodule(name, made)
    for attribute, value in vars(block).items():
        if value is old:
            vars(block)[attribute] = made


def container(module: nn.Module) -> list[nn.Parameter]:
    """The two parameters [E, ., .] of a module that holds all experts of a layer; none of any other."""
    fused = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and min(p.shape) > 1]
    return fused if len(fused) == 2 and len({p.shape[0] for p in fused}) == 1 else []


def parallel(module: nn.Module) -> list[nn.Parameter]:
    """The same of a layer whose two children have one parameter [E, ., .] each (Granite-MoE in transformers 4)."""
    names = ("input_linear", "output_linear")
    if not all(hasattr(module, name) for name in (*names, "router")):
        return []
    weights = [getattr(getattr(module, name), "weight", None) for name in names]
    return [w for w in weights if w is not None] if all(w is not None and w.dim() == 3 for w in weights) else []


def _experts(module: Any, name: str) -> Experts:
    fused = container(module)
    up, down = fused if fused[0].numel() > fused[1].numel() else fused[::-1]
    names = {id(p): n for n, p in module._parameters.items()}
    biases = [module._parameters.get(f"{names[id(p)]}_bias") for p in (up, down)]
    clamped = hasattr(module, "limit") and hasattr(module, "alpha")
    act = Clamped(module.alpha, module.limit) if clamped else Gated(getattr(module, "act_fn", nn.SiLU()))
    made = _split(name, up, down, biases, act, NAMES.get(type(module).__name__, (GATE, UP, DOWN)), clamped)
    made.dense = clamped and metadata.version("transformers").startswith("4.")
    return made


def _mixture(module: Any) -> Mixture:
    act = Gated(module.activation)
    made = _split("", module.input_linear.weight, module.output_linear.weight, [None, None], act, (GATE, UP, DOWN))
    return Mixture(Router(module.router.layer.weight, module.router.top_k), made)


def _split(
    name: str, up: Tensor, down: Tensor, biases: list[Any], act: nn.Module, names: Any, interleaved: bool = False
) -> Experts:
    """up [E, 2I, H] and down [E, H, I], or both transposed; gate and up one after the other, or row by row in turn."""
    transposed = up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]
    if not transposed and not (up.shape[2] == down.shape[1] and up.shape[1] == 2 * down.shape[2]):
        raise ModelError(
            f"{name}: experts of shapes {list(up.shape)} and {list(down.shape)} are not a gate and an up projection "
            f"beside a down projection; such experts are not supported."
        )
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    wide = up.shape[1] // 2
    rows = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(wide), slice(wide, None))
    made = Experts()
    for number in range(len(up)):
        first, second = (None if b is None else b.detach()[number] for b in biases)
        gate, rest = (_linear(up.detach()[number][r], None if first is None else first[r]) for r in rows)
        made.append(Expert(names, gate, rest, _linear(down.detach()[number], second), copy.deepcopy(act)))
    return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(1, 1, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.contiguous(), False)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.contiguous(), False))
    return made


def _routed(count: int, dense: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """Calls a container of `count` experts, or what takes its place, with tokens that choose two of them in turn."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        first = torch.arange(len(x)) % count
        indices = torch.stack((first, (first + 1) % count), dim=1).to(x.device)
        weights = torch.linspace(0.1, 1.0, 2 * len(x)).view(-1, 2).to(x)
        if dense:
            spread = x.new_zeros(len(x), count).scatter(1, indices, weights)
            return m(x.unsqueeze(0), router_indices=indices, routing_weights=spread)[0]
        return m(x, indices, weights)

    return call


@torch.no_grad()
def _prove(
    name: str, old: nn.Module, new: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], fused: list[nn.Parameter]
) -> None:
    """Raise ModelError unless both give the same for tokens of unit variance, at least one for every expert."""
    tokens = max(PROBE_TOKENS, fused[0].shape[0])
    wide = next(int(m.in_features) for m in new.modules() if isinstance(m, nn.Linear))
    x = torch.randn(tokens, wide, generator=torch.Generator().manual_seed(0)).to(fused[0])
    try:
        expected = call(old, x)
    except Exception as error:  # whatever another way of being called makes of these arguments
        raise ModelError(
            f"{name}: {type(old).__name__} does not take tokens, indices and weights ({error}); such experts are not "
            f"supported."
        ) from None
    found = call(new, x)
    off = ((found - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30)).item()
    if not off <= TOLERANCE:
        raise ModelError(
            f"{name}: {type(old).__name__} does not compute what gated experts of its shapes do (relative error "
            f"{off:.2g}); such experts are not supported."
        )
