"""Speed of a pruned model beside the dense one in stock onnxruntime: 128 tokens of prompt, then one token at a time.

    .venv/bin/python bench/pruned_speed.py --into FOLDER --data wikitext2/valid.txt     # writes dense and pruned
    .venv/bin/python bench/pruned_speed.py --into FOLDER                                # measures them, taking turns

No plug-in, no quantization: both graphs are of float weights, and only shapes differ. Medians of --repeats turns and
their range; a line with both goes to bench/results/pruned_speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from onnxruntime import OrtValue

from compressor import Recipe, compress
from compressor.runtimes import OnnxSession

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "pruned_speed.jsonl"


def write(into: Path, data: str, model: str | None, prune: float) -> None:
    """Both folders. Which channels go does not matter for the time, so few windows choose them."""
    for name, share in (("dense", 0.0), ("pruned", prune)):
        overrides = [f"cfsp.prune={share}", "cfsp.score=out_energy", "calibration.windows=4", "graph=ort"]
        compress(model, Recipe.load("cfsp-20", overrides), data=data, measure=False).save(into / name, force=True)


def measure(session: OnnxSession, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """(ms of the prompt, tokens a second after it), the cache staying in onnxruntime's own tensors."""
    past = {n: np.zeros(session._past_shape(n, 1), np.float32) for n in session.past_names}
    cache = {n: OrtValue.ortvalue_from_numpy(v) for n, v in past.items()}
    milliseconds, cache = step(session, prompt, cache, 0)
    seen, start = prompt.shape[1], time.perf_counter()
    for i in range(tokens):
        _, cache = step(session, prompt[:, :1], cache, seen + i)
    return milliseconds, tokens / (time.perf_counter() - start)


def step(
    session: OnnxSession, ids: torch.Tensor, cache: dict[str, OrtValue], seen: int
) -> tuple[float, dict[str, OrtValue]]:
    """(ms of one call, the cache after it)."""
    length = ids.shape[1]
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, seen + length), np.int64),
        "position_ids": np.arange(seen, seen + length)[None],
    }
    values = {n: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in feeds.items() if n in session.inputs}
    start = time.perf_counter()
    found = session.session.run_with_ort_values(session.outputs, values | cache)
    milliseconds = 1000 * (time.perf_counter() - start)
    outputs = dict(zip(session.outputs, found, strict=True))
    return milliseconds, {n: outputs[n.replace("past_key_values", "present")] for n in cache}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--data", help="calibration text: write the folders and stop")
    parser.add_argument("--model", default=None, help="the demo model")
    parser.add_argument("--prune", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.data:
        write(arguments.into, arguments.data, arguments.model, arguments.prune)
        return
    sessions = {name: OnnxSession(arguments.into / name) for name in ("dense", "pruned")}
    prompt = torch.randint(5, 1000, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for turn in range(arguments.repeats + 1):  # the first one warms up
        for name, session in sessions.items():
            figures = measure(session, prompt, arguments.new_tokens)
            if turn:
                found[name].append(figures)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    line: dict[str, object] = {"commit": git.stdout.strip(), "prune": arguments.prune, "prompt": arguments.prompt}
    print("| model | first token ms | tokens a second |\n|---|---:|---:|")
    middle = {}
    for name, turns in found.items():
        columns = list(zip(*turns, strict=True))
        middle[name] = [statistics.median(c) for c in columns]
        line[name] = {"first_ms": sorted(columns[0]), "tokens_s": sorted(columns[1])}
        cells = [f"{m:.1f} ({min(c):.1f}–{max(c):.1f})" for m, c in zip(middle[name], columns, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
    line["faster"] = [middle["dense"][0] / middle["pruned"][0], middle["pruned"][1] / middle["dense"][1]]
    whole = {name: first + 1e3 * arguments.new_tokens / rate for name, (first, rate) in middle.items()}
    line["faster"] += [whole["dense"] / whole["pruned"]]  # type: ignore[operator]
    print("faster: prompt {:.2f} x, decode {:.2f} x, both {:.2f} x".format(*line["faster"]))  # type: ignore[misc]
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
