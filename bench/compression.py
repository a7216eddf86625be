"""How long and how large: ours beside llm-compressor's oneshot, same model, format, windows and machine.

    .venv/bin/python bench/compression.py --text wikitext2/valid.txt --windows 32 64 --repeats 3
    .venv/bin/python bench/compression.py --text wikitext2/valid.txt --windows 64 --job gptq

Jobs: `nvfp4`, NVFP4 weights and activations to nearest (`--recipe w4a4-rtn`; scheme NVFP4); `gptq`, INT4 weights in
groups of 64 by GPTQ and nothing else (its W4A16, groups of 128, refuses this model's width); `w4a16-gptq`, our recipe
with AWQ and the ONNX export beside the peer's GPTQ. Ours is the whole command without evaluation and verification. The
peer runs in `.venv-peers` (pip install torch==2.13.0 llmcompressor==0.14.0.1 gguf); without it its rows are missing.
Both read the same fp32 folder, made once from the demo model; each run is a process of its own, timed from its start,
with its CPU time and peak resident memory. Appends a JSON line a row to bench/results/compression.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "compression.jsonl"
PEER = ROOT / ".venv-peers" / "bin" / "python"

# Job -> our recipe and what is changed in it.
GPTQ_ALONE = ["quantize.rounding=gptq", "quantize.group_size=64", "exports=[safetensors]"]
JOBS: dict[str, tuple[str, list[str]]] = {
    "nvfp4": ("w4a4-rtn", []),
    "gptq": ("w4a16", GPTQ_ALONE),
    "w4a16-gptq": ("w4a16-gptq", []),
}
PEER_PROGRAM = """
import sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
source, text, windows, out, job = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
ids = tokenizer(open(text, encoding="utf-8").read())["input_ids"]
rows = [{"input_ids": ids[i * 512 : (i + 1) * 512], "attention_mask": [1] * 512} for i in range(windows)]
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
if job != "nvfp4":
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
else:
    recipe = QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head"])
data = Dataset.from_list(rows)
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=512, num_calibration_samples=windows)
model.save_pretrained(out, save_compressed=True)
"""
SOURCE_PROGRAM = """
import sys
from compressor.model import load_model
loaded = load_model(None)
loaded.model.save_pretrained(sys.argv[1])
loaded.tokenizer.save_pretrained(sys.argv[1])
"""


def run(command: list[str]) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak resident bytes) of one process. Raises when it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} failed: {errors[-2000:]}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", choices=list(JOBS), default="nvfp4")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        source = f"{scratch}/model"
        subprocess.run([sys.executable, "-c", SOURCE_PROGRAM, source], check=True)
        for windows in arguments.windows:
            recipe, overrides = JOBS[arguments.job]
            ours = [sys.executable, "-m", "compressor", "--recipe", recipe, "--model", source, "--data", arguments.text]
            ours += ["--no-verify", "--no-eval", "--force", "--out", f"{scratch}/ours"]
            ours += [part for o in (*overrides, f"calibration.windows={windows}") for part in ("--set", o)]
            peer = [str(PEER), "-c", PEER_PROGRAM, source, arguments.text, str(windows), f"{scratch}/peer"]
            peer += [arguments.job]
            programs = {"compressor": ours} | ({"llm-compressor": peer} if PEER.exists() else {})
            # In turns: what else the machine does meets both.
            rounds = [{name: run(command) for name, command in programs.items()} for _ in range(arguments.repeats)]
            for name in programs:
                measured = [r[name] for r in rounds]
                seconds = [s for s, _, _ in measured]
                line = {
                    "commit": commit,
                    "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                    "job": arguments.job,
                    "program": name,
                    "windows": windows,
                    "seconds": round(statistics.median(seconds), 1),
                    "seconds_range": [round(min(seconds), 1), round(max(seconds), 1)],
                    "cpu_seconds": round(statistics.median(c for _, c, _ in measured), 1),
                    "peak_mb": round(max(m for _, _, m in measured) / 1e6),
                }
                lines.append(line)
                print(json.dumps(line), flush=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
