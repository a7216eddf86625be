"""Quality of the shipped recipes on one model: perplexity, KL and top-1 by the project's protocol.

    .venv/bin/python bench/quality.py --data wikitext2/valid.txt --text wikitext2/test.txt [--recipes w4a4 fp8]

Prints the table of README and appends one JSON line per recipe to bench/results/quality.jsonl. `w4a4+46` is w4a4 for
our own ops, with four-over-six activations. Perplexity is over --windows windows, KL and top-1 over the first 16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from compressor import Recipe, compress
from compressor.data import text_of, windows
from compressor.evaluate import compare, torch_runner
from compressor.folder import coverage
from compressor.model import load_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
OWN_OPS = ["runtime=compressor", "quantize.four_over_six=true"]
RECIPES = {"w4a4": [], "w4a4+46": OWN_OPS, "nvfp4a16": [], "w4a16": [], "w8a8": [], "fp8": [], "mxfp4": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    original = load_model(None)
    test = windows(original.tokenizer, text_of(arguments.text)[0], arguments.windows, 512)
    print("| recipe | bits a weight | perplexity | KL | top-1 |\n|---|---|---|---|---|", flush=True)
    for name in arguments.recipes:
        recipe = Recipe.load(
            name.removesuffix("+46"), [*RECIPES[name], f"calibration.windows={arguments.calibration_windows}"]
        )
        artifact = compress(original.model, recipe, tokenizer=original.tokenizer, data=arguments.data, measure=False)
        found = compare(torch_runner(artifact.model(dense=True)), test, torch_runner(original.model))
        bits = coverage(artifact)["bits_per_compressed_weight"]
        line = {"commit": git.stdout.strip(), "recipe": name, "calibration_windows": arguments.calibration_windows}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line | {"bits_per_weight": bits} | found) + "\n")
        print(
            f"| {name} | {bits:.2f} | {found['ppl']:.2f} ({found['base_ppl']:.2f} before) | {found['kl']:.3f} "
            f"| {found['top1']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
