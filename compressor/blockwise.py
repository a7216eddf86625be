"""A forward pass over many windows that runs one block at a time: what calibration rides on.

Windows go through one block, one window at a time, and their hidden states wait in a temporary file between blocks.
Beyond the weights, memory holds one block's activations of one window, however many windows there are; a device other
than the weights' holds one block at a time. How a block is called (masks, positions, per block) is recorded from a
forward in which stand-ins take the blocks' places, so there is no table of families and nothing is computed twice.

`sequential` runs each block twice: first to be measured, then, once `after` has changed it, to give the next block
what the compressed one computes.

Windows have one length and no padding, so that what a block gets besides hidden states is the same for all of them.
This is checked on two windows, and so is that each block gets the previous one's output: a model that breaks either is
refused, not measured wrongly.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError, ModelError
from compressor.parts import blocks
from compressor.progress import Progress

UNSUPPORTED = "models that cannot run block by block are not supported."
HIDDEN = object()  # stands for the hidden states in a recorded call

Named = list[tuple[str, nn.Module]]


@dataclass
class Call:
    """How the model calls one block: everything but the hidden states, whose shape it has, and what comes with them.

    rest   what the block gives after its hidden states, None where it gives nothing but those
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size
    rest: tuple[Any, ...] | None = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden [1, L, H] on the block's device -> the same."""
        out = self._call(block, hidden)
        return out if isinstance(out, Tensor) else out[0]

    def _call(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        device = hidden.device
        args = (hidden if a is HIDDEN else move(a, device) for a in self.args)
        kwargs = {k: hidden if v is HIDDEN else move(v, device) for k, v in self.kwargs.items()}
        return block(*args, **kwargs)

    def given(self, hidden: Tensor) -> Any:
        """`hidden` as the block would give it."""
        return hidden if self.rest is None else (hidden, *self.rest)


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
    kind = torch.device(device or next(model.parameters()).device).type
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32), tempfile.TemporaryFile() as file:
        calls = record(model, windows[0], named)
        if len(windows) > 1:
            again = record(model, windows[-1], named)
            for (name, _), a, b in zip(named, calls, again, strict=True):
                if not _equal((a.args, a.kwargs), (b.args, b.kwargs)):
                    raise ModelError(f"{name}: its arguments besides hidden states depend on the text; {UNSUPPORTED}")
        spool = Spool(file)
        for i, window in enumerate(windows):
            spool.write(i, first_hidden(model, window, named[0][1]))
        progress.stage("calibrate", len(named) * len(windows) * (2 if sequential else 1))
        for (name, block), call in zip(named, calls, strict=True):
            with placed(block, device):
                target = device_of(block)
                for i in range(len(windows)):
                    hidden = spool.read(i)
                    with around(name):
                        hidden = call.run(block, hidden.to(target)).float()
                    if not sequential:
                        spool.write(i, hidden)
                    progress.advance()
                with torch.autocast(kind, enabled=False):
                    after(name)
                if sequential:
                    for i in range(len(windows)):
                        spool.write(i, call.run(block, spool.read(i).to(target)).float())
                        progress.advance()


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter or buffer is."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def placed(module: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """`module` on `device` for a while; None leaves it where it is.

    Each of its tensors is afterwards what and where it was, not copied back: what is written into it meanwhile is lost.
    What was put in their place, or beside them, is brought to where the module's first one was.
    Modules that share tensors may be placed one inside the other.
    """
    if device is None:
        yield
        return
    home = device_of(module)
    held = {id(t): (t, t.data) for t in (*module.parameters(), *module.buffers())}
    try:
        for tensor, data in held.values():
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in held.values():
            tensor.data = data
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in held:
                tensor.data = tensor.data.to(home)


@torch.no_grad()
def record(model: nn.Module, window: Tensor, named: Named) -> list[Call]:
    """How window [L] comes to each block, from one forward in which stand-ins take their places. Raises ModelError."""
    calls: dict[str, Call] = {}
    sent: list[Tensor] = []  # what stand-ins gave
    rests: dict[type[nn.Module], tuple[Any, ...] | None] = {}

    def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number == len(named):
            raise _Stop
        name, block = named[number]
        hidden = args[0] if args else kwargs.get("hidden_states")
        if name in calls or not isinstance(hidden, Tensor):
            raise ModelError(f"{name}: called more than once or without hidden states; {UNSUPPORTED}")
        if sent and hidden is not sent[-1] and not _equal(hidden, sent[-1]):
            raise ModelError(f"{name}: its input is not the previous block's output; {UNSUPPORTED}")
        call = calls[name] = Call(
            tuple(HIDDEN if a is hidden else _without_cache(a) for a in args),
            {k: HIDDEN if v is hidden else _without_cache(v) for k, v in kwargs.items()},
            hidden.shape,
        )
        if type(block) not in rests:  # one block of each class runs, to see what else it gives
            out = call._call(own[number], hidden.to(device_of(block)))
            rests[type(block)] = None if isinstance(out, Tensor) else move(tuple(out[1:]), hidden.device)
        call.rest = rests[type(block)]
        sent.append(hidden + 1.0)  # unlike its input, so that the next block's is known to be this
        return call.given(sent[-1])

    with _standing_in(model, stand_in) as own, contextlib.suppress(_Stop):
        forward(base_of(model), window)
    if absent := [name for name, _ in named if name not in calls]:
        raise ModelError(f"{absent[0]}: a plain forward does not call this block; {UNSUPPORTED}")
    return [calls[name] for name, _ in named]


def finish(model: nn.Module, window: Tensor, hidden: Tensor, calls: list[Call]) -> Any:
    """What the model gives for window [L] when its last block gives `hidden` [1, L, H]; no block runs."""
    last = len(calls) - 1

    def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed = args[0] if args else kwargs["hidden_states"]
        return calls[number].given(hidden if number == last else passed)

    with _standing_in(model, stand_in):
        return forward(model, window)


@contextmanager
def _standing_in(
    model: nn.Module, function: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[list[Callable[..., Any]]]:
    """Each block's forward is function(number, args, kwargs); gives the blocks' own ones."""
    modules = [block for _, block in blocks(model)]
    own = [block.forward for block in modules]
    held = [vars(block).get("forward") for block in modules]  # accelerate, for one, puts its own there
    try:
        for number, block in enumerate(modules):
            block.forward = lambda *args, _number=number, **kwargs: function(_number, args, kwargs)  # type: ignore
        yield own
    finally:
        for block, before in zip(modules, held, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


class _Stop(Exception):
    """Ends a forward at a block."""


def first_hidden(model: nn.Module, window: Tensor, block: nn.Module) -> Tensor:
    """What the first block gets for window [L]."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Stop):
            forward(base_of(model), window)
    finally:
        handle.remove()
    return found[0]


def base_of(model: Any) -> nn.Module:
    """The model without its head, whose logits would be the largest tensor of all."""
    return getattr(model, "base_model", model)


def forward(model: Any, window: Tensor, places: Tensor | None = None) -> Any:
    """What the model gives for window [L], or for windows [S, L], without a cache; logits at `places` only, if it can.

    places   int64, positions that are the same in all windows; None for all of them
    """
    tokens = torch.atleast_2d(window).to(model.get_input_embeddings().weight.device)
    takes = inspect.signature(model.forward).parameters
    # Told that nothing is padded, transformers builds no [L, L] mask and attention skips what is not yet there.
    options: dict[str, Any] = {"use_cache": False, "attention_mask": torch.ones_like(tokens)}
    if places is not None:
        options["logits_to_keep"] = places.to(tokens.device)
    return model(input_ids=tokens, **{name: value for name, value in options.items() if name in takes})


def _without_cache(value: Any) -> Any:
    """Nothing in place of a key-value cache, which would grow from window to window."""
    return None if hasattr(value, "get_seq_length") else value


class Spool:
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


def move(value: Any, device: torch.device) -> Any:
    """Tensors in nested tuples, lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or bool(a == b)
