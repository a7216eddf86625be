"""What the linears of a model see: running statistics of their inputs, site by site.

The pass itself, its memory and its limits are blockwise.py; the reductions are statistics.py. Which linears share an
input is seen while a block runs, by the identity of the input tensor, so there is no table of families. What is reduced
is what will be rounded: of a linear that rotates its input, the rotated input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import Call, Named, device_of, run_blocks
from compressor.errors import DataError, NumericsError
from compressor.kernels import activations as act
from compressor.layers import hadamard_of
from compressor.mixtures import ExpertUse, MoEView, mixtures
from compressor.model import blocks, linears
from compressor.progress import Progress, Silent
from compressor.statistics import Statistic, TokenAngle

PROBE_TOKENS = 16  # enough for `sites` to run every part of a block

Statistics = dict[type[Statistic], Statistic]


@dataclass(frozen=True)
class Site:
    """One input [.., features] and the linears that read it: {q, k, v}, {gate, up}, {down}, one per expert."""

    names: tuple[str, ...]
    features: int


@dataclass
class Calibration:
    """Statistics by site. `unseen` lists linears that got no token: experts that the router never chose.

    uses: how often each expert was chosen, by the layer that holds it; of layers whose experts are measured.
    """

    sites: list[Site] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    _site_of: dict[str, Site] = field(default_factory=dict, repr=False)
    _statistics: dict[Site, Statistics] = field(default_factory=dict, repr=False)
    uses: dict[str, ExpertUse] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self._site_of

    def seen(self, name: str) -> bool:
        """Whether this linear got at least one token."""
        return bool(self._site_of.get(name) in self._statistics)

    def value(self, name: str, statistic: type[Statistic]) -> Tensor:
        """The statistic of the input of linear `name`.

        An expert that no token chose has that of all experts of its layer together. Of a Gram matrix, one that saw n
        tokens, fewer than its K features, has n / K of its own, which is not of full rank, and the rest of theirs.
        Raises KeyError for a linear or statistic that was not asked for, NumericsError when no expert was chosen.
        """
        site = self._site_of[name]
        own = self._statistics[site][statistic] if site in self._statistics else None
        share = 1.0 if own is None else min(1.0, own.tokens / site.features)
        if own is not None and share == 1:
            return own.value()
        siblings = [s for s in self._statistics if _pattern(s.names[0]) == _pattern(site.names[0])]
        if own is None:
            return self._merged(siblings, site, statistic)
        if len(siblings) == 1 or not statistic.singular:
            return own.value()
        return own.value().mul_(share).add_(self._merged(siblings, site, statistic), alpha=1 - share)

    def together(self, names: Collection[str], statistic: type[Statistic]) -> Tensor:
        """The statistic of all that several linears of one width read, such as the experts behind a norm.

        An expert that got no token adds nothing. Raises as `value` does.
        """
        sites = dict.fromkeys(self._site_of[name] for name in names)
        return self._merged([s for s in sites if s in self._statistics], next(iter(sites)), statistic)

    def _merged(self, seen: list[Site], wanted: Site, statistic: type[Statistic]) -> Tensor:
        merged = statistic.start(wanted.features)
        for site in seen:
            merged.merge(self._statistics[site][statistic])
        if not merged.tokens:
            raise NumericsError(
                f"{wanted.names[0]}: no calibration token reached it; use more windows, or ignore the layer."
            )
        return merged.value()


def calibrate(
    model: nn.Module,
    windows: Tensor,
    needs: Iterable[type[Statistic]],
    names: Collection[str] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """Run windows [S, L] int64 through the model's blocks and reduce what its linears see.

    needs    statistics of every site's input; each is reduced once per site
    names    the linears to measure; None means all of `linears(model)`
    device   where blocks run, each moved there and back; None leaves everything where it is
    Raises DataError for no tokens, ModelError for a model that cannot run block by block, NumericsError for NaN or Inf
    in an input.
    """
    parts: list[Calibration] = []
    calibrate_blocks(model, windows, needs, parts.append, names, progress, device, dtype)
    return Calibration(
        [site for part in parts for site in part.sites],
        [name for part in parts for name in part.unseen],
        {name: site for part in parts for name, site in part._site_of.items()},
        {site: values for part in parts for site, values in part._statistics.items()},
        {name: use for part in parts for name, use in part.uses.items()},
    )


def calibrate_blocks(
    model: nn.Module,
    windows: Tensor,
    needs: Iterable[type[Statistic]],
    then: Callable[[Calibration], None],
    names: Collection[str] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    sequential: bool = False,
    angles: dict[str, TokenAngle] | None = None,
) -> None:
    """Like `calibrate`, but `then` gets each block's part as soon as it is complete, and only one part is held.

    sequential   `then` may replace linears of the block; the blocks behind it see what the replaced ones compute
    angles       filled with what each block that runs turns the residual stream by
    """
    check_windows(windows)
    chosen = {name: m for name, m in linears(model).items() if names is None or name in names}
    wanted = set(needs)
    named = up_to_last(blocks(model), chosen)
    if not named:
        return
    gathering = _Gathering({}, wanted)

    def listen(block: str) -> AbstractContextManager[None]:
        nonlocal gathering
        if gathering.block != block:
            inside = {name: m for name, m in chosen.items() if name.startswith(f"{block}.")}
            gathering = _Gathering(inside, wanted, block, mixtures(model, f"{block}.") if wanted else {})
        if angles is None:
            return gathering.listen()
        return _both(gathering.listen(), _turning(model.get_submodule(block), angles.setdefault(block, TokenAngle())))

    run_blocks(
        model,
        windows,
        named,
        listen,
        progress or Silent(),
        device,
        dtype,
        after=lambda _: then(gathering.result()),
        sequential=sequential,
    )


def check_windows(windows: Tensor) -> None:
    """Raises DataError for what is not [S, L] with a token in it."""
    if windows.dim() != 2 or not windows.numel():
        raise DataError(f"calibration windows must be [S, L] with S, L >= 1, got {list(windows.shape)}.")


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, several times as fast as float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = {"avx512_bf16", "amx_bf16"} & {name for name, has in torch.cpu.get_capabilities().items() if has}
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def sites(model: nn.Module) -> list[Site]:
    """Which linears of the model share an input, found with a few random tokens; needs no data."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    return calibrate(model, tokens, ()).sites


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


@contextmanager
def _turning(block: nn.Module, angle: TokenAngle) -> Iterator[None]:
    """Around one forward of the block."""

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, y = args[0] if args else kwargs["hidden_states"], out if isinstance(out, Tensor) else out[0]
        angle.add(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    handle = block.register_forward_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def site_order(block: nn.Module, call: Call, hidden: Tensor, chosen: Mapping[str, nn.Linear]) -> list[Site]:
    """The sites of one block in the order in which it uses them; `hidden` [1, L, H] is what it gets.

    Linears of `chosen` that see no token are in none.
    """
    gathering = _Gathering(dict(chosen), set())
    with torch.no_grad(), gathering.listen():
        call.run(block, hidden.to(device_of(block)))
    return [Site(tuple(names), chosen[names[0]].in_features) for names in gathering.members]


class _Gathering:
    """Groups the inputs of one block's chosen linears by identity while it runs, and reduces each group once."""

    def __init__(
        self,
        chosen: dict[str, nn.Linear],
        needs: set[type[Statistic]],
        block: str = "",
        views: Mapping[str, MoEView] = MappingProxyType({}),
    ):
        self.chosen, self.needs, self.block = chosen, needs, block
        self.views = {n: view for n, view in views.items() if any(c.startswith(f"{view.container}.") for c in chosen)}
        self.uses = {name: ExpertUse(view) for name, view in self.views.items()}
        self.members: list[list[str]] = []  # linears of each site
        self.statistics: list[Statistics] = []
        self.site_of: dict[str, int] = {}

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Around one forward of the block. Inputs stay alive until its end, so that an id means one tensor."""
        inputs: dict[tuple[int, int], tuple[Tensor, list[str]]] = {}

        def hook(name: str):
            def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs.setdefault((id(args[0]), hadamard_of(layer)), (args[0], []))[1].append(name)

            return see

        mixed: list[tuple[str, Tensor]] = []

        def arrive(name: str):
            return lambda _, args, kwargs: mixed.append((name, args[0] if args else next(iter(kwargs.values()))))

        handles = [m.register_forward_pre_hook(hook(name)) for name, m in self.chosen.items()]
        handles += [
            view.module.register_forward_pre_hook(arrive(name), with_kwargs=True) for name, view in self.views.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for (_, block), (x, names) in inputs.items():
            self._reduce(names, (act.rotate(x, block) if block else x).reshape(-1, x.shape[-1]))
        for name, x in mixed:
            self.uses[name].add(x.reshape(-1, x.shape[-1]))

    def _reduce(self, names: list[str], x: Tensor) -> None:
        """x [T, K] was the input of all of `names`."""
        if not len(x):
            return
        # The sum is one pass and catches NaN and Inf; the exact test only settles an overflow of the sum itself.
        if not math.isfinite(x.sum().item()) and not x.isfinite().all():
            raise NumericsError(f"{names[0]}: NaN or Inf in its input during calibration; check the weights before it.")
        site = next((self.site_of[n] for n in names if n in self.site_of), len(self.members))
        if site == len(self.members):
            self.members.append([])
            self.statistics.append({kind: kind.start(x.shape[-1]) for kind in self.needs})
        for name in names:
            if self.site_of.setdefault(name, site) == site and name not in self.members[site]:
                self.members[site].append(name)
        for statistic in self.statistics[site].values():
            statistic.add(x)

    def result(self) -> Calibration:
        order = {name: i for i, name in enumerate(self.chosen)}
        unseen = [name for name in self.chosen if name not in self.site_of]
        groups = self.members + self._by_analogy(unseen)
        found = [Site(tuple(sorted(g, key=order.__getitem__)), self.chosen[g[0]].in_features) for g in groups]
        return Calibration(
            sorted(found, key=lambda site: order[site.names[0]]),
            unseen,
            {name: site for site in found for name in site.names},
            dict(zip(found, self.statistics, strict=False)),  # the unseen sites, at the end, have none
            self.uses,
        )

    def _by_analogy(self, unseen: list[str]) -> list[list[str]]:
        """Linears that got no token, grouped as the same linears of a sibling expert are."""
        sibling = {_pattern(name): number for name, number in self.site_of.items()}
        groups: dict[tuple[str, int | str], list[str]] = {}
        for name in unseen:
            expert = name.rpartition(".")[0]
            groups.setdefault((expert, sibling.get(_pattern(name), name)), []).append(name)
        return list(groups.values())


def _pattern(name: str) -> str:
    """An expert's linear with the expert's number left open, 'layers.0.experts.3.w1' -> 'layers.0.experts.*.w1'; other
    names, which hold no number but the block's, as they are."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(numbers) > 1:
        parts[numbers[-1]] = "*"
    return ".".join(parts)


def up_to_last(named: Named, chosen: Collection[str]) -> Named:
    """The blocks up to the last one that holds a chosen linear or layer: later ones need not run."""
    used = [i for i, (name, _) in enumerate(named) if any(n.startswith(f"{name}.") for n in chosen)]
    return named[: used[-1] + 1] if used else []
