"""Experts of 1 to 8 bits on a mixture of experts: which expert gets how many, by KL at equal bytes.

    .venv/bin/python bench/moe.py --model ../shared/models/moe-28m --data wikitext2/valid.txt --text wikitext2/test.txt

One calibration for all rows: an expert's codes depend on its width alone, so every width of every expert is rounded
once, by GPTQ, and a row is a choice among them, the one that the step `pmq` of that row makes. The rest of the model
stays as it is. Prints a table and appends a JSON line a row to bench/results/moe.jsonl. "Below the line": KL minus what
lies on the straight line between uniform widths at the same bytes; "to the first": KL minus that of the first row of
the same bits and choices; both as 95 % intervals over windows.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.allocation import Choice, allocate
from compressor.calibrate import Calibration, calibrate, calibrate_blocks, fast_dtype
from compressor.data import text_of, windows
from compressor.evaluate import measure, paired_interval, torch_runner
from compressor.knapsack import exact
from compressor.layers import build
from compressor.methods import gptq
from compressor.methods.pmq import PMQ
from compressor.methods.quantize import Quantize
from compressor.model import linears, load_model, twin
from compressor.sensitivity import output_fisher
from compressor.statistics import ChannelSquare, Gram, TokenSample
from compressor.steps import FISHER_WINDOWS, SURVEY_WINDOWS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "moe.jsonl"
WIDTHS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Weighed(PMQ):
    """PMQ that weighs every expert in every width once."""

    known = {}  # noqa: RUF012  (for all instances)

    def _weigh(self, expert: int, use: Any, *rest: Any) -> dict[int, float]:
        key = (use.view.name, expert, self.significance, self.seed, self.alpha, self.beta)
        if key not in self.known:
            every = {b: Quantize(f"int{b}", group_size=self.group_size) for b in WIDTHS}  # type: ignore[arg-type]
            self.known[key] = super()._weigh(expert, use, *rest[:-1], every)
        return {b: self.known[key][b] for b in rest[-1]}


def rows() -> dict[str, tuple[float, tuple[int, ...], dict[str, Any]]]:
    """Row -> (bits, choices, options)."""
    found: dict[str, tuple[float, tuple[int, ...], dict[str, Any]]] = {
        "2.5 of 2, 3": (2.5, (2, 3), {}),
        "2.5 of 2, 3: layer by layer": (2.5, (2, 3), {"scope": "layer"}),
        "2.5 of 2, 3: pmq": (2.5, (2, 3), {"significance": "pmq"}),
        "2.5 of 2, 3: pmq, layer by layer": (2.5, (2, 3), {"significance": "pmq", "scope": "layer"}),
        "2.5 of 2, 3: ε alone, layer by layer": (
            2.5, (2, 3), {"significance": "pmq", "scope": "layer", "alpha": 0.0, "beta": 0.0},
        ),
        "2.5 of 2, 4": (2.5, (2, 4), {}),
        "2.5 of 1, 2, 3, 4": (2.5, (1, 2, 3, 4), {}),
        "3.0 of 1, 2, 3, 4": (3.0, (1, 2, 3, 4), {}),
    }  # fmt: skip
    found |= {f"2.5 of 2, 3: random {s}": (2.5, (2, 3), {"significance": "random", "seed": s}) for s in (1, 2, 3)}
    found |= {f"2.5 of 2, 4: random {s}": (2.5, (2, 4), {"significance": "random", "seed": s}) for s in (1, 2)}
    for bits in (1.5, 1.75, 2.0, 2.5):
        found[f"{bits} of 1, 2, 3"] = (bits, (1, 2, 3), {})
        found[f"{bits} of 1, 2, 3: pmq, layer by layer"] = (bits, (1, 2, 3), {"significance": "pmq", "scope": "layer"})
    return found


def programs() -> None:
    """How long one layer's program takes, on random costs that fall by 4 with every bit; both solvers must agree."""
    print("| experts | choices | CBC | dynamic programming |\n|---|---|---|---|")
    for experts, widths in ((64, (1, 2, 3)), (64, (2, 4, 8)), (256, (1, 2, 3)), (256, (2, 4, 8))):
        r = random.Random(experts)
        groups = {}
        for e in range(experts):
            cost = 10 ** r.uniform(-4, 0)
            groups[f"e{e}"] = [Choice(str(b), 1536 * b, cost * 4.0**-b * r.uniform(0.8, 1.2)) for b in widths]
        budget = sum(options[1].size_bytes for options in groups.values())
        start = time.perf_counter()
        found = allocate(groups, budget)
        solved = time.perf_counter()
        chosen = exact(groups, budget)
        done = time.perf_counter()
        assert chosen is not None
        least = sum(next(c.cost for c in groups[n] if c.name == chosen[n]) for n in groups)
        assert abs(found.cost - least) <= 1e-5 * least, (found.cost, least)
        print(f"| {experts} | {widths} | {solved - start:.3f} s | {done - solved:.3f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--text")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", nargs="+", default=list(rows()), choices=list(rows()), metavar="ROW")
    parser.add_argument("--program", action="store_true", help="time the program instead")
    arguments = parser.parse_args()
    if arguments.program:
        programs()
        return
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    original = load_model(arguments.model)
    model, dtype = original.model, fast_dtype(torch.device("cpu"))
    content = text_of(arguments.data)[0]
    seen = windows(original.tokenizer, content, arguments.calibration_windows, 512)
    test = windows(original.tokenizer, text_of(arguments.text)[0], 16, 512)
    layers = {n: m for n, m in linears(model).items() if ".experts." in n}

    start = time.monotonic()
    survey = calibrate(model, seen[:SURVEY_WINDOWS], {ChannelSquare, TokenSample}, layers, dtype=dtype)
    fisher = output_fisher(model, seen[:FISHER_WINDOWS], [*layers], torch.Generator().manual_seed(0))
    left: dict[int, list[float]] = {}
    decoded: dict[int, dict[str, Tensor]] = {b: {} for b in WIDTHS}

    def round_block(part: Calibration) -> None:
        own = {n: m for n, m in layers.items() if n in part}
        for b in WIDTHS:
            method = Quantize(f"int{b}", group_size=arguments.group_size, rounding="gptq")  # type: ignore[arg-type]
            plans = method.plan(own, part)
            decoded[b] |= {n: build(method.apply(m, plans[n])).dequantize() for n, m in own.items()}
            for n, m in own.items():
                nearest = build(method.apply(m, replace(plans[n], hessian=None))).dequantize()
                gram = part.value(n, Gram)
                errors = [gptq.error(m.weight.detach(), w, gram).item() for w in (decoded[b][n], nearest)]
                left.setdefault(b, []).append(errors[0] / errors[1])

    calibrate_blocks(model, seen, {Gram}, round_block, layers, dtype=dtype)
    print(f"calibrated and rounded in {time.monotonic() - start:.0f} s", flush=True)
    print("what GPTQ leaves of the squared error:", {b: round(sum(v) / len(v), 3) for b, v in left.items()})
    runner = torch_runner(model)
    cached: dict[int, Tensor] = {}
    for window in test:
        cached[hash(window.numpy().tobytes())] = runner(window[None])

    def kl_of(widths: dict[str, int]) -> tuple[Tensor, float]:
        changed = twin(model)
        for name, b in widths.items():
            changed.get_submodule(name).weight = nn.Parameter(decoded[b][name], False)
        found = measure(torch_runner(changed), test, lambda ids: cached[hash(ids[0].numpy().tobytes())])
        return found.kl, (found.losses.mean() - found.base_losses.mean()).exp().item()

    scales = 16 / arguments.group_size
    uniform: dict[int, Tensor] = {}
    first: dict[str, Tensor] = {}
    print("| experts | bits | with scales | KL | perplexity | below the line | to the first |")
    print("|---|---|---|---|---|---|---|")

    def report(name: str, codes: float, kl: Tensor, ratio: float, solved_s: float = 0.0) -> None:
        spread = kl.std().item() / len(kl) ** 0.5
        line = {
            "commit": git.stdout.strip(), "row": name, "group_size": arguments.group_size, "bits": codes,
            "stored_bits": codes + scales, "kl": kl.mean().item(), "kl_standard_error": spread, "ppl_ratio": ratio,
            "survey_s": round(solved_s, 2),
        }  # fmt: skip
        below = ""
        if codes not in uniform and (low := max((b for b in uniform if b <= codes), default=0)):
            share = codes - low
            on_line = (1 - share) * uniform[low] + share * uniform[low + 1]
            line["below_line"] = paired_interval(kl, on_line)
            below = f"{line['below_line'][0]:+.4f} … {line['below_line'][1]:+.4f}"
        to_first = ""
        if (other := first.setdefault(name.split(": ")[0], kl)) is not kl:
            line["to_first"] = paired_interval(kl, other)
            to_first = f"{line['to_first'][0]:+.4f} … {line['to_first'][1]:+.4f}"
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        value = f"{kl.mean():.4f} ± {spread:.4f}"
        bits = f"{codes:.3f} | {codes + scales:.3f}"
        print(f"| {name} | {bits} | {value} | × {ratio:.4f} | {below} | {to_first} |", flush=True)

    for b in WIDTHS:
        uniform[b], ratio = kl_of(dict.fromkeys(layers, b))
        report(f"all int{b}", float(b), uniform[b], ratio)
    for name in arguments.rows:
        bits, choices, options = rows()[name]
        start = time.monotonic()
        method = Weighed(bits, choices, group_size=arguments.group_size, **options)
        decision = method.survey(layers, survey, fisher)
        solved_s = time.monotonic() - start
        print(decision.report()["summary"], flush=True)
        kl, ratio = kl_of(decision.widths)
        report(name, decision.bits_per_weight[0], kl, ratio, solved_s)


if __name__ == "__main__":
    main()
