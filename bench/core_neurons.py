"""Core neurons on the demo model: quality of what follows a prompt by share and score, and the speed of decoding.

    .venv/bin/python bench/core_neurons.py --text wikitext2/test.txt                   # quality
    .venv/bin/python bench/core_neurons.py --text wikitext2/test.txt --speed           # time, on a quiet machine

Quality: windows of --prompt tokens and --tokens behind them, which run on the prompt's core at once, as if decoded;
perplexity of those only. Energy is the share of Σ_t (a_n ‖Wd_:n‖)² of these tokens in the dense model that the core
holds: mean over layers, and the least. Speed: decoding by argmax, the dense model and each share in turns, medians of
--repeats and their range; cores are gathered once a prompt, and how long that takes has a column of its own.
A line a row goes to bench/results/core_neurons.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.core_neurons import Core, core_neurons, energy
from compressor.data import text_of, windows
from compressor.model import load_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "core_neurons.jsonl"


def losses(model: Any, window: Tensor, prompt: int, core: Core | None = None) -> Tensor:
    """Mean negative log-likelihood of the tokens of window [L] behind the one that follows the prompt."""
    out = model(input_ids=window[None, :prompt], use_cache=True)
    with nullcontext() if core is None else core.held():
        out = model(input_ids=window[None, prompt:], past_key_values=out.past_key_values, use_cache=True)
    return torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), window[prompt + 1 :].to(out.logits.device))


def spent(model: Any, core: Core, window: Tensor, prompt: int) -> list[Tensor]:
    """Of each layer, the energy [D] of its neurons behind the prompt, dense all the way."""
    found: list[Tensor] = []
    handles = [
        layer.readers[0].register_forward_pre_hook(
            lambda _, args, norms=layer.norms: found.append(energy(args[0][0, prompt:], norms))
        )
        for layer in core.layers
    ]
    model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def quality(model: Any, text: Tensor, prompt: int, share: float, score: Any, fill: Any, within: Any) -> dict[str, Any]:
    found, held = [], []
    with core_neurons(model, share, score=score, fill=fill, within=within) as core:
        for window in text:
            energies = spent(model, core, window, prompt)
            found.append(losses(model, window, prompt, core))
            held.append([(e[o.chosen].sum() / e.sum()).item() for e, o in zip(energies, core.layers, strict=True)])
    by_layer = torch.tensor(held).mean(0)
    perplexity = torch.stack(found).double().mean().exp().item()
    return {"ppl": perplexity, "energy": by_layer.mean().item(), "energy_least": by_layer.min().item(),
            "energies": by_layer.tolist()}  # fmt: skip


def decode(model: Any, ids: Tensor, tokens: int) -> tuple[float, float]:
    """(ms of the first decoded token, which gathers, and tokens a second after it) behind prompt ids [1, L]."""
    out = model(input_ids=ids, use_cache=True)
    for i in range(tokens + 1):
        if i <= 1:
            start = time.perf_counter()
        next_one = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=next_one, past_key_values=out.past_key_values, use_cache=True)
        if not i:
            first = time.perf_counter() - start
    return 1e3 * first, tokens / (time.perf_counter() - start)


def speed(model: Any, ids: Tensor, tokens: int, shares: list[float], repeats: int) -> list[dict[str, Any]]:
    """Rows of the dense model, share null, and of each share."""
    turns: dict[float | None, list[tuple[float, float, float]]] = {share: [] for share in (None, *shares)}
    for turn in range(repeats + 1):  # the first one warms up
        for share, seen in turns.items():
            with nullcontext() if share is None else core_neurons(model, share) as core:
                figures = (*decode(model, ids, tokens), 0.0 if core is None else 1e3 * core.gather_s)
            if turn:
                seen.append(figures)
    return [
        {"share": share, "first_ms": sorted(a), "tokens_s": sorted(b), "gather_ms": sorted(c)}
        for share, seen in turns.items()
        for a, b, c in [zip(*seen, strict=True)]
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default=None, help="the demo model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.5, 0.4, 0.2])
    parser.add_argument("--scores", nargs="+", default=["contribution", "positive"])
    parser.add_argument("--fills", nargs="+", default=["mean", "zero"])
    parser.add_argument("--within", type=int, nargs=2, metavar=("FIRST", "LAST"), help="blocks that have a core [all]")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, arguments.device)
    text = windows(loaded.tokenizer, text_of(arguments.text)[0], arguments.windows, arguments.prompt + arguments.tokens)
    text, model = text.to(arguments.device), loaded.model
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    about = {"commit": git.stdout.strip(), **{k: v for k, v in vars(arguments).items() if k in ("prompt", "tokens")}}
    about |= {"model": Path(loaded.source).name, "device": arguments.device,
              "threads": torch.get_num_threads()}  # fmt: skip
    if arguments.speed:
        print("| share | ms to the first decoded token | of it choosing and gathering | tokens a second | x dense |")
        print("|---|---:|---:|---:|---:|")
        rows = speed(model, text[:1, : arguments.prompt], arguments.tokens, arguments.shares, arguments.repeats)
        dense = statistics.median(rows[0]["tokens_s"])
        for row in rows:
            middle = {k: statistics.median(v) for k, v in row.items() if isinstance(v, list)}
            span = f"{middle['tokens_s']:.1f} ({row['tokens_s'][0]:.1f}–{row['tokens_s'][-1]:.1f})"
            cells = (
                f"{middle['first_ms']:.0f}",
                f"{middle['gather_ms']:.0f}",
                span,
                f"{middle['tokens_s'] / dense:.2f}",
            )
            print(f"| {row['share'] or 'dense'} | {' | '.join(cells)} |", flush=True)
    else:
        within = range(arguments.within[0], arguments.within[1] + 1) if arguments.within else None
        base = torch.stack([losses(model, window, arguments.prompt) for window in text]).double().mean().exp().item()
        print(f"dense: perplexity {base:.2f}\n")
        print("| share | score | fill | perplexity | x dense | energy held | least layer |")
        print("|---|---|---|---:|---:|---:|---:|")
        rows = []
        for share, score, fill in itertools.product(arguments.shares, arguments.scores, arguments.fills):
            row = quality(model, text, arguments.prompt, share, score, fill, within)
            rows.append({"share": share, "score": score, "fill": fill, "windows": len(text), "within": arguments.within,
                         "base_ppl": base} | row)  # fmt: skip
            cells = (
                f"{row['ppl']:.2f}",
                f"{row['ppl'] / base:.3f}",
                f"{row['energy']:.3f}",
                f"{row['energy_least']:.3f}",
            )
            print(f"| {share:g} | {score} | {fill} | {' | '.join(cells)} |", flush=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
