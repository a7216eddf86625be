"""What each format of the token table costs: KL on one model whose linears are untouched.

    .venv/bin/python bench/tables.py --data wikitext2/valid.txt --text wikitext2/test.txt [--formats nvfp4 int8-row]

Prints the table of docs/formats.md and appends one JSON line per row to bench/results/tables.jsonl. `weighted` is the
scale search weighted with the mean square of the head's input, measured on --calibration-windows windows of --data;
`predicted` is what a budget reckons with (table_budget.py), from the same windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch

from compressor import Recipe
from compressor.artifact import Artifact
from compressor.data import text_of, windows
from compressor.evaluate import compare, torch_runner
from compressor.model import Loaded, embedding_name, load_model
from compressor.sensitivity import output_fisher
from compressor.table_budget import auto_tables, head_among, weighed
from compressor.tables import TABLE_METHODS, head_importance, pack_tables, place_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "tables.jsonl"


def with_tables(original: Loaded, choice: str, importance: torch.Tensor | None) -> Artifact:
    """The model with its tables packed and everything else as it was."""
    recipe = recipe_of(choice)
    tables = pack_tables(original.model, recipe, importance)
    inside = tuple(f"{name}." for name in tables.packed)
    kept = {n: p.detach() for n, p in original.model.named_parameters() if not n.startswith(inside)}
    return Artifact(original.model.config, original.kind, None, recipe, tables.packed, kept, tables.tied)


def recipe_of(choice: str) -> Recipe:
    return Recipe.from_dict({"embedding": choice, "lm_head": choice, "steps": [{"quantize": {"ignore": ["*"]}}]})


def predicted(original: Loaded, seen: torch.Tensor, importance: torch.Tensor) -> dict[str, float]:
    """The KL that the formats of all tables together are reckoned to cost."""
    steps = [{"mixed_bits": {"bits": 16.0}}]
    tables = auto_tables(original.model, Recipe.from_dict({"embedding": "auto", "lm_head": "auto", "steps": steps}))
    heads = [name for name in [head_among(original.model, tables)] if name is not None]
    generator = torch.Generator().manual_seed(0)
    fisher = output_fisher(original.model, seen, heads, generator, table=embedding_name(original.model))
    costs: dict[str, float] = {}
    for table in weighed(original.model, tables, seen, importance, fisher).values():
        for choice in table.choices:
            costs[choice.name] = costs.get(choice.name, 0.0) + choice.cost
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--calibration-windows", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=list(TABLE_METHODS), choices=list(TABLE_METHODS))
    arguments = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    original = load_model(None)
    test = windows(original.tokenizer, text_of(arguments.text)[0], arguments.windows, 512)
    seen = windows(original.tokenizer, text_of(arguments.data)[0], arguments.calibration_windows, 512)
    importance = head_importance(original.model, seen)
    costs = predicted(original, seen, importance)
    base = torch_runner(original.model)
    logits = {tuple(w.tolist()): base(w[None]) for w in test}  # the original is run once
    print("| table | bits a weight | MB | KL | KL, weighted | predicted | top-1, weighted |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for choice in arguments.formats:
        shape, placement = place_tables(original.model, recipe_of(choice)).placements[embedding_name(original.model)]
        figures = []
        for weights in (None, importance):
            artifact = with_tables(original, choice, weights)
            found = compare(torch_runner(artifact.model(dense=True)), test, lambda ids: logits[tuple(ids[0].tolist())])
            figures.append(found)
            line = {"commit": git.stdout.strip(), "table": choice, "weighted": weights is not None}
            line |= {"predicted": costs[choice]} if weights is not None else {}
            with RESULTS.open("a") as file:
                file.write(json.dumps(line | {"size_bytes": placement.size_bytes} | found) + "\n")
        plain, weighted = figures
        print(
            f"| {choice} | {placement.size_bytes * 8 / (shape[0] * shape[1]):.2f} | {placement.size_bytes / 1e6:.1f} "
            f"| {plain['kl']:.4f} | {weighted['kl']:.4f} | {costs[choice]:.4f} | {weighted['top1']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
