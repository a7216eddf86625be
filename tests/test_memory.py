"""Calibration's memory does not depend on how many windows there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, torch
from transformers import LlamaConfig, LlamaModel
from compressor.calibrate import calibrate
from compressor.statistics import AbsMax, ChannelSquare
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
model = LlamaModel(config).eval()
run = lambda count: calibrate(model, torch.randint(256, (count, 256)), {AbsMax, ChannelSquare})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8)
before = peak()
run(64)
print(peak() - before)
"""
HIDDEN_KIB = 256 * 512 * 4 / 1024  # of one window


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_peak_memory_does_not_grow_with_windows():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    # The hidden states of 56 more windows take 28 MiB; a few windows' worth is the allocator's.
    assert int(done.stdout) < 8 * HIDDEN_KIB, f"64 windows took {done.stdout.strip()} KiB more than 8"
