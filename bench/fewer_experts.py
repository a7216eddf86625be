"""What it costs a mixture of experts to leave some of the chosen experts out: odp and otp at several shares.

    .venv/bin/python bench/fewer_experts.py --model ../shared/models/moe-28m --data wikitext2/valid.txt \
        --text wikitext2/test.txt [--device cuda] [--rows "otp*"]

Perplexity, as a ratio to the model's without the rule, over 64 windows of 512 tokens, with a 95 % bootstrap interval
over windows; KL to it over 16; "saved" is the share of the router's choice that those 64 windows do without. Rows of
recipes are compared with the recipe without the rule. Appends a JSON line a row to bench/results/fewer_experts.jsonl.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import Recipe, compress
from compressor.data import text_of, windows
from compressor.evaluate import measure, paired_interval, torch_runner
from compressor.fewer_experts import FewerExperts
from compressor.methods.thinning import hearing
from compressor.model import load_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "fewer_experts.jsonl"


def rows() -> dict[str, dict[str, Any]]:
    """Row -> its step; a recipe's name -> that of the recipe that it is compared with."""
    found: dict[str, dict[str, Any]] = {
        f"odp {keep}{'' if scope == 'layer' else ', one β'}": {"odp": {"keep": keep, "scope": scope}}
        for scope in ("layer", "model")
        for keep in (0.9, 0.8, 0.75, 0.7)
    }
    found |= {f"otp {keep}, no stand-in": {"otp": {"keep": keep, "stand_in": False}} for keep in (0.9, 0.8)}
    found |= {f"otp {keep}": {"otp": {"keep": keep}} for keep in (0.9, 0.8, 0.7, 0.6)}
    return found | {"moe-pmq-otp": {"against": "moe-pmq-2.5"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns")
    arguments = parser.parse_args()
    wanted = {n: s for n, s in rows().items() if any(fnmatch.fnmatchcase(n, p) for p in arguments.rows)}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    original = load_model(arguments.model)
    device = torch.device(arguments.device or "cpu")
    test = windows(original.tokenizer, text_of(arguments.text)[0], 64, 512)
    against: dict[str, nn.Module] = {}

    def made(recipe: Recipe) -> nn.Module:
        loaded: Any = original.model
        artifact = compress(
            loaded, recipe, tokenizer=original.tokenizer, data=arguments.data, measure=False, device=arguments.device
        )
        return artifact.model(dense=True, device=device)

    print("| | saved | perplexity | KL |\n|---|---|---|---|", flush=True)
    for name, step in wanted.items():
        start = time.monotonic()
        if "against" in step:
            reference = against.setdefault(name, made(_without_plan(step["against"])))
            changed = made(_without_plan(name))
        else:
            reference = against.setdefault("", original.model.to(device))
            chosen = {"calibration": {"windows": 64}, "embedding": "keep", "lm_head": "keep", "steps": [step]}
            changed = made(Recipe.from_dict(chosen))
        took = time.monotonic() - start
        runner, before = torch_runner(changed), torch_runner(reference)
        shares: list[Tensor] = []
        layers = {n: m for n, m in changed.named_modules() if isinstance(m, FewerExperts)}
        with hearing(layers, lambda _, args, kept, shares=shares: shares.append(kept.double().mean())):
            losses = measure(runner, test).losses
        whole, kl = measure(before, test).losses, measure(runner, test[:16], before).kl
        saved = 1 - torch.stack(shares).mean().item()
        low, high = (math.exp(x) for x in paired_interval(losses, whole))
        ratio = math.exp(losses.mean() - whole.mean())
        print(f"| {name} | {saved:.3f} | × {ratio:.4f} ({low:.4f} … {high:.4f}) | {kl.mean():.4f} |", flush=True)
        line = {
            "commit": git.stdout.strip(), "model": Path(arguments.model).name, "row": name, "saved": round(saved, 4),
            "ratio": round(ratio, 5), "interval": [round(low, 5), round(high, 5)], "kl": round(kl.mean().item(), 5),
            "perplexity": round(math.exp(losses.mean()), 3), "seconds": round(took), "device": str(device),
        }  # fmt: skip
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _without_plan(name: str) -> Recipe:
    return Recipe.load(name).model_copy(update={"expert_plan": None, "exports": ["safetensors"]})


if __name__ == "__main__":
    main()
