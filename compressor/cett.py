"""CETT: how small a neuron's contribution must be to be left out, by what its layer's output loses (Luo et al. 2024,
"Sparsing Law"; Zhang et al. 2024, "ReLU² wins").

    contribution of neuron i to y = W x     ‖W_:i‖ |x_i|
    CETT(ε) = mean over tokens of ‖Σ_{contribution ≤ ε} W_:i x_i‖ / ‖W x‖      cumulative error of tail truncation

One CETT for all layers gives each an ε, and neuron i the threshold ε / ‖W_:i‖ on |x_i|: the vector that a SparseLinear
holds. PPL-p % is the largest CETT whose perplexity is at most 1 + p / 100 times the original's, and, as a figure of
sparsity, the share of neurons that it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compressor import sparsity
from compressor.blockwise import placed
from compressor.calibrate import Calibration
from compressor.errors import DataError
from compressor.evaluate import measure, torch_runner
from compressor.model import linears, twin
from compressor.progress import Progress, Silent
from compressor.sparse import SparseLinear
from compressor.sparsity import Activations

LEVELS = 48  # quantiles of the contributions at which CETT is computed; between them it is interpolated
TOKENS = 512  # of the sample, that CETT is the mean over: its standard error is below 1 % of it
JUDGES = 16  # windows that perplexity is measured on, at most
STEPS = 14  # of bisection
CLOSE = 0.9  # of p is near enough to p


@dataclass(frozen=True)
class Curve:
    """Of one layer: CETT, never falling, at shares of its contributions left out; and these, ascending."""

    shares: np.ndarray
    values: np.ndarray
    order: Tensor  # [M] float32
    columns: Tensor  # [K] float32, ‖W_:i‖
    dip: float  # what CETT fell by at most; vectors may cancel

    def threshold(self, cett: float) -> Tensor:
        """[K] float32 at which the layer loses `cett`: 0 at 0, infinite at 1."""
        share = 1.0 if cett >= 1 else float(np.interp(cett, self.values, self.shares))
        return sparsity.thresholds(self.order, self.columns, share)


@dataclass(frozen=True)
class Found:
    """The CETT of all layers, the perplexity's ratio to the original's, and by layer what share of inputs it leaves
    out, both on text that thresholds were not taken from."""

    cett: float
    ratio: float
    left_out: dict[str, float]


def loss_of(weight: Tensor, x: Tensor, bound: Tensor) -> float:
    """CETT of weight [N, K] for inputs x [T, K] without those with |x_i| <= bound [K]."""
    return _loss_of(weight, x, bound, (x @ weight.T).norm(dim=1))


def _loss_of(weight: Tensor, x: Tensor, bound: Tensor, whole: Tensor) -> float:
    """whole [T]: the norms of the outputs."""
    gone = ((x * (x.abs() <= bound)) @ weight.T).norm(dim=1)
    return (gone / whole.clamp_min(torch.finfo(torch.float32).tiny)).mean().item()


def curve(weight: Tensor, x: Tensor) -> Curve:
    """weight [N, K], x [T, K] float32."""
    columns = sparsity.scores(weight, "columns", None)
    order = sparsity.ranked(x, columns)
    shares = np.linspace(0, 1, LEVELS + 1)
    x = x[:TOKENS]
    whole = (x @ weight.T).norm(dim=1)
    raw = np.array([_loss_of(weight, x, sparsity.thresholds(order, columns, s), whole) for s in shares])
    values = np.maximum.accumulate(raw)
    return Curve(shares, values, order, columns, float((values - raw).max()))


def curves(
    model: nn.Module,
    names: Collection[str],
    seen: Calibration,
    progress: Progress = Silent(),
    device: str | torch.device | None = None,
) -> dict[str, Curve]:
    """Of the linears `names`, whose Activations `seen` has; computed on `device`."""
    layers = linears(model)
    progress.stage("cett", len(names))
    made = {}
    for name in names:
        weight = layers[name].weight.detach().float()
        weight = weight.to(device) if device else weight
        made[name] = curve(weight, sparsity.usual(seen.value(name, Activations).to(weight.device)))
        progress.advance()
    return made


def sparse_twin(model: nn.Module, found: Mapping[str, Curve], cett: float, tokens: str) -> nn.Module:
    """A twin of `model` whose linears of `found` lose `cett` of their outputs."""
    made = twin(model)
    for name, one in found.items():
        layer = linears(made)[name]
        threshold = one.threshold(cett).to(layer.weight.device)
        made.set_submodule(name, SparseLinear(layer, threshold, tokens))
    return made


def halves(windows: Tensor) -> tuple[Tensor, Tensor]:
    """What thresholds are taken from, and what they are judged on. Raises DataError."""
    if len(windows) < 2:
        raise DataError("thresholds and perplexity need text of their own: give 2 windows or more.")
    half = (len(windows) + 1) // 2
    return windows[:half], windows[half:][:JUDGES]


def search(
    model: nn.Module,
    found: Mapping[str, Curve],
    windows: Tensor,
    percent: float,
    progress: Progress = Silent(),
    device: str | torch.device | None = None,
) -> Found:
    """The largest CETT whose perplexity on windows [S, L] is at most 1 + percent / 100 times the original's, all tokens
    but the first sparse: by bisection, until it is within CLOSE of that."""
    sparse = sparse_twin(model, found, 0.0, "decode")
    with placed(nn.ModuleList([sparse]), device):
        run = torch_runner(sparse)
        dense = measure(run, windows).losses.mean()
        modules = {name: sparse.get_submodule(name) for name in found}

        def ratio_at(cett: float) -> float:
            for name, module in modules.items():
                module.get_buffer("threshold").copy_(found[name].threshold(cett))
            return (measure(run, windows).losses.mean() - dense).exp().item()

        low, low_ratio, high = 0.0, 1.0, 1.0
        progress.stage(f"perplexity + {percent:g} %", STEPS)
        for step in range(STEPS):
            cett = high if step == 0 else (low + high) / 2  # all of them may do no harm
            ratio = ratio_at(cett)
            if ratio <= 1 + percent / 100:
                low, low_ratio = cett, ratio
                if cett == high or ratio >= 1 + CLOSE * percent / 100:
                    break
            else:
                high = cett
            progress.advance()
        left_out = realised(modules, lambda: ratio_at(low))
    return Found(low, low_ratio, left_out)


def realised(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, float]:
    """The share of inputs, the first token's apart, that each SparseLinear leaves out while `run` runs."""
    gone, every = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)

    def count(name: str, threshold: Tensor):
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][:, 1:]
            gone[name] += int((x.abs() <= threshold).sum())
            every[name] += x.numel()

        return see

    handles = [m.register_forward_pre_hook(count(n, m.get_buffer("threshold"))) for n, m in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: gone[name] / every[name] for name in modules}
