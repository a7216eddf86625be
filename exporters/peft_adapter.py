"""Corrections of a 4-bit model as a PEFT LoRA adapter, and the 4-bit model it goes on: for servers that run LoRA.

    lora/base/      the model without its corrections, as stock transformers and vLLM load it
    lora/adapter/   adapter_config.json and adapter_model.safetensors: PEFT adds B (A x) to each layer

Scaling is 1 for every layer: lora_alpha is r. Ranks that differ are in rank_pattern.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compressor.errors import OutputError
from compressor.exporters import safetensors_file
from compressor.layers import Packed

if TYPE_CHECKING:
    from compressor.artifact import Artifact

FOLDER = "lora"
DOWN, UP = "correction_down", "correction_up"


def export(artifact: Artifact, folder: Path) -> list[Path]:
    """Write lora/ into `folder`. Raises OutputError for a model without corrections."""
    corrected = {name: p for name, p in artifact.packed.items() if DOWN in p.tensors}
    if not corrected:
        raise OutputError(
            "the lora export writes the pairs of a correct step, and the recipe has none; add one, or drop lora from "
            "the exports."
        )
    base, adapter = folder / FOLDER / "base", folder / FOLDER / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
    plain = replace(artifact, packed={name: without(p) for name, p in artifact.packed.items()})
    files = safetensors_file.export(plain, base)
    weights = adapter / "adapter_model.safetensors"
    safetensors_file.write(weights, tensors_of(corrected))
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(config_of(artifact, corrected), indent=2) + "\n", encoding="utf-8")
    return [*files, weights, config]


def without(packed: Packed) -> Packed:
    """The stored layer without its correction."""
    return replace(packed, tensors={name: t for name, t in packed.tensors.items() if name not in (DOWN, UP)})


def tensors_of(corrected: dict[str, Packed]) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    found = {}
    for name, packed in corrected.items():
        found[f"base_model.model.{name}.lora_A.weight"] = packed.tensors[DOWN]
        found[f"base_model.model.{name}.lora_B.weight"] = packed.tensors[UP]
    return found


def config_of(artifact: Artifact, corrected: dict[str, Packed]) -> dict[str, Any]:
    """adapter_config.json: the most frequent rank, and those of the layers that have another."""
    ranks = {name: len(packed.tensors[DOWN]) for name, packed in corrected.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if artifact.kind == "causal-lm" else "FEATURE_EXTRACTION",
        "base_model_name_or_path": "../base",
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
