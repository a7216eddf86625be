"""Rotations that a model absorbs: of its residual stream and of the values of its attention, R orthogonal.

    residual   x' = x R       readers W' = W R behind merged norms, writers W' = Rᵀ W and b' = Rᵀ b, table E' = E R
    values     v' = Rᵀ v      within each head; o_proj W' = W R: attention mixes tokens, not channels

As for folds there is no table of families: who reads and who writes is seen while a block runs, and each block is
proven in float64 before the model is changed. What is left to run time is HadamardLinear of layers.py. docs/rotate.md
has sources and figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import HIDDEN, Call
from compressor.calibrate import sites
from compressor.errors import ModelError
from compressor.fold_probe import Probe, distance, probe
from compressor.folds import (
    Fold,
    folds_of,
    merge_norm,
    probes,
    random_tokens,
    reader_modules,
    renamed,
    replace_parameter,
)
from compressor.hadamard import rotation
from compressor.layers import hadamard_of
from compressor.model import embedding_name, head_name, is_tied, untie

SAME = 1e-4  # of the largest |logit|, float32 against float32; what is right is a hundredth of it
ROWS = 4096  # of a matrix in float64 at a time


@dataclass(frozen=True)
class Stream:
    """The residual stream: the norms that read it, for their readers, and the linears that write to it."""

    norms: tuple[Fold, ...]
    writers: tuple[str, ...]


def rotate_residual(model: nn.Module, matrix: Tensor) -> Stream:
    """x' = x R, R [H, H] orthogonal, norms merged and a tied head untied. Parameters of `model` are replaced.

    Raises ModelError, with the model as it was, where that would change what the model computes.
    """
    head, table = head_name(model), embedding_name(model)
    if head is None:
        raise ModelError(_refused(model, "it has no output head that would turn its result back"))
    tokens = random_tokens(model)[None]
    before = _logits(model, tokens)
    stream = _proven_stream(model, matrix)
    last = _norm_before_head(model, head, tokens)
    with _put_back_on_error(model):
        if is_tied(model):
            untie(model)
        for fold in (*stream.norms, last):
            merge_norm(model, fold)
            for module in reader_modules(model, fold):
                _times(module, matrix)
        for name in stream.writers:
            _write(model.get_submodule(name), matrix)
        _times(model.get_submodule(table), matrix)
        after = _logits(model, tokens)
        off = ((after - before).abs().max() / before.abs().max()).item()
        if not off <= SAME:
            why = f"something outside its blocks reads or writes it (logits move by {off:.1e}, allowed are {SAME:.0e})"
            raise ModelError(_refused(model, why))
    return Stream((*stream.norms, last), stream.writers)


def head_size(under: Probe, fold: Fold) -> int | None:
    """How many channels of a "values" fold's input form a head: the largest block whose rotation is proven exact.

    A block must take whole rows of v_proj, and copies of them (grouped-query attention) must be whole blocks.
    """
    assert fold.rows is not None
    for size in (s for s in range(len(fold.rows), 1, -1) if len(fold.rows) % s == 0):
        heads = fold.rows.view(-1, size).unique(dim=0)
        if len(heads.unique()) == heads.numel() and _values_proven(under, fold, size):
            return size
    return None


def rotate_values(model: nn.Module, fold: Fold, matrix: Tensor) -> None:
    """v' = Rᵀ v in every head, R [d, d] orthogonal with d from `head_size`. Parameters of `model` are replaced."""
    _turn_values(model, fold, matrix)
    _turn_outputs(model, fold, matrix)


def _proven_stream(model: nn.Module, matrix: Tensor) -> Stream:
    """Norms and writers of all blocks. Raises ModelError for a block that does not turn with its input."""
    norms: list[Fold] = []
    writers: list[str] = []
    for prefix, under, inside in probes(model, sites(model)):
        read = [f for f in folds_of(under, inside) if f.kind == "norm"]
        written = _writers(under)
        if why := _unproven(under, read, written, matrix):
            raise ModelError(_refused(model, prefix + why))
        norms += [renamed(f, lambda n, prefix=prefix: prefix + n) for f in read]  # type: ignore[misc]
        writers += [prefix + n for n in written]
    return Stream(tuple(norms), tuple(writers))


def _writers(under: Probe) -> list[str]:
    """Linears whose output reaches the block's through no other linear. (The probe's graph ends at each linear.)"""
    found: dict[str, None] = {}
    for result, outputs in zip(under.results, under.outputs, strict=True):
        leaves = {n: p for n, p in outputs.items() if n in under.linears and p.shape[-1] == result.shape[-1]}
        if leaves and result.requires_grad:
            total = result.square().sum()
            slopes = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
            found |= {n: None for n, s in zip(leaves, slopes, strict=True) if s is not None and bool(s.any())}
    return list(found)


def _unproven(under: Probe, norms: list[Fold], writers: list[str], matrix: Tensor) -> str | None:
    """None if f(x R) = f(x) R once the block is rotated, as it then is, else the part that stands in the way, and why.

    The measure is what the block adds to x, so that a large residual stream hides nothing.
    """
    rotated = [n for n, m in under.linears.items() if hadamard_of(m)]
    if rotated:
        return f"{rotated[0]} rotates its input already; put residual before inputs"
    x = torch.randn(under.call.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameter = next(under.block.parameters())
    x, matrix = x.to(parameter), matrix.to(parameter)
    with torch.no_grad():
        before = under.call.run(under.block, x)
        try:
            for fold in norms:
                merge_norm(under.block, fold)
                for module in reader_modules(under.block, fold):
                    _times(module, matrix)
        except ValueError as error:
            return str(error)
        for name in writers:
            _write(under.module(name), matrix)
        after = under.call.run(under.block, x @ matrix)
        if distance([after], [before @ matrix]) <= under.same * distance([before], [x]):
            return None
        for fold in norms:
            norm = under.module(fold.producer)
            if distance([norm(x + 1)], [norm(x)]) <= under.same * distance([norm(x)]):
                return f"{fold.producer} subtracts the mean (a LayerNorm), which no rotation leaves as it is"
    merged = {fold.producer for fold in norms}
    if unmerged := [n for n in under.norms(x.shape[-1]) if n not in merged]:
        return f"{unmerged[0]} is not read by linears alone, or by an expert that was not reached, and cannot be merged"
    return "its block reads or writes it in a way that is not understood"


def _norm_before_head(model: nn.Module, head: str, tokens: Tensor) -> Fold:
    """The last norm as a fold with the head as its reader. Raises ModelError where the head reads something else."""
    given: dict[str, Tensor] = {}
    read: list[Tensor] = []
    features = model.get_submodule(head).weight.shape[1]  # type: ignore[union-attr, index]
    handles = [model.get_submodule(head).register_forward_pre_hook(lambda _, args: read.append(args[0]))]
    for name, module in model.named_modules():
        if isinstance(w := module._parameters.get("weight"), Tensor) and tuple(w.shape) == (features,):
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: given.update({name: out})))
    try:
        _logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    for name, out in reversed(given.items()):
        if torch.equal(out, read[0]):
            call = Call((HIDDEN,), {}, out.shape)
            offset = probe(model.get_submodule(name), call).weight_offset("")
            if offset is not None:
                linear = isinstance(model.get_submodule(head), nn.Linear)
                return Fold((head,), "norm", name, (), linear, offset=offset)
    raise ModelError(_refused(model, f"{head} does not read a norm whose weight could move into it"))


def _values_proven(under: Probe, fold: Fold, size: int) -> bool:
    matrix, _ = rotation(size, "random", torch.Generator().manual_seed(size))
    return under.unchanged(
        (fold.producer, *fold.site),
        lambda: _turn_values(under.block, fold, matrix),
        lambda: _turn_outputs(under.block, fold, matrix),
    )


def _turn_values(model: nn.Module, fold: Fold, matrix: Tensor) -> None:
    assert fold.rows is not None
    module: Any = model.get_submodule(fold.producer)
    heads = fold.rows.view(-1, len(matrix)).unique(dim=0).to(module.weight.device)  # [heads, d], each once
    for name in ("weight", "bias"):
        if module._parameters.get(name) is not None:
            value = module.get_parameter(name).detach().double().clone()
            value[heads] = torch.einsum("dc,hd...->hc...", matrix.to(value), value[heads])
            replace_parameter(module, name, value)


def _turn_outputs(model: nn.Module, fold: Fold, matrix: Tensor) -> None:
    for module in reader_modules(model, fold):
        weight = module.weight.detach().double()
        replace_parameter(module, "weight", (weight.unflatten(1, (-1, len(matrix))) @ matrix.to(weight)).flatten(1))


def _times(module: Any, matrix: Tensor) -> None:
    """W' = W R, in float64 some rows at a time: a table of tokens is large."""
    weight = module.weight.detach()
    right = matrix.to(weight.device, torch.float64)
    replace_parameter(module, "weight", torch.cat([(w.double() @ right).to(w.dtype) for w in weight.split(ROWS)]))


def _write(module: Any, matrix: Tensor) -> None:
    """W' = Rᵀ W and b' = Rᵀ b."""
    right = matrix.to(module.weight.device, torch.float64)
    replace_parameter(module, "weight", right.T @ module.weight.detach().double())
    if module.bias is not None:
        replace_parameter(module, "bias", module.bias.detach().double() @ right)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens.to(model.get_input_embeddings().weight.device))[0].float()


@contextmanager
def _put_back_on_error(model: Any) -> Iterator[None]:
    held = [(m, dict(m._parameters)) for m in model.modules()]
    tied = model.config.tie_word_embeddings
    try:
        yield
    except Exception:
        for module, parameters in held:
            module._parameters.update(parameters)
        model.config.tie_word_embeddings = tied
        raise


def _refused(model: nn.Module, why: str) -> str:
    return f"{type(model).__name__}: its residual stream cannot be rotated, because {why}; set residual: none."
