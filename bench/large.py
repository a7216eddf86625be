"""How long and how much GPU memory a large model takes: a randomly initialised one in the shape of Llama 3 8B.

    .venv/bin/python bench/large.py --text wikitext2/valid.txt --recipe w4a4 --device cuda

Builds the model and a byte-level tokenizer in a temporary folder (16 GB), then loads and compresses it, each stage
timed, and writes the folder, without evaluation and verification. Random weights take as long as trained ones.
Appends a JSON line to bench/results/large.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from compressor import Recipe, compress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "large.jsonl"
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


class Clock:
    """A Progress that notes how long each stage took."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, time.monotonic()))
        print(f"{name}", flush=True)

    def advance(self, n: int = 1) -> None:
        pass

    def note(self, message: str) -> None:
        print(message, flush=True)

    def seconds(self) -> list[tuple[str, float]]:
        ends = [start for _, start in self.stages[1:]] + [time.monotonic()]
        return [(name, round(end - start, 1)) for (name, start), end in zip(self.stages, ends, strict=True)]


def build(folder: str, device: str, layers: int) -> None:
    """Weights of the usual size, bf16, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers}))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cuda = arguments.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as scratch:
        build(f"{scratch}/model", arguments.device, arguments.layers)
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock, start = Clock(), time.monotonic()
        artifact = compress(
            f"{scratch}/model", Recipe.load(arguments.recipe), data=arguments.text, measure=False,
            device=arguments.device, progress=clock,
        )  # fmt: skip
        compressed = time.monotonic() - start
        if not arguments.no_save:
            artifact.save(f"{scratch}/out", progress=clock)
        line = {
            "commit": commit.stdout.strip(),
            "hardware": torch.cuda.get_device_name() if cuda else "cpu",
            "recipe": arguments.recipe,
            "layers": arguments.layers,
            "compress_seconds": round(compressed, 1),
            "with_saving_seconds": round(time.monotonic() - start, 1),
            "gpu_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
            "stages": clock.seconds(),
        }
    print(json.dumps(line), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
