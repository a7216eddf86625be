"""Quality of the shipped recipes and of their parts on the demo model: perplexity, KL and top-1 by one protocol.

    .venv/bin/python bench/quality.py --data wikitext2/valid.txt --text wikitext2/test.txt [--rows w4a4 "20% of*"]

Prints the tables of README and docs and appends one JSON line per row to bench/results/quality.jsonl. A row with a
reference also gets the paired 95 % bootstrap interval of its KL minus the reference's: below zero, it is better. Where
the reference is not among --rows, its own reference takes its place, and so on.
Perplexity comes with that of its ratio to the original's.
Perplexity is over --windows windows, KL and top-1 over the first 16.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from compressor import Recipe, compress
from compressor.data import text_of, windows
from compressor.evaluate import Runner, measure, paired_interval, torch_runner
from compressor.folder import coverage
from compressor.model import load_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
OWN_OPS = ["runtime=compressor", "quantize.four_over_six=true"]
NVFP4 = [f"{step}.{option}=nvfp4" for step in ("rotate", "quantize") for option in ("weights", "activations")]
FOLDED = ["rotate.inputs=0", "rotate.residual=hadamard", "rotate.values=true"]
# Megabytes of the demo model's linears and table together: mixed-small's, and NVFP4 linears beside a bf16 table.
SMALL, EQUAL = 87.0757, 116.3431
TABLES = {"bf16": 56.6232, "nvfp4": 15.9253, "int8-row": 28.4099}
EIGHT = "weights: fp8, activations: fp8, on_misfit: keep, rounding: gptq"
FOUR = "weights: nvfp4, activations: nvfp4, on_misfit: keep, rounding: gptq"
A16 = "weights: nvfp4, on_misfit: keep, rounding: gptq"
ENDS = [f"*.layers.{i}.*" for i in (0, 1, 2, 3, 26, 27, 28, 29)]
ONE_SCALE = [f"outlier_tune.{o}" for o in ("alpha=0", "static_within=1000000", "hadamard=0", "rounding=nearest")]


def eight_bits_for(targets: list[str]) -> list[str]:
    """fp4-mixed with the layers that get FP8 named, and not chosen."""
    smooth = "{smooth: {rule: smoothquant, alpha: 0.7}}"
    named = f"{{quantize: {{targets: {targets}, {EIGHT}}}}}"
    rest = f"{{quantize: {{ignore: {targets}, {FOUR}}}}}"
    return [f"steps=[{smooth}, {named}, {rest}]"]


def megabytes(size: float, table: str) -> list[str]:
    """mixed-small with `size` MB for linears and table, which is auto or has a format of its own."""
    linears = size - TABLES.get(table, 0.0)
    return [f"embedding={table}", f"lm_head={table}", "mixed_bits.bits=null", f"mixed_bits.size_mb={linears:.4f}"]


def svd_rows() -> dict[str, tuple[str, list[str], str | None]]:
    """What each part of the svd recipes is worth, from 10, 20 and 40 % of the linears' weights removed."""
    uniform, two = "svd.allocation=uniform", "svd.form=plain"
    rows: dict[str, tuple[str, list[str], str | None]] = {}
    for share in (90, 80, 60):
        keep, name = f"svd.keep={share / 100}", f"svd-{share}"
        rows |= {
            f"{name}, plain": ("svd-80", [keep, "svd.metric=plain", uniform, two], None),
            f"{name}, asvd": ("svd-80", [keep, "svd.metric=asvd", uniform, two], f"{name}, plain"),
            f"{name}, inputs": ("svd-80", [keep, "svd.metric=inputs", uniform, two], f"{name}, asvd"),
            f"{name}, inputs, pivoted": ("svd-80", [keep, "svd.metric=inputs", uniform], f"{name}, inputs"),
            f"{name}, equal ranks": ("svd-80", [keep, uniform], f"{name}, inputs, pivoted"),
            name: ("svd-80", [keep], f"{name}, equal ranks"),
        }
    rows["svd-80, K-FAC"] = ("svd-80", ["svd.metric=kfac"], "svd-80")
    rows["svd-80, K-FAC, equal ranks"] = ("svd-80", ["svd.metric=kfac", uniform], "svd-80, equal ranks")
    rows["svd-80, ranks of svd_llm2"] = ("svd-80", ["svd.allocation=svd_llm2"], "svd-80, equal ranks")
    rows["svd-80, ranks by relative error"] = ("svd-80", ["svd.allocation=relative"], "svd-80, equal ranks")
    return rows


# Row -> (recipe, overrides, the row it is compared with).
ROWS: dict[str, tuple[str, list[str], str | None]] = {
    "w4a4-rtn, abs-max scales": ("w4a4-rtn", ["quantize.scales=absmax"], None),
    "w4a4-rtn": ("w4a4-rtn", [], "w4a4-rtn, abs-max scales"),
    "w4a4-rtn, four-over-six": ("w4a4-rtn", OWN_OPS, "w4a4-rtn"),
    "w4a4": ("w4a4", [], "w4a4-rtn"),
    "w4a4 without smooth": ("w4a4-rtn", ["quantize.rounding=gptq", "quantize.guard=0.25"], "w4a4"),
    "w4a4 without GPTQ": ("w4a4", ["quantize.rounding=nearest"], "w4a4"),
    "w4a4 without guard": ("w4a4", ["quantize.guard=0"], "w4a4"),
    "w4a4 sequential": ("w4a4", ["quantize.sequential=true"], "w4a4"),
    "w4a4-max": ("w4a4-max", [], "w4a4"),
    "w4a4-max without guard": ("w4a4-max", ["quantize.guard=0"], "w4a4-max"),
    "nvfp4, GPTQ": ("w4a4-rtn", ["quantize.rounding=gptq"], None),
    "nvfp4, GPTQ, hadamard 16": ("mxfp4-hadamard", [*NVFP4, "rotate.inputs=16", "rotate.where=all"], "nvfp4, GPTQ"),
    "nvfp4, GPTQ, R1 and R2": ("mxfp4-hadamard", [*NVFP4, *FOLDED], "nvfp4, GPTQ"),
    "nvfp4a16 nearest, abs-max scales": ("nvfp4a16", ["quantize.rounding=nearest", "quantize.scales=absmax"], None),
    "nvfp4a16 nearest": ("nvfp4a16", ["quantize.rounding=nearest"], "nvfp4a16 nearest, abs-max scales"),
    "nvfp4a16": ("nvfp4a16", [], "nvfp4a16 nearest"),
    "nvfp4a16-small": ("nvfp4a16-small", [], "nvfp4a16"),
    "w4a8-cpu": ("w4a8-cpu", [], "nvfp4a16-small"),
    "w4a16": ("w4a16", [], None),
    "mxfp4": ("mxfp4", [], None),
    "mxfp4-hadamard without rotation": ("mxfp4", ["quantize.rounding=gptq"], "mxfp4"),
    "mxfp4-hadamard": ("mxfp4-hadamard", [], "mxfp4-hadamard without rotation"),
    "mxfp4-hadamard, every input": ("mxfp4-hadamard", ["rotate.where=all"], "mxfp4-hadamard"),
    "mxfp4-hadamard without GPTQ": ("mxfp4-hadamard", ["quantize.rounding=nearest"], "mxfp4"),
    "mxfp4, R1 and R2 instead": ("mxfp4-hadamard", FOLDED, "mxfp4-hadamard"),
    "w4a16 g64": ("w4a16", ["quantize.group_size=64"], None),
    "w4a16 g64 with AWQ": ("w4a16-gptq", ["quantize.rounding=nearest"], "w4a16 g64"),
    "w4a16 g64 with GPTQ": ("w4a16", ["quantize.group_size=64", "quantize.rounding=gptq"], "w4a16 g64"),
    "w4a16-gptq": ("w4a16-gptq", [], "w4a16 g64 with GPTQ"),
    "mixed-small": ("mixed-small", [], "nvfp4a16-small"),
    "mixed-small, table nvfp4": ("mixed-small", megabytes(SMALL, "nvfp4"), "mixed-small"),
    "mixed-small, table int8-row": ("mixed-small", megabytes(SMALL, "int8-row"), "mixed-small"),
    "116 MB, table auto": ("mixed-small", megabytes(EQUAL, "auto"), "nvfp4a16"),
    "116 MB, table bf16": ("mixed-small", megabytes(EQUAL, "bf16"), "116 MB, table auto"),
    "116 MB, table nvfp4": ("mixed-small", megabytes(EQUAL, "nvfp4"), "116 MB, table auto"),
    "fp4-mixed": ("fp4-mixed", [], None),
    "FP8 for every down_proj": ("fp4-mixed", eight_bits_for(["*.down_proj"]), None),
    "fp4-mixed, 5.38 bits": ("fp4-mixed", ["mixed_bits.bits=5.3776"], "FP8 for every down_proj"),
    "FP8 for the outer 8 blocks": ("fp4-mixed", eight_bits_for(ENDS), None),
    "fp4-mixed, 5.44 bits": ("fp4-mixed", ["mixed_bits.bits=5.4395"], "FP8 for the outer 8 blocks"),
    **svd_rows(),
    "svd-80 sequential": ("svd-80", ["svd.sequential=true"], "svd-80"),
    "svd-w4a4": ("svd-w4a4", [], None),
    "svd-w4a4, pivoted": ("svd-w4a4", ["svd.form=pivoted"], "svd-w4a4"),
    "fp4-lowrank": ("fp4-lowrank", ["exports=[safetensors]"], "w4a4"),
    "fp4-lowrank, equal ranks": ("fp4-lowrank", ["exports=[safetensors]", "correct.allocation=uniform"], "fp4-lowrank"),
    "w4a4, 5 bits with FP8": ("fp4-mixed", ["mixed_bits.bits=5.0"], "fp4-lowrank"),  # as many bytes as the pairs
    "fp4-lowrank without guard": (
        "fp4-lowrank",
        ["exports=[safetensors]", "quantize.guard=0"],
        "w4a4, 5 bits with FP8",
    ),
    "nvfp4a16, corrected": ("nvfp4a16", [f"steps=[{{quantize: {{{A16}}}}}, {{correct: {{bits: 0.5}}}}]"], "nvfp4a16"),
    "w8a8": ("w8a8", [], None),
    "w8a8-outliertune": ("w8a8-outliertune", [], "w8a8"),
    "w8a8-outliertune nearest": ("w8a8-outliertune", ["outlier_tune.rounding=nearest"], "w8a8"),
    "w8a8 static, one scale": ("w8a8-outliertune", ONE_SCALE, "w8a8-outliertune nearest"),
    "w6a6-outliertune": ("w6a6-outliertune", [], None),
    "w6a6-outliertune without rotation": ("w6a6-outliertune", ["outlier_tune.hadamard=0"], "w6a6-outliertune"),
    "w6a6-outliertune without offsets": ("w6a6-outliertune", ["outlier_tune.symmetrize=auto"], "w6a6-outliertune"),
    "w6a6-outliertune nearest": ("w6a6-outliertune", ["outlier_tune.rounding=nearest"], "w6a6-outliertune"),
    "w6a6-outliertune, no fixed range": ("w6a6-outliertune", ["outlier_tune.static_within=0"], "w6a6-outliertune"),
    "w6a6 static, one scale": ("w6a6-outliertune", ONE_SCALE, "w6a6-outliertune"),
    "fp8": ("fp8", [], None),
    "llm-fp4 absmax": ("llm-fp4", ["fp4.search=absmax", "fp4.shift=false"], None),
    "llm-fp4": ("llm-fp4", [], "llm-fp4 absmax"),
    "llm-fp4 without shift": ("llm-fp4", ["fp4.shift=false"], "llm-fp4"),
    "llm-fp4, inputs by abs-max": ("llm-fp4", ["fp4.search=weights"], "llm-fp4"),
    "llm-fp4 rows": ("llm-fp4", ["fp4.block=null"], "llm-fp4"),
    "llm-fp4 W4A8": ("llm-fp4", ["fp4.activation_bits=8"], "llm-fp4"),
}


def pruned(share: float, score: str, allocation: str = "uniform", repair: str = "none") -> list[str]:
    """cfsp-20 at another share and by another rule."""
    rule = {"prune": share, "score": score, "allocation": allocation, "repair": repair}
    return [f"cfsp.{name}={value}" for name, value in rule.items()]


for share in (0.2, 0.3, 0.5):
    best = f"{share:.0%} of the channels, obs, cfsp, least squares"
    ROWS[best] = ("cfsp-20", pruned(share, "obs", "cfsp", "least_squares"), None)
    for score in ("random", "magnitude", "wanda_sp", "cfsp_code", "cfsp_rel", "out_energy"):
        ROWS[f"{share:.0%} of the channels, {score}"] = ("cfsp-20", pruned(share, score), best)
    ROWS[f"{share:.0%} of the channels, FLAP"] = ("cfsp-20", pruned(share, "flap", "global", "bias"), best)
    ROWS[f"{share:.0%} of the channels, out_energy, cfsp"] = ("cfsp-20", pruned(share, "out_energy", "cfsp"), best)
    for score, allocation in (("out_energy", "cfsp"), ("obs", "uniform")):
        name = f"{share:.0%} of the channels, {score}, {allocation}, least squares"
        ROWS[name] = ("cfsp-20", pruned(share, score, allocation, "least_squares"), best)
for share in (0.25, 0.5):  # of a mixture: --model FOLDER
    best = f"{share:.0%} of the experts, reap"
    ROWS[best] = ("cfsp-20", [f"steps=[{{experts: {{prune: {share}, score: reap}}}}]"], None)
    ROWS[f"{share:.0%} of the experts, activation"] = (
        "cfsp-20",
        [f"steps=[{{experts: {{prune: {share}, score: activation}}}}]"],
        best,
    )
    narrower = pruned(share, "obs", "uniform", "least_squares")
    ROWS[f"{share:.0%} of every expert's channels"] = ("cfsp-20", narrower, best)
ROWS["cfsp-30-w4a4"] = ("cfsp-30-w4a4", [], "w4a4")
ROWS["cfsp-30-recover"] = ("cfsp-30-recover", [], "30% of the channels, obs, cfsp, least squares")
ROWS["depth-10"] = ("depth-10", [], None)


LONGER = ["search_windows=8", "population=32", "generations=30"]
for share in (25, 40, 50):
    for rule, options in {
        "TEAL": ["score=magnitude", "allocation=uniform"],  # one threshold a layer, one sparsity for all
        "columns, equal sparsity": ["allocation=uniform"],
        "magnitude": ["score=magnitude"],
        "fisher": ["score=fisher"],
        "with pairs": ["alpha=null"],
        "greedy in equal blocks": ["allocation=greedy", "start=uniform"],
        "greedy": ["allocation=greedy"],
        "evolutionary": ["allocation=evolutionary"],
        "evolutionary, longer": ["allocation=evolutionary", *LONGER],
        "evolutionary with pairs": ["allocation=evolutionary", "alpha=null", *LONGER],
    }.items():
        chosen = [f"r_sparse.{option}" for option in (f"sparsity={share / 100}", *options)]
        ROWS[f"r-sparse-{share}, {rule}"] = ("r-sparse-50", chosen, None if rule == "TEAL" else f"r-sparse-{share}")
    ROWS[f"r-sparse-{share}"] = ("r-sparse-50", [f"r_sparse.sparsity={share / 100}"], f"r-sparse-{share}, TEAL")
for share in (25, 40):  # up and down of all neurons are half of the demo model's linears: 50 % would leave none
    ROWS[f"r-sparse-{share}, CATS"] = (
        "r-sparse-50",
        [f"steps=[{{cats: {{sparsity: {share / 100}}}}}]"],
        f"r-sparse-{share}",
    )
# TEAL's own protocol: each window's first half is dense. Every other row has all tokens but the first sparse.
HALF_DENSE = [f"{name}, first half of each window dense" for name in ("r-sparse-50, TEAL", "r-sparse-50")]
ROWS[HALF_DENSE[0]] = (*ROWS["r-sparse-50, TEAL"][:2], None)
ROWS[HALF_DENSE[1]] = (*ROWS["r-sparse-50"][:2], HALF_DENSE[0])
ROWS["r-sparse-40-w4a16"] = ("r-sparse-40-w4a16", [], "w4a16-gptq")


def reference_of(row: str, known: Collection[str]) -> str | None:
    """What a row is compared with among `known`: its reference, or that one's, and so on."""
    reference = ROWS[row][2]
    while reference is not None and reference not in known:
        reference = ROWS[reference][2]
    return reference


def cache(run: Runner, windows: int) -> Runner:
    """The original's logits, computed once for all rows where 100 MB a window are little."""
    if windows > 64:
        return run
    known: dict[bytes, Tensor] = {}

    def cached(ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in known:
            known[key] = run(ids)
        return known[key]

    return cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default=None, help="the demo model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="names or patterns of them [all]")
    arguments = parser.parse_args()
    for pattern in arguments.rows:
        if not fnmatch.filter(ROWS, pattern):
            parser.error(f"no row is called '{pattern}'; rows are:\n  " + "\n  ".join(ROWS))
    rows = dict.fromkeys(name for pattern in arguments.rows for name in fnmatch.filter(ROWS, pattern))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    original = load_model(arguments.model, arguments.device)
    test = windows(original.tokenizer, text_of(arguments.text)[0], arguments.windows, 512)
    print("| row | bits a weight | perplexity | KL | top-1 | KL minus the reference's |\n|---|---|---|---|---|---|")
    base = cache(torch_runner(original.model), arguments.windows)
    kls: dict[str, Tensor] = {}
    for name in rows:
        start = time.monotonic()
        recipe_name, overrides, _ = ROWS[name]
        recipe = Recipe.load(recipe_name, [*overrides, f"calibration.windows={arguments.calibration_windows}"])
        artifact = compress(original.model, recipe, tokenizer=original.tokenizer, data=arguments.data, measure=False)
        model = artifact.model(dense=True, device=arguments.device)
        dense = 0.5 if name in HALF_DENSE else 0.0
        found = measure(torch_runner(model), test, base, dense=dense)
        covered = coverage(artifact)
        line = {
            "commit": git.stdout.strip(),
            "row": name,
            **({"model": Path(arguments.model).name} if arguments.model else {}),
            "calibration_windows": arguments.calibration_windows,
            "windows": arguments.windows,
            **({"dense_share": dense} if dense else {}),
            "device": arguments.device,
            "bits_per_weight": covered["bits_per_compressed_weight"] or 16.0,  # factors that nothing packs are bf16
            "parameters": round(covered["parameters"] / covered["original_parameters"], 4),
            "ppl_ratio": [math.exp(bound) for bound in paired_interval(found.losses, found.base_losses)],
            "ppl": found.losses.mean().exp().item(),
            "base_ppl": found.base_losses.mean().exp().item(),
            "kl": found.kl.mean().item(),
            "top1": found.agreement.mean().item(),
            "seconds": round(time.monotonic() - start),
        }
        against = ""
        if (reference := reference_of(name, kls)) is not None:
            interval = paired_interval(found.kl, kls[reference])
            line |= {"reference": reference, "kl_difference": interval}
            against = f"{interval[0]:+.3f} … {interval[1]:+.3f} ({reference})"
        kls[name] = found.kl
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"| {name} | {line['bits_per_weight']:.2f} | {line['ppl']:.2f} ({line['base_ppl']:.2f} before, "
            f"x {line['ppl_ratio'][0]:.3f} … {line['ppl_ratio'][1]:.3f}) "
            f"| {line['kl']:.3f} | {line['top1']:.3f} | {against} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
