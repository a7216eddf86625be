"""One product with a large stored matrix in onnxruntime: our fused ops beside the stock MatMulNBits and MatMul.

    .venv/bin/python bench/kernels/ort_linear.py [--rows 16384] [--columns 4096] [--threads 1 2] [--repeats 5]

Decode is one token: GB/s of stored weight bytes read, from a matrix that no cache holds. Prefill is --tokens at once:
GFLOP/s, two a weight and token. Median of --repeats runs, each op in the same session settings on the same machine.
Appends a JSON line a row to bench/results/ort_linear.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import compressor
from compressor.kernels import native

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "ort_linear.jsonl"


def bytes_of(rng: np.random.Generator, *shape: int, top: int = 256) -> np.ndarray:
    return rng.integers(0, top, shape, dtype=np.uint8)


def nodes(n: int, k: int) -> Iterator[tuple[str, str, str, dict[str, Any], list[tuple[str, np.ndarray] | None]]]:
    """(label, domain, op, attributes, inputs behind x); the values are random, the bytes are what is timed."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return rng.random(shape, dtype=np.float32)

    def e4m3(*shape: int) -> np.ndarray:
        return bytes_of(rng, *shape, top=0x78).view(ml_dtypes.float8_e4m3fn)

    ours = "ai.compressor"
    one = np.ones(1, np.float32)
    for rule in ("none", "nvfp4", "int8"):
        attributes = {"format": "nvfp4", "activations": rule, "four_over_six": 0, "block_size": 16, "hadamard": 0}
        given = ("input_global_scale", one) if rule == "nvfp4" else None
        packed, steps = bytes_of(rng, n, k // 2), e4m3(n, k // 16)
        tensors = [("weight_packed", packed), ("weight_scale", steps), ("divisor", one), given]
        yield f"FP4Linear nvfp4, input {rule}", ours, "FP4Linear", attributes, tensors
    attributes = {"bits": 4, "group_size": 32, "activations": "none", "packed": 1, "in_features": k, "hadamard": 0}
    words = bytes_of(rng, n, k // 2).view(np.int32)
    yield "IntLinear int4 of 32", ours, "IntLinear", attributes, [("weight", words), ("scale", floats(n, k // 32))]
    for bits in (1, 2, 3):
        few, words = attributes | {"bits": bits, "group_size": 128}, bytes_of(n, k * bits // 8).view(np.int32)
        yield f"IntLinear int{bits} of 128", ours, "IntLinear", few, [("weight", words), ("scale", floats(n, k // 128))]
    attributes = attributes | {"bits": 8, "group_size": 0, "activations": "int8", "packed": 0}
    integers = bytes_of(rng, n, k).view(np.int8)
    yield "IntLinear int8, input int8", ours, "IntLinear", attributes, [("weight", integers), ("scale", floats(n, 1))]
    attributes = {"activations": "none", "hadamard": 0}
    yield "FP8Linear", ours, "FP8Linear", attributes, [("weight", e4m3(n, k)), ("scale", floats(n, 1))]
    attributes = {"format": "e3m2", "activations": "none", "block_size": 0}
    tensors = [("weight_packed", bytes_of(rng, n, k * 6 // 8)), ("scale", floats(n, 1))]
    yield "FloatLinear e3m2", ours, "FloatLinear", attributes, tensors
    for level in (0, 4):
        attributes = {"K": k, "N": n, "bits": 4, "block_size": 32, "accuracy_level": level}
        tensors = [("weight", bytes_of(rng, n, k // 32, 16)), ("scale", floats(n, k // 32))]
        yield f"MatMulNBits int4 of 32, level {level}", "com.microsoft", "MatMulNBits", attributes, tensors
    yield "MatMul float32", "", "MatMul", {}, [("weight", floats(k, n))]


def session(
    domain: str, op: str, attributes: dict[str, Any], tensors: list[Any], threads: int, copies: int = 1
) -> Any:
    """Of `copies` such nodes over weights of their own, which read one x."""
    given, held = [], []
    for copy in range(copies):
        names = ["" if t is None else f"{t[0]}{copy}" for t in tensors]
        held += [numpy_helper.from_array(t[1], name) for t, name in zip(tensors, names, strict=True) if t is not None]
        given.append(helper.make_node(op, ["x", *names], [f"y{copy}"], domain=domain, **attributes))
    x, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("x", *(f"y{copy}" for copy in range(copies)))
    )
    graph = helper.make_graph(given, "linears", [x], outputs, held)
    opsets = [helper.make_opsetid("", 21)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    compressor.register_ops(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(run: Any, x: np.ndarray, repeats: int) -> float:
    run(None, {"x": x})
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    n, k, tokens = arguments.rows, arguments.columns, arguments.tokens
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    rng = np.random.default_rng(1)
    print(f"{'op':34} {'threads':>7} {'decode ms':>10} {'GB/s':>6} {'prefill ms':>10} {'GFLOP/s':>8}")
    for label, domain, op, attributes, tensors in nodes(n, k):
        size = sum(t[1].nbytes for t in tensors if t is not None)
        for threads in arguments.threads:
            run = session(domain, op, attributes, tensors, threads).run
            one = seconds(run, rng.standard_normal((1, k), dtype=np.float32), arguments.repeats)
            many = seconds(run, rng.standard_normal((tokens, k), dtype=np.float32), arguments.repeats)
            row = {
                "commit": git.stdout.strip(), "cores": os.cpu_count(), "isa": native.isa(), "op": label,
                "n": n, "k": k, "tokens": tokens, "threads": threads, "onnxruntime": onnxruntime.__version__,
                "onnx": onnx.__version__, "decode_ms": round(one * 1e3, 3), "gb_per_s": round(size / one / 1e9, 2),
                "prefill_ms": round(many * 1e3, 2), "gflop_per_s": round(2 * n * k * tokens / many / 1e9, 1),
            }  # fmt: skip
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{label:34} {threads:7} {row['decode_ms']:10} {row['gb_per_s']:6} {row['prefill_ms']:10} "
                  f"{row['gflop_per_s']:8}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
