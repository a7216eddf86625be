"""A forward pass over many windows that runs one block at a time: what calibration rides on.

Windows go through one block, one window at a time, and their hidden states wait in a temporary file between blocks.
Beyond the weights, memory holds one block's activations of one window, however many windows there are. How a block is
called (masks, positions, per block) is recorded from a plain forward, so there is no table of families.

`sequential` runs each block twice: first to be measured, then, once `after` has changed it, to give the next block
what the compressed one computes.

Windows have one length and no padding, so that what a block gets besides hidden states is the same for all of them.
This is checked on two windows, and so is that each block gets the previous one's output: a model that breaks either is
refused, not measured wrongly.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError, ModelError
from compressor.progress import Progress

SAME = 1e-3  # relative; a plain and a block-wise forward differ by rounding, 1e-6 or so
SAMPLE = 256  # values of a hidden state that are compared
UNSUPPORTED = "models that cannot run block by block are not supported."
HIDDEN = object()  # stands for the hidden states in a recorded call

Named = list[tuple[str, nn.Module]]


@dataclass
class Call:
    """How the model calls one block: everything but the hidden states, and a sample and the shape of those."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sample: Tensor
    shape: torch.Size

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args = (hidden if a is HIDDEN else a for a in self.args)
        kwargs = {k: hidden if v is HIDDEN else v for k, v in self.kwargs.items()}
        out = block(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def run_blocks(
    model: nn.Module,
    windows: Tensor,
    named: Named,
    around: Callable[[str], AbstractContextManager[None]],
    progress: Progress,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    after: Callable[[str], None] = lambda name: None,
    sequential: bool = False,
) -> None:
    """Run windows [S, L] through the first len(named) blocks; `around(block name)` is entered for each block forward.

    after: called with a block's name once all windows have been through it, while it is still on `device`.
    sequential: what `after` did to a block is seen by the blocks behind it; every block runs a second time.
    dtype: what matrix products are computed in (autocast); hidden states and statistics stay float32.
    device: where blocks run, each moved there and back; None leaves everything where it is. Raises ModelError.
    """
    kind = torch.device(device).type if device is not None else next(model.parameters()).device.type
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        calls = record(model, windows[0], named)
        if len(windows) > 1:
            again = record(model, windows[-1], named)
            for (name, _), a, b in zip(named, calls, again, strict=True):
                if not _equal((a.args, a.kwargs), (b.args, b.kwargs)):
                    raise ModelError(f"{name}: its arguments besides hidden states depend on the text; {UNSUPPORTED}")
        with tempfile.TemporaryFile(prefix="compressor-") as file:
            spool = _Spool(file)
            for i, window in enumerate(windows):
                spool.write(i, _first_hidden(model, window, named[0][1]))
            progress.stage("calibrate", len(named) * len(windows) * (2 if sequential else 1))
            changed = False
            for (name, block), call in zip(named, calls, strict=True):
                home = next((p.device for p in block.parameters()), torch.device("cpu"))
                target = home if device is None else torch.device(device)
                block.to(target)
                args, kwargs = _move(call.args, target), _move(call.kwargs, target)
                moved = replace(call, args=args, kwargs=kwargs)
                for i in range(len(windows)):
                    hidden = spool.read(i)
                    if i == 0 and not changed:
                        _require_same(name, _sample(hidden), call.sample)
                    with around(name):
                        hidden = moved.run(block, hidden.to(target)).float()
                    if not sequential:
                        spool.write(i, hidden)
                    progress.advance()
                after(name)
                if sequential:
                    changed = True  # from here on inputs are those of the compressed prefix, not the recorded ones
                    for i in range(len(windows)):
                        spool.write(i, moved.run(block, spool.read(i).to(target)).float())
                        progress.advance()
                block.to(home)


def record(model: nn.Module, window: Tensor, named: Named) -> list[Call]:
    """One plain forward of window [L], noting how each block is called. Raises ModelError."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if name in calls or not isinstance(hidden, Tensor):
                raise ModelError(f"{name}: called more than once or without hidden states; {UNSUPPORTED}")
            calls[name] = Call(
                tuple(HIDDEN if a is hidden else _without_cache(a) for a in args),
                {k: HIDDEN if v is hidden else _without_cache(v) for k, v in kwargs.items()},
                _sample(hidden),
                hidden.shape,
            )

        return hook

    handles = [block.register_forward_pre_hook(note(name), with_kwargs=True) for name, block in named]
    try:
        _forward(model, window)
    finally:
        for handle in handles:
            handle.remove()
    if absent := [name for name, _ in named if name not in calls]:
        raise ModelError(f"{absent[0]}: a plain forward does not call this block; {UNSUPPORTED}")
    return [calls[name] for name, _ in named]


class _Stop(Exception):
    """Ends a forward at the first block."""


def _first_hidden(model: nn.Module, window: Tensor, block: nn.Module) -> Tensor:
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        _forward(model, window)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _forward(model: Any, window: Tensor) -> None:
    base = getattr(model, "base_model", model)  # without the head, whose logits would be the largest tensor of all
    tokens = window.unsqueeze(0).to(model.get_input_embeddings().weight.device)
    takes_cache = "use_cache" in inspect.signature(base.forward).parameters
    base(input_ids=tokens, **({"use_cache": False} if takes_cache else {}))


def _without_cache(value: Any) -> Any:
    """Nothing in place of a key-value cache, which would grow from window to window."""
    return None if hasattr(value, "get_seq_length") else value


class _Spool:
    """Hidden states [1, L, H] of every window in a file; a block's output takes its input's place."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.shape = torch.Size()
        self.dtype = torch.float32

    def write(self, i: int, hidden: Tensor) -> None:
        self.shape, self.dtype = hidden.shape, hidden.dtype
        data = hidden.cpu().contiguous().view(torch.uint8).numpy()
        try:
            self.file.seek(i * data.nbytes)
            self.file.write(data.data)
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: no room for the calibration's hidden states ({error.strerror}); free "
                f"{data.nbytes} bytes a window, or use fewer windows."
            ) from None

    def read(self, i: int) -> Tensor:
        hidden = torch.empty(self.shape, dtype=self.dtype)
        data = hidden.view(torch.uint8).numpy()
        self.file.seek(i * data.nbytes)
        count = self.file.readinto(data.data)  # type: ignore[attr-defined]
        assert count == data.nbytes, f"window {i}: read {count} of {data.nbytes} bytes"
        return hidden


def _sample(hidden: Tensor) -> Tensor:
    values = hidden.detach().flatten()
    return values[:: max(1, len(values) // SAMPLE)].float().cpu().clone()


def _require_same(name: str, found: Tensor, expected: Tensor) -> None:
    # NaN and Inf are left to whoever listens, who can name the layer.
    if expected.isfinite().all() and found.isfinite().all() and (found - expected).norm() > SAME * expected.norm():
        raise ModelError(f"{name}: its input is not the previous block's output; {UNSUPPORTED}")


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or bool(a == b)
