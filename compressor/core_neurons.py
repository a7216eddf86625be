"""Decode with the feed-forward neurons of one sentence only: Wang et al. 2024, "CoreInfer", as a mode of a torch model.

    with core_neurons(model, share=0.4) as core:
        model.generate(ids)

A neuron is a channel between gate/up and down. The prompt runs dense and gives each neuron a score; then its core, the
best `share` of each layer, is gathered once, and every decoded token is multiplied with these smaller dense weights: no
mask, no predictor, no kernel. Every `refresh` tokens a few run dense again, and layers whose core has changed gather
anew. Nothing is trained or stored, and the model is what it was afterwards.

    contribution   Σ_t |a_n(t)| ‖Wd_:n‖        what leaving n out would take away, whatever its sign
    positive       how often a_n(t) is among the token's largest positive ones, Wang et al.'s

A neuron outside the core gives nothing, or with `fill` "mean" what it gave in the mean of the prompt's tokens: all of
them together are one bias, W_d ā (An et al. 2024, "FLAP", who do so in pruning).

One sentence at a time: two have different cores. All weights stay in memory; the gathered ones come on top.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.mixtures import mixtures
from compressor.model import blocks
from compressor.prunable import Prunable, find_prunable

PROBES = 8  # tokens that run dense for a refresh: 6 % of the decoded ones at 128
SAME = 0.8  # Jaccard index of two cores of a layer, from which on they count as one
TOKEN_SHARE = 0.4  # of a token's positive activations, which `positive` counts: Wang et al.'s alpha

Fill = Literal["zero", "mean"]
Score = Literal["contribution", "positive"]


def contribution(x: Tensor, norms: Tensor) -> Tensor:
    """Σ_t |x_tn| ‖Wd_:n‖, [D] float32, of the down projection's input x [T, D] and column norms [D]."""
    return x.abs().sum(0, dtype=torch.float32) * norms


def positive(x: Tensor) -> Tensor:
    """[D] float32: for how many tokens of x [T, D] a neuron is among the k largest, k a share of how many are positive
    in the mean."""
    count = round(TOKEN_SHARE * (x > 0).sum(1).float().mean().item())
    return torch.bincount(x.topk(count, 1).indices.flatten(), minlength=x.shape[1]).float()


def energy(x: Tensor, norms: Tensor) -> Tensor:
    """Σ_t (x_tn ‖Wd_:n‖)², [D] float32: what a choice of neurons retains of this is how it is judged."""
    return (x.float() * norms).square().sum(0)


def size_of(neurons: int, share: float, multiple: int) -> int:
    """How many of a layer's neurons are its core: a share, to the nearest multiple."""
    return min(neurons, multiple * max(1, round(share * neurons / multiple)))


class Layer:
    """The core of one feed-forward layer, and its linears with all their weights and with the core's."""

    def __init__(self, model: nn.Module, what: Prunable, share: float, score: Score, fill: Fill, multiple: int):
        self.name, self.rule = what.readers[0], score
        self.readers: list[Any] = [model.get_submodule(n) for n in what.readers]
        self.size = size_of(what.units, share, multiple)
        squares = sum(r.weight.detach().float().square().sum(0) for r in self.readers)
        self.norms: Tensor = squares.sqrt()  # type: ignore[union-attr]
        # (module, name of the parameter, its axis of neurons, the neuron of each place there, all of it, the core's)
        self.parts: list[tuple[nn.Module, str, int, Tensor, nn.Parameter, nn.Parameter]] = []
        sides = [(r, 1, what.columns) for r in self.readers]
        sides += [(model.get_submodule(n), 0, units) for n, units in what.rows.items()]
        for module, axis, units in sides:
            for name, whole in module.named_parameters(recurse=False):
                if axis < whole.dim():
                    shape = list(whole.shape)
                    shape[axis] = shape[axis] // what.units * self.size
                    small = nn.Parameter(whole.new_empty(shape), False)
                    self.parts.append((module, name, axis, units.to(whole.device), whole, small))
        self.plain = all(torch.equal(units.cpu(), torch.arange(what.units)) for _, _, _, units, _, _ in self.parts)
        # (module, all of its weight, its bias, the core's with what the other neurons give in the mean)
        self.biases: list[tuple[nn.Linear, Tensor, nn.Parameter | None, nn.Parameter]] = []
        if fill == "mean" and self.size < what.units:
            for r in self.readers:
                self.biases.append(
                    (r, r.weight.detach(), r.bias, nn.Parameter(r.weight.new_empty(r.out_features), False))
                )
        self.forget()

    def forget(self) -> None:
        """A new sentence begins."""
        self.score: Tensor | None = None  # [D], and the mean of what the down projection reads [D]
        self.mean: Tensor | None = None
        self.chosen: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self.fresh, self.sums, self.seen = torch.zeros_like(self.norms), torch.zeros_like(self.norms), 0

    def look(self, x: Tensor) -> None:
        """x [T, D] is what the down projection reads of T more tokens."""
        self.fresh += contribution(x, self.norms) if self.rule == "contribution" else positive(x)
        self.sums += x.sum(0, dtype=torch.float32)
        self.seen += len(x)

    def choose(self) -> bool:
        """Settle the core by all that was seen, half of it by what came last; whether weights were gathered."""
        if not self.seen:
            return False
        score, mean = self.fresh / self.seen, self.sums / self.seen
        self.score = score if self.score is None else (self.score + score) / 2
        self.mean = mean if self.mean is None else (self.mean + mean) / 2
        self._clear()
        best = self.score.topk(self.size).indices.sort().values
        if self.chosen is not None:
            common = torch.isin(best, self.chosen).sum().item()
            if common >= SAME * (2 * self.size - common):
                return False
        self.chosen = best
        for _, _, axis, units, whole, small in self.parts:
            places = best if self.plain else torch.isin(units, best).nonzero()[:, 0]
            torch.index_select(whole.detach(), axis, places, out=small.data)
        rest = self.mean.index_fill(0, best, 0.0)
        for _, weight, bias, filled in self.biases:
            given = weight @ rest.to(weight.dtype)
            filled.data.copy_(given if bias is None else given + bias.detach())
        return True

    def use(self, core: bool) -> None:
        """Have the linears multiply with the core's weights, or with all of them."""
        for module, name, _, _, whole, small in self.parts:
            module._parameters[name] = small if core else whole
        for reader, _, bias, filled in self.biases:
            reader._parameters["bias"] = filled if core else bias


class Core:
    """What `core_neurons` gives: its layers, and what happened so far.

    gathers    how often the layers' weights were gathered, all layers counted
    gather_s   how long the last choice of all layers took, seconds
    """

    def __init__(self, layers: list[Layer], refresh: int | None):
        self.layers, self.refresh = layers, refresh
        self.gathers, self.gather_s = 0, 0.0
        self._decoded = self._probes = 0
        self._core = self._skip = self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Text of several tokens behind a prompt runs on its core too, as if decoded: to measure quality in one go."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of each call of the model: which weights it will use."""
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        if len(given) != 1:
            raise ModelError(f"core neurons are of one sentence, and {len(given)} were given; generate one at a time.")
        cache = kwargs.get("past_key_values")
        start = cache is None or not cache.get_seq_length()
        if start:
            self._decoded = self._probes = 0
            for layer in self.layers:
                layer.forget()
        length = given.shape[1]
        if start or (length > 1 and not self._held):
            # What a first token has in it is like no other's, and it is never decoded.
            return self._run(core=False, skip=start and length > 1)
        probing = self.refresh is not None and self._decoded >= self.refresh and not self._held
        if probing and self._probes < PROBES:
            self._probes += 1
            return self._run(core=False)
        if probing or self.layers[0].seen:
            self._decoded = self._probes = 0
            began = time.perf_counter()
            self.gathers += sum([layer.choose() for layer in self.layers])
            self.gather_s = time.perf_counter() - began
        self._decoded += length
        self._run(core=True)

    def _run(self, core: bool, skip: bool = False) -> None:
        """core: on the cores, else dense, and every token but one to `skip` at the beginning is looked at."""
        if core != self._core:
            for layer in self.layers:
                layer.use(core)
        self._core, self._skip = core, skip

    def seeing(self, layer: Layer) -> Any:
        """A hook for the layer's down projection."""

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not self._core:
                layer.look(args[0].detach().reshape(-1, args[0].shape[-1])[int(self._skip) :])

        return see


@contextmanager
def core_neurons(
    model: nn.Module,
    share: float = 0.4,
    *,
    score: Score = "contribution",
    fill: Fill = "mean",
    refresh: int | None = 128,
    multiple: int = 64,
    within: Collection[int] | None = None,
) -> Iterator[Core]:
    """Inside, `model` decodes with the core neurons of each prompt; it needs a key-value cache, as generate has.

    share      of each layer's neurons, to the nearest `multiple`
    score, fill   how they are chosen, and what stands for the others: above
    refresh    tokens after which a few run dense to see whether the core has changed; None: never
    within     numbers of the blocks to which it applies; None: all
    Raises ModelError for experts, for a model without feed-forward layers whose neurons can be told apart, and for
    more than one sentence; ValueError for a share that is none.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share:g} of the neurons must be above 0 and at most 1")
    if refresh is not None and refresh < 1:
        raise ValueError(f"refresh {refresh} is no number of tokens; give 1 or more, or None for never")
    if mixtures(model):
        raise ModelError(
            f"{type(model).__name__} has experts, which see few tokens of a prompt: core neurons do not fit."
        )
    inside = tuple(f"{n}." for i, (n, _) in enumerate(blocks(model)) if within is None or i in within)
    with torch.inference_mode(False):  # what is found is found by derivatives, and the core's weights outlive the mode
        found = [w for w in find_prunable(model) if w.kind == "ffn" and w.readers[0].startswith(inside)]
        layers = [Layer(model, what, share, score, fill, multiple) for what in found]
    if not layers:
        raise ModelError(
            f"{type(model).__name__}: no feed-forward layer of plain linears was found in the blocks asked for."
        )
    core = Core(layers, refresh)
    handles = [layer.readers[0].register_forward_pre_hook(core.seeing(layer)) for layer in layers]
    handles.append(model.register_forward_pre_hook(core.before, with_kwargs=True))
    try:
        yield core
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.use(core=False)
