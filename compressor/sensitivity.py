"""What an error in a layer's weights costs the model: the figures that allocation.py weighs against bytes.

For a linear y = W x with W [N, K] that is stored as Q, h_k = mean over tokens of x_k² and D = W − Q:

    error   Σ_n Σ_k h_k D_nk² / Σ_n Σ_k h_k W_nk²      the layer's relative output error; knows nothing of the rest
    kl      ½ Σ_n F_n Σ_k h_k D_nk²                    KL(original ‖ compressed) a token, in nats, to second order

F is the Fisher information, the Hessian of KL where the two models are equal (Martens 2020, "New insights and
perspectives on the natural gradient method"). With G [N, K] the gradient with respect to W of the log-likelihood of one
window's tokens, drawn from the model's own distribution,

    F_n = Σ_windows Σ_k G_nk² / Σ_tokens Σ_k x_k²

which would be the mean over tokens of the squared gradient at output n if tokens were independent. They are not: what
all tokens have in common survives the average that attention takes over v, what differs between them does not, and the
mean of squares is wrong by up to twenty times there. It is right for an error that every token has anew, such as that
of rounding the inputs: `Fisher.inputs`. F is the diagonal of

    R = Σ_windows G Gᵀ / Σ_tokens Σ_k x_k²            [N, N]: KL ≈ ½ tr(Dᵀ R D C), with C = E[x xᵀ]

the outputs' factor of K-FAC (Martens, Grosse 2015), with the sums over a window inside the square for the same reason:
`Fisher.pairs`. Drawn tokens, not the text's: with those it would be the
"empirical Fisher", which is not the Hessian (Kunstner, Balles, Hennig 2019). Left out: correlations between entries of
D, and those between layers.

A token table is read one row a token. With G [V, K] its own gradient, of one window's tokens,

    kl      ½ Σ_windows Σ_nk G_nk² D_nk² / tokens      over the rows n that the windows read

A head is a linear y = W x like any other. A table that is both costs the sum.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import Call, device_of, finish, first_hidden, placed, record
from compressor.errors import DataError, ModelError, NumericsError
from compressor.parts import blocks, head_name
from compressor.progress import Progress, Silent

CHUNK_ELEMENTS = 1 << 22  # of a weight, so that its error in float32 is 16 MB at a time
GRADIENT_ELEMENTS = 1 << 25  # of a weight's gradient, 128 MB: a head's would be gigabytes


@dataclass(frozen=True)
class Fisher:
    """F [N] float32 of each layer: of an error in its weights, and of one that every token has anew."""

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    rows: Rows | None = None  # of the token table, where it was asked for
    pairs: dict[str, Tensor] = field(default_factory=dict)  # R [N, N] float32, where it was asked for


@dataclass(frozen=True)
class Rows:
    """Of the rows of a token table that some window reads: their ids [M] int64 and Σ_windows G² / tokens [M, K]."""

    ids: Tensor
    squares: Tensor


def output_fisher(
    model: nn.Module,
    windows: Tensor,
    names: Collection[str],
    generator: torch.Generator,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    table: str | None = None,
    pairs: bool = False,
) -> Fisher:
    """F of the linears `names`, on the CPU: one backward pass over each of the windows [S, L] int64.

    names may have the head; table: the token embedding, whose rows are wanted too; pairs: R too, which takes 4 N² bytes
    of main memory a layer, for all layers at once.

    The mean is over all S·L tokens, so an expert's figure counts how often it is chosen, and is 0 if it never was.
    A few windows do (docs/mixed_bits.md has 4 of 256): what is noise in one F_n averages out over the layer.

    An encoder has no distribution. There F is such that `kl` estimates the mean of 1 − cosine(original, compressed) of
    the hidden states o: g is the gradient of rᵀo/‖o‖ for a random normal r with its part along o removed.

    Parameters get no gradient, and an activation's is reduced when it appears. Blocks run one at a time, backwards on
    what they got, so memory holds one block's activations and the hidden states between all blocks of these windows.
    `device` is where blocks run, each moved there; None leaves the model where it is. It is as it was afterwards; give
    it in eval mode. Raises DataError for no tokens, ModelError when no gradient reaches any of the linears,
    NumericsError for NaN or Inf.
    """
    if windows.dim() != 2 or not windows.numel():
        raise DataError(f"sensitivity windows must be [S, L] with S, L >= 1, got {list(windows.shape)}.")
    progress = progress or Silent()
    layers = {name: model.get_submodule(name) for name in names}
    seen = {n: _Seen.start(len(m.get_parameter("weight")), pairs) for n, m in layers.items()}
    objective = _projection if head_name(model) is None else _log_likelihood
    named = blocks(model)
    calls = record(model, windows[0], named)
    progress.stage("sensitivity", 2 * len(named) * len(windows))
    with torch.no_grad():
        between = [[first_hidden(model, window, named[0][1]) for window in windows]]
        for (_, block), call in zip(named, calls, strict=True):
            with placed(block, device):
                between.append([_on(block, h, call) for h in between[-1]])
            progress.advance(len(windows))
    with _frozen(model), _listening(layers, seen), torch.enable_grad():
        slopes: list[Tensor] = []
        for window, hidden in zip(windows, between.pop(), strict=True):
            hidden.requires_grad_()
            objective(_output(model, finish(model, window, hidden.clone(), calls)), generator).backward()
            slopes.append(_gradient(hidden))
        for (_, block), call in reversed(list(zip(named, calls, strict=True))):
            with placed(block, device):
                for i, hidden in enumerate(between.pop()):
                    hidden.requires_grad_()
                    _on(block, hidden, call).backward(slopes[i])
                    slopes[i] = _gradient(hidden)
            progress.advance(len(windows))
        rows = None if table is None else _rows(model, table, windows, slopes)
    for name, one in seen.items():
        if not one.gradients.isfinite().all() or not math.isfinite(one.inputs):
            raise NumericsError(f"{name}: NaN or Inf in its input or its gradient; check the weights around it.")
    if seen and not any(one.gradients.any() for one in seen.values()):
        raise ModelError(f"{type(model).__name__}: no gradient reaches its linears; use sensitivity: error.")
    total = windows.numel()
    return Fisher(
        {name: one.scaled(one.gradients, total) for name, one in seen.items()},
        {name: (one.squares / total).float() for name, one in seen.items()},
        rows,
        {name: one.scaled(one.pairs, total) for name, one in seen.items() if one.pairs is not None},
    )


def costs(
    weight: Tensor, quantized: Mapping[str, Tensor], importance: Tensor | None, fisher: Tensor | None
) -> dict[str, float]:
    """The cost of each way to store one layer: `kl` where `fisher` [N] is given, else `error`.

    weight [N, K]; quantized: decoded weights [N, K] by name; importance [K]: h, 1 everywhere if None. A layer whose
    output is zero has no error to speak of, and costs 0.
    """
    h = torch.ones(weight.shape[1]) if importance is None else importance
    h = h.to(weight.device, torch.float32)
    if fisher is None:
        scale = _by_rows(weight, None, h).sum().reciprocal().nan_to_num(posinf=0.0).expand(len(weight))
    else:
        scale = 0.5 * fisher.to(weight.device, torch.float64)
    return {name: (scale * _by_rows(weight, q, h)).sum().item() for name, q in quantized.items()}


def row_costs(weight: Tensor, quantized: Tensor, rows: Rows) -> float:
    """The `kl` cost of reading a token table's rows from `quantized` [V, K] and not from `weight` [V, K]."""
    error = weight.detach()[rows.ids].float() - quantized[rows.ids].float()
    return 0.5 * (rows.squares * error.square().to(rows.squares.device)).sum(dtype=torch.float64).item()


def _rows(model: nn.Module, table: str, windows: Tensor, slopes: list[Tensor]) -> Rows:
    """From the gradients [1, L, H] of what the first block gets, through all that lies between it and the table."""
    module = model.get_submodule(table)
    scale = float(getattr(module, "embed_scale", 1.0))  # Gemma's table multiplies what it reads
    read: list[Tensor] = []

    def see(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        read.append(output.detach().requires_grad_())
        return read[-1].clone()

    parts: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(see)
    try:
        for window, slope in zip(windows, slopes, strict=True):
            first_hidden(model, window, blocks(model)[0][1]).backward(slope)
            parts.append(_summed(window, scale * _gradient(read.pop())[0].float().cpu()))
    finally:
        handle.remove()
    ids, squares = _summed(torch.cat([i for i, _ in parts]), torch.cat([g.square() for _, g in parts]))
    return Rows(ids, squares / windows.numel())


def _summed(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """ids [T], rows [T, K] -> every id once [M], the sum of its rows [M, K]."""
    once, place = ids.cpu().unique(return_inverse=True)
    return once, rows.new_zeros(len(once), rows.shape[1]).index_add_(0, place, rows)


def _by_rows(weight: Tensor, other: Tensor | None, h: Tensor) -> Tensor:
    """Σ_k h_k (weight − other)_nk², [N] float64."""
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    sums = []
    for start in range(0, len(weight), rows):
        error = weight[start : start + rows].detach().float()
        if other is not None:
            error = error - other[start : start + rows].to(error.device, torch.float32)
        sums.append((error.square() @ h).double())
    return torch.cat(sums)


def _on(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """What a block gives for `hidden`, where `hidden` is. The block may write into its copy."""
    return call.run(block, hidden.to(device_of(block), copy=True)).to(hidden.device)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "no gradient reached the hidden states"
    return leaf.grad


def _output(model: nn.Module, out: Any) -> Tensor:
    """Logits [L, V], or hidden states [L, H] of an encoder, float32."""
    result = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0].float()
    if result.isnan().any():
        raise NumericsError(f"{type(model).__name__}: its output for calibration text is NaN; check its weights.")
    return result


def _log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Σ_t log p(token drawn from p), whose gradient has mean zero and the Fisher information as covariance."""
    scores = torch.log_softmax(logits, -1)
    drawn = torch.multinomial(scores.detach().exp().to(generator.device), 1, generator=generator)
    return scores.gather(-1, drawn.to(scores.device)).sum()


def _projection(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Σ_t rᵀo/‖o‖ with r orthogonal to o: the squared gradient is that of 2 (1 − cosine) in the mean over r."""
    o = hidden.detach()
    length = o.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    along = o / length
    r = torch.randn(o.shape, generator=generator, device=generator.device).to(o.device)
    r = r - (r * along).sum(-1, keepdim=True) * along
    return (r / length * hidden).sum()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@dataclass
class _Seen:
    """Of one layer: Σ_windows Σ_k G_nk² and Σ_t g_tn², [N] float64; Σ_t Σ_k x_tk²; how many tokens reached it.

    pairs   Σ_windows G Gᵀ, [N, N] float32, where it is wanted
    """

    gradients: Tensor
    squares: Tensor
    pairs: Tensor | None
    inputs: float = 0.0
    tokens: int = 0

    @classmethod
    def start(cls, rows: int, pairs: bool) -> _Seen:
        square = torch.zeros(rows, rows) if pairs else None
        return cls(torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64), square)

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """gradient [T, N], x [T, K], both of one window."""
        if self.pairs is None:
            rows = max(1, GRADIENT_ELEMENTS // x.shape[1])
            sums = torch.cat([(part @ x).square().sum(1) for part in gradient.T.split(rows)])
        else:
            g = gradient.T @ x
            sums = g.square().sum(1)
            self.pairs += (g @ g.T).cpu()
        self.gradients += sums.cpu().double()
        self.squares += gradient.square().sum(0).cpu().double()
        self.inputs += x.square().sum().item()
        self.tokens += len(x)

    def scaled(self, total: Tensor, all_tokens: int) -> Tensor:
        """A sum over windows as F or R, float32.

        C is the mean over the tokens that reached the layer, KL that over all tokens: their ratio belongs here.
        """
        share = self.tokens / all_tokens
        return (total / self.inputs * share if self.inputs else torch.zeros_like(total)).float()


@contextmanager
def _listening(layers: Mapping[str, nn.Module], seen: Mapping[str, _Seen]) -> Iterator[None]:
    """Add what each layer sees when its output's gradient appears; input and gradient live no longer than the graph."""

    def hook(one: _Seen):
        def see(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            def reduce(gradient: Tensor) -> None:
                one.add(gradient.reshape(-1, gradient.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float())

            x = args[0].detach()
            if output.requires_grad:
                output.register_hook(reduce)

        return see

    handles = [layer.register_forward_hook(hook(seen[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
