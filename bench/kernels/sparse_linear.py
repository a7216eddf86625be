"""Products that skip the weights of small inputs, beside the dense ones of the same weights, in onnxruntime.

    .venv/bin/python bench/kernels/sparse_linear.py [--rows 4096] [--columns 14336] [--sparsity 0.5] [--repeats 11]

One token, weights in --copies nodes, so that no cache holds them until they are read again. For each format the stock
op, our dense op and SparseLinear, in turn, --repeats times: median and best of each. GB/s are of the best; `floor` is
what the bytes that must be read take at those of the fastest dense float32 product of this run.
Appends a JSON line a row to bench/results/sparse_linear.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ort_linear import bytes_of, session

from compressor.kernels import native

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "sparse_linear.jsonl"
OURS, STOCK = "ai.compressor", "com.microsoft"
LARGER = 160 << 20  # bytes of all copies: more than any cache here


def formats(n: int, k: int, threshold: np.ndarray) -> Any:
    """(format, bytes of the weight, bytes of scales, [(label, domain, op, attributes, tensors)])."""
    rng = np.random.default_rng(0)

    def sparse(format: str, tokens: str, *tensors: Any) -> Any:
        label = "SparseLinear" if tokens == "decode" else "SparseLinear, tokens: none"
        return label, OURS, "SparseLinear", {"format": format, "tokens": tokens}, [("threshold", threshold), *tensors]

    weight = rng.random((n, k), dtype=np.float32)
    yield "float32", weight.nbytes, 0, [
        ("MatMul", "", "MatMul", {}, [("weight", np.ascontiguousarray(weight.T))]),
        sparse("float", "none", ("weight", weight)),
        sparse("float", "decode", ("weight", weight)),
    ]  # fmt: skip
    codes, scale = bytes_of(rng, n, k // 2), rng.random((n, k // 32), dtype=np.float32)
    blocks = codes.reshape(n, k // 32, 16)
    stock = {"K": k, "N": n, "bits": 4, "block_size": 32}
    own = {"bits": 4, "group_size": 32, "activations": "none", "packed": 1, "in_features": k, "hadamard": 0}
    tensors = [("weight", blocks), ("scale", scale)]
    yield "int4 of 32", codes.nbytes, scale.nbytes, [
        ("MatMulNBits, level 0", STOCK, "MatMulNBits", {**stock, "accuracy_level": 0}, tensors),
        ("MatMulNBits, level 4 (rounds inputs)", STOCK, "MatMulNBits", {**stock, "accuracy_level": 4}, tensors),
        ("IntLinear", OURS, "IntLinear", own, [("weight", codes.view(np.int32)), ("scale", scale)]),
        sparse("int4", "decode", *tensors),
    ]  # fmt: skip
    import ml_dtypes

    steps = bytes_of(rng, n, k // 16, top=0x78).view(ml_dtypes.float8_e4m3fn)
    tensors = [("weight", codes), ("scale", steps), ("divisor", np.ones(1, np.float32))]
    own = {"format": "nvfp4", "activations": "none", "four_over_six": 0, "block_size": 16, "hadamard": 0}
    yield "nvfp4", codes.nbytes, steps.nbytes, [
        ("FP4Linear", OURS, "FP4Linear", own, tensors),
        sparse("nvfp4", "decode", *tensors),
    ]  # fmt: skip


def in_turn(runs: list[Any], x: np.ndarray, repeats: int) -> list[list[float]]:
    """The seconds of every run of each."""
    for run in runs:
        run(None, {"x": x})
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, found, strict=True):
            start = time.perf_counter()
            run(None, {"x": x})
            times.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    n, k = arguments.rows, arguments.columns
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    x = np.random.default_rng(1).standard_normal((1, k), dtype=np.float32)
    threshold = np.full(k, np.quantile(np.abs(x), arguments.sparsity), np.float32)
    kept, bandwidth = float((np.abs(x) > threshold).mean()), 0.0
    print(f"N {n}, K {k}, {kept:.3f} of the channels read, {arguments.threads} threads, {native.isa()}")
    print(f"{'format':10} {'op':36} {'median':>7} {'best ms':>7} {'GB/s':>6} {'floor':>6}")
    for format, weights, scales, ops in formats(n, k, threshold):
        copies = -(-LARGER // weights)
        runs = [session(*op[1:], arguments.threads, copies).run for op in ops]
        times = [[t / copies for t in found] for found in in_turn(runs, x, arguments.repeats)]
        if format == "float32":
            bandwidth = max(weights / min(found) for found in times[:2])
        for (label, *_, attributes, _), found in zip(ops, times, strict=True):
            median, best = statistics.median(found), min(found)
            skips = attributes.get("tokens") == "decode"
            read = (weights * kept if skips else weights) + scales
            row = {
                "commit": git.stdout.strip(), "cores": os.cpu_count(), "isa": native.isa(), "format": format,
                "op": label, "n": n, "k": k, "kept": round(kept, 4), "threads": arguments.threads,
                "onnxruntime": onnxruntime.__version__, "ms": round(median * 1e3, 3),
                "best_ms": round(best * 1e3, 3), "gb_per_s": round(read / best / 1e9, 2),
                "floor_ms": round(read / bandwidth * 1e3, 3),
            }  # fmt: skip
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{format:10} {label:36} {row['ms']:7} {row['best_ms']:7} {row['gb_per_s']:6} "
                  f"{row['floor_ms']:6}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
