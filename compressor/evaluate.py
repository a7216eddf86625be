"""How good a model is: perplexity, KL to the original, top-1 agreement — one protocol for every figure.

The whole text is tokenized once with the tokenizer's default special tokens and cut into consecutive windows;
perplexity is exp of the mean negative log-likelihood over the length - 1 predictions of each window. KL is the
mean over tokens of KL(original ‖ compressed) and top-1 the share of equal argmaxes, both on the first 16
windows. The interval is a 95 % bootstrap over windows. Encoders have no perplexity; they get the mean cosine
of their hidden states to the original's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import data
from compressor.errors import DataError, ModelError
from compressor.progress import Progress, Silent
from compressor.sparse import everywhere

KL_WINDOWS = 16
RESAMPLES = 1000

# ids [1, L] -> logits [1, L, V] (or hidden states of an encoder), float32
Runner = Callable[[Tensor], Tensor]


def torch_runner(model: nn.Module) -> Runner:
    """A Runner over a transformers model."""

    def run(ids: Tensor) -> Tensor:
        device = next(iter(model.parameters())).device
        with torch.inference_mode():
            output = model(input_ids=ids.to(device), **({"use_cache": False} if _decodes(model) else {}))
        return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float().cpu()

    return run


def onnx_runner(folder: Path) -> Runner:
    """A Runner over the exported graph in stock onnxruntime."""
    from compressor.runtimes import OnnxSession

    session = OnnxSession(folder)
    return lambda ids: session.prefill(ids)[0]


def _decodes(model: nn.Module) -> bool:
    return hasattr(model, "generate") and hasattr(model.config, "use_cache")


@dataclass
class Windows:
    """Figures window by window, float64 [S]; KL and agreement of the first KL_WINDOWS, empty without a base."""

    losses: Tensor
    base_losses: Tensor
    kl: Tensor
    agreement: Tensor


def measure(
    run: Runner, windows: Tensor, base: Runner | None = None, *, dense: float = 0.0, progress: Progress = Silent()
) -> Windows:
    """One language model on windows [S, L], against `base` where it is given.

    dense: the share of each window, from its start, in which linears that skip small inputs skip none.
    """
    losses, base_losses, kl, agreement = [], [], [], []
    progress.stage("evaluate", len(windows))
    for index, window in enumerate(windows):
        ids = window.unsqueeze(0)
        with everywhere(dense):
            scores = torch.log_softmax(run(ids)[0, :-1], dim=-1)
        target = window[1:].unsqueeze(-1)
        losses.append(-scores.gather(-1, target).double().mean())
        if base is not None:
            reference = torch.log_softmax(base(ids)[0, :-1], dim=-1)
            base_losses.append(-reference.gather(-1, target).double().mean())
            if index < KL_WINDOWS:
                kl.append((reference.exp() * (reference - scores)).sum(-1).double().mean())
                agreement.append((reference.argmax(-1) == scores.argmax(-1)).double().mean())
        progress.advance()
    return Windows(*(torch.stack(found) if found else torch.empty(0) for found in (losses, base_losses, kl, agreement)))


def compare(
    run: Runner, windows: Tensor, base: Runner | None = None, *, progress: Progress = Silent()
) -> dict[str, Any]:
    """The means of `measure`, and the interval of the perplexity."""
    found = measure(run, windows, base, progress=progress)
    low, high = (value.exp().item() for value in _bootstrap(found.losses))
    return {
        "ppl": math.exp(found.losses.mean()),
        "ppl_low": low,
        "ppl_high": high,
        "base_ppl": math.exp(found.base_losses.mean()) if base is not None else None,
        "kl": found.kl.mean().item() if base is not None else None,
        "top1": found.agreement.mean().item() if base is not None else None,
        "tokens": windows.shape[0] * (windows.shape[1] - 1),
    }


def paired_interval(ours: Tensor, other: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours - other), two figures of the same windows [S]: below zero, ours is lower."""
    low, high = _bootstrap(ours - other)
    return low.item(), high.item()


def compare_encoders(run: Runner, windows: Tensor, base: Runner, *, progress: Progress = Silent()) -> dict[str, Any]:
    """Mean cosine similarity of the hidden states of two encoders on windows [S, L]."""
    cosines = []
    progress.stage("evaluate", len(windows))
    for window in windows:
        ids = window.unsqueeze(0)
        with everywhere():
            cosines.append(torch.cosine_similarity(run(ids), base(ids), dim=-1).double().mean())
        progress.advance()
    return {"cosine": torch.stack(cosines).mean().item(), "tokens": windows.numel()}


def _bootstrap(values: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of the mean of values [S]."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = values[picks].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low, high


def evaluate(
    source: str | Path,
    against: str | Path | None = None,
    *,
    text: str | None = None,
    windows: int = 64,
    length: int = 512,
    runtime: str = "torch",
    progress: Progress = Silent(),
) -> dict[str, Any]:
    """`compress eval`: figures of a folder of ours, or of an original, with the keys of `compare`."""
    from compressor.folder import is_artifact, load
    from compressor.model import load_model, load_tokenizer

    if runtime == "onnx" and not is_artifact(source):
        raise ModelError(f"{source}: --runtime onnx needs a folder that compressor wrote; use --runtime torch.")
    progress.stage("load")
    if is_artifact(source):
        artifact = load(source)
        kind, tokenizer = artifact.kind, artifact.tokenizer
        run = onnx_runner(Path(source)) if runtime == "onnx" else torch_runner(artifact.model(dense=True))
    else:
        loaded = load_model(source)
        kind, tokenizer = loaded.kind, loaded.tokenizer
        run = torch_runner(loaded.model)
    base = None
    if against is not None:
        base = torch_runner(load(against).model(dense=True) if is_artifact(against) else load_model(against).model)
    if tokenizer is None:
        tokenizer = load_tokenizer(source)
    content, _ = data.text_of(text)
    tokens = data.windows(tokenizer, content, windows, length)
    if kind == "encoder":
        if base is None:
            raise DataError(
                f"{source} is an encoder, which has no perplexity; give --against MODEL to compare hidden states."
            )
        return compare_encoders(run, tokens, base, progress=progress)
    return compare(run, tokens, base, progress=progress)
