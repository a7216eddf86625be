"""Runs a model with trial sparsities: what the searches of sparsity_search.py look at.

A trial is made of the layers that the artifact will have, every token but the first of a window sparse. Greedy runs one
block on what it gets in the dense model, a search over all layers the whole model: the mean over tokens of
KL(dense ‖ sparse), of an encoder 1 − cosine of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import device_of, first_hidden, forward, placed, record
from compressor.errors import NumericsError
from compressor.model import blocks, twin
from compressor.run import Run
from compressor.sparse import SparseLinear, everywhere
from compressor.sparsity import Choices
from compressor.sparsity_search import evolve, greedy, trials

ROUNDS = 2  # of settling
OCTAVES, STEPS = 16, 256  # of a histogram of inputs around their thresholds, and its bins an octave: 0.3 % of a value

# (name, choice) -> the layer; called where the layer's block is.
Build = Callable[[str, Choices], SparseLinear]


class Trial:
    """A twin of a model in which any choices can be put; only layers whose choice is new are made."""

    def __init__(self, model: nn.Module, build: Build):
        self.model, self.build = twin(model), build
        self.held: dict[str, Choices] = {}
        self.dense: dict[str, nn.Module] = {}

    def put(self, choices: Mapping[str, Choices]) -> None:
        for name, choice in choices.items():
            if self.held.get(name) != choice:
                self.dense.setdefault(name, self.model.get_submodule(name))
                self.model.set_submodule(name, self.build(name, choice))
                self.held[name] = choice

    def clear(self) -> None:
        """The dense layers again."""
        for name, layer in self.dense.items():
            self.model.set_submodule(name, layer)
        self.dense, self.held = {}, {}


@torch.no_grad()
def greedy_blocks(
    model: nn.Module, first: Mapping[str, Choices], sizes: Mapping[str, int], build: Build, windows: Tensor, run: Run
) -> dict[str, Choices]:
    """What `greedy` finds for each block, which keeps the share that `first` gives it; alphas stay.

    windows [S, L] wait in memory, one block at a time is on the run's device.
    """
    trial = Trial(model, build)
    named = blocks(trial.model)
    calls = record(trial.model, windows[0], named)
    hidden = [first_hidden(trial.model, window, named[0][1]) for window in windows]
    found: dict[str, Choices] = {}
    errors = torch.zeros(2, dtype=torch.float64)
    run.progress.stage("search", len(named))
    for (name, block), call in zip(named, calls, strict=True):
        inside = {n: choice for n, choice in first.items() if n.startswith(f"{name}.")}
        with placed(block, run.device):
            given = [h.to(device_of(block)) for h in hidden]
            dense = [call.run(block, h.clone()) for h in given]
            if inside:

                def error(choices: Mapping[str, Choices], block=block, call=call, given=given, dense=dense) -> float:
                    trial.put(choices)
                    with everywhere():
                        outs = [call.run(block, x.clone()) for x in given]
                    return sum(
                        (y - z).square().sum(dtype=torch.float64).item() for y, z in zip(outs, dense, strict=True)
                    )

                chosen, equal, best = _greedy_block(inside, sizes, error)
                found |= chosen
                errors += torch.tensor([equal, best])
                trial.clear()
        hidden = [y.to(h.device) for y, h in zip(dense, hidden, strict=True)]
        run.progress.advance()
    equal, best = errors.tolist()
    run.progress.note(
        f"greedy: the squared error of the blocks' outputs is {best / equal if equal else 1:.3f} of that of equal "
        f"sparsities inside each block"
    )
    return found


def _greedy_block(
    first: Mapping[str, Choices], sizes: Mapping[str, int], error: Callable[[Mapping[str, Choices]], float]
) -> tuple[dict[str, Choices], float, float]:
    """The choices of one block's layers, and the errors of equal sparsities and of these."""
    weights = [sizes[n] for n in first]
    share = sum(c.sparsity * w for c, w in zip(first.values(), weights, strict=True)) / sum(weights)

    def named(sparsities: Sequence[float]) -> dict[str, Choices]:
        return {n: replace(c, sparsity=s) for (n, c), s in zip(first.items(), sparsities, strict=True)}

    chosen = named(greedy(weights, share, lambda sparsities: error(named(sparsities))))
    return chosen, error(named([share] * len(first))), error(chosen)


@torch.no_grad()
def evolved(
    model: nn.Module,
    first: Mapping[str, Choices],
    sizes: Mapping[str, int],
    build: Build,
    windows: Tensor,
    run: Run,
    generator: torch.Generator,
    population: int,
    generations: int,
    alphas: bool,
) -> dict[str, Choices]:
    """What `evolve` finds from `first`. The whole model is on the run's device, and the dense one's log-probabilities
    of windows [S, L] in float16: 50 MB for 512 tokens of 49152 words."""
    trial = Trial(model, build)
    run.progress.stage("search", trials(population, generations) * len(windows))
    with placed(trial.model, run.device):
        dense = [_kept(forward(trial.model, window)).half() for window in windows]

        def cost(choices: Mapping[str, Choices]) -> float:
            trial.put(choices)
            total = 0.0
            for window, wanted in zip(windows, dense, strict=True):
                with everywhere():
                    total += _distance(wanted, forward(trial.model, window))
                run.progress.advance()
            if total != total:
                raise NumericsError("r_sparse: a trial of the search gives NaN; check the model's weights.")
            return total / len(windows)

        chosen, history = evolve(first, sizes, cost, generator, population, generations, alphas, _groups(model, first))
    run.progress.note(
        f"evolutionary: KL {history[0]:.4f} at the start, {history[-1]:.4f} in {len(history) - 2} generations"
    )
    return chosen


@torch.no_grad()
def settle(model: nn.Module, wanted: Mapping[str, float], windows: Tensor, run: Run) -> None:
    """Scale thresholds of SparseLinears so that each leaves out the share `wanted` of its inputs in the sparse model.

    What layers before leave out makes inputs smaller, so thresholds of the dense model's inputs leave out more than
    they were to: 0.52 where 0.5 was asked. A histogram of log2(|x_j| / threshold_j) a layer, for all tokens of windows
    [S, L] but the first, says by which one factor its thresholds must change; that changes what comes behind, so twice.
    """
    layers: dict[str, Any] = {n: model.get_submodule(n) for n, share in wanted.items() if 0 < share < 1}
    run.progress.stage("settle", ROUNDS * len(windows))
    for _ in range(ROUNDS if layers else 0):
        counts = {name: torch.zeros(OCTAVES * STEPS, dtype=torch.long) for name in layers}

        def see(layer: SparseLinear, args: tuple[Tensor, ...], counts: Tensor) -> None:
            x = args[0][..., 1:, :] if args[0].dim() > 2 else args[0]
            octave = (x.float().abs() / layer.get_buffer("threshold")).log2().nan_to_num(nan=-OCTAVES)
            places = ((octave + OCTAVES / 2) * STEPS).ceil().clamp(0, len(counts) - 1).long()
            counts += torch.bincount(places.flatten(), minlength=len(counts)).cpu()

        handles = [m.register_forward_pre_hook(partial(see, counts=counts[n])) for n, m in layers.items()]
        try:
            with placed(model, run.device), everywhere():
                for window in windows:
                    forward(model, window)
                    run.progress.advance()
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in layers.items():
            shares = counts[name].cumsum(0) / counts[name].sum()
            place = int(torch.searchsorted(shares, wanted[name]))
            layer.threshold.mul_(2.0 ** (place / STEPS - OCTAVES / 2))


def _groups(model: nn.Module, names: Collection[str]) -> list[set[str]]:
    """The layers of one block, and those that are called alike in all blocks."""
    inside = [{n for n in names if n.startswith(f"{block}.")} for block, _ in blocks(model)]
    alike = [
        {n for n in names if n.rpartition(".")[2] == kind} for kind in sorted({n.rpartition(".")[2] for n in names})
    ]
    return [group for group in (*inside, *alike) if group]


def _kept(out: Any) -> Tensor:
    """Log-probabilities [L, V], or hidden states [L, H] of an encoder as they are."""
    if hasattr(out, "logits"):
        return torch.log_softmax(out.logits[0].float(), -1)
    return out.last_hidden_state[0].float()  # type: ignore[no-any-return]


def _distance(dense: Tensor, out: Any) -> float:
    """Mean over tokens of KL, or of 1 − cosine; dense [L, V] or [L, H] is what `_kept` gave."""
    ours, dense = _kept(out), dense.float()
    if hasattr(out, "logits"):
        return (dense.exp() * (dense - ours)).sum(-1).mean().item()
    return 1 - torch.cosine_similarity(dense, ours, dim=-1).mean().item()
