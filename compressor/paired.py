"""Calibration of a model that is being changed, beside the model it was: what each site sees in both.

Blocks run in order, and in each block sites in the order in which it uses them. Once a site's second moments are
complete its linears can be replaced, and everything behind, in the same block too, sees what the new ones compute.
Every site costs a part of a run of both blocks, so this takes about five times as long as a plain calibration.

Left out: experts that a router chooses, because the two models may send a token to different ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress

import torch
from torch import Tensor, nn

from compressor.blockwise import Call, Spool, device_of, first_hidden, placed, record
from compressor.calibrate import Calibration, Site, check_windows, site_order, up_to_last
from compressor.errors import ModelError
from compressor.model import blocks, linears
from compressor.progress import Progress, Silent
from compressor.statistics import CrossGram, Gram

ROUTED = "not every token reaches it, and not the same ones before and after a change; set sequential: false."


@torch.no_grad()
def calibrate_pairs(
    model: nn.Module,
    original: nn.Module,
    windows: Tensor,
    then: Callable[[Calibration], None],
    names: Collection[str] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`then` gets Gram and CrossGram of one site at a time, and may replace that site's linears in `model`.

    original   the same modules before any of them was changed; windows [S, L] int64; names, device and dtype as for
               `calibrate`
    Raises DataError for no tokens, ModelError for models that cannot run block by block or whose linears see different
    tokens in the two.
    """
    check_windows(windows)
    progress = progress or Silent()
    chosen = {name for name in linears(model) if names is None or name in names}
    named, before = up_to_last(blocks(model), chosen), blocks(original)
    kind = torch.device(device or next(model.parameters()).device).type
    with (
        torch.autocast(kind, dtype, enabled=dtype != torch.float32),
        tempfile.TemporaryFile() as ours,
        tempfile.TemporaryFile() as theirs,
    ):
        calls = record(model, windows[0], named) if named else []
        spools = Spool(ours), Spool(theirs)
        for i, window in enumerate(windows if named else ()):
            hidden = first_hidden(model, window, named[0][1])
            for spool in spools:
                spool.write(i, hidden)
        progress.stage("calibrate pairs", len(named))
        for (name, block), (_, old), call in zip(named, before, calls, strict=False):
            with placed(block, device), placed(old, device):
                inside = {n: m for n, m in linears(model).items() if n in chosen and n.startswith(f"{name}.")}
                sites = site_order(block, call, spools[0].read(0), inside)
                if unseen := set(inside) - {n for site in sites for n in site.names}:
                    raise ModelError(f"{min(unseen)}: {ROUTED}")
                for site in sites:
                    found = _moments(site, (model, original), (block, old), call, spools, len(windows))
                    with torch.autocast(kind, enabled=False):
                        then(found)
                for part, spool in zip((block, old), spools, strict=True):
                    for i in range(len(windows)):
                        spool.write(i, call.run(part, spool.read(i).to(device_of(part))).float())
            progress.advance()


def _moments(
    site: Site,
    models: tuple[nn.Module, nn.Module],
    parts: tuple[nn.Module, nn.Module],
    call: Call,
    spools: tuple[Spool, Spool],
    count: int,
) -> Calibration:
    """Of one site, over all windows."""
    own, cross = Gram.start(site.features), CrossGram.start(site.features)
    for i in range(count):
        x, old = (
            _input(model.get_submodule(site.names[0]), part, call, spool.read(i))
            for model, part, spool in zip(models, parts, spools, strict=True)
        )
        if x.shape != old.shape:
            raise ModelError(f"{site.names[0]}: {ROUTED}")
        own.add(x)
        cross.add_pair(x, old)
    return Calibration([site], [], dict.fromkeys(site.names, site), {site: {Gram: own, CrossGram: cross}})


class _Seen(Exception):
    """Ends a block's forward where the input is known."""


def _input(layer: nn.Module, block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """What `layer` gets when its block gets `hidden`: [T, K]."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _Seen

    handle = layer.register_forward_pre_hook(see)
    try:
        with suppress(_Seen):
            call.run(block, hidden.to(device_of(block)))
    finally:
        handle.remove()
    return found[0].float() if found else torch.empty(0, 0)
