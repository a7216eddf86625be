"""The artifact on disk: written complete or not at all, read back without the original weights.

A folder is built under a hidden sibling name and renamed when everything is in it; an interrupt, an error or a
full disk removes the sibling and leaves what was there before untouched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from compressor.artifact import Artifact
from compressor.errors import ModelError, OutputError
from compressor.progress import Progress, Silent
from compressor.recipe import Recipe

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
MANIFEST_FORMAT = 1
# The manifest's entries that are Artifact.record's.
RECORD = (
    "model", "calibration", "steps", "layers", "kept", "parameters", "ledger", "structure", "expert_index", "graph",
    "quality", "expert_plan",
)  # fmt: skip


def is_artifact(folder: str | Path | None) -> bool:
    """Whether this is a folder that `write` made."""
    return folder is not None and (Path(folder) / MANIFEST).is_file() and (Path(folder) / WEIGHTS).is_file()


def check_target(folder: Path, force: bool) -> None:
    """Raise OutputError unless `folder` can be written; cheap, so that it can be asked before long work."""
    if not folder.exists():
        return
    if not force:
        raise OutputError(f"{folder} already exists; choose another --out, or replace it with --force.")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file()):
        raise OutputError(
            f"{folder} exists and is not a folder that compressor wrote, so --force will not replace it; "
            f"choose another --out."
        )


def write(artifact: Artifact, folder: Path, *, force: bool = False, progress: Progress = Silent()) -> Path:
    """Export every format of the recipe into `folder`. Raises OutputError."""
    from compressor.exporters.registry import EXPORTERS

    folder = Path(os.path.abspath(folder))
    check_target(folder, force)
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in artifact.recipe.exports:
            progress.stage(f"export {name}")
            EXPORTERS[name](artifact, partial)
            if name == "onnx" and (made := artifact.record.get("graph")):
                progress.note("the graph has " + ", ".join(f"{kind}: {count}" for kind, count in made.items()))
        (partial / "recipe.yaml").write_text(artifact.recipe.to_yaml(), encoding="utf-8")
        progress.stage("manifest")
        write_manifest(partial, manifest_of(artifact, partial))
        _swap(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{folder}: the disk is full; free some space or choose another --out. Nothing was written."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"{folder}: not allowed to write there; choose another --out.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _swap(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def manifest_of(artifact: Artifact, folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose other files are written: hashes, versions, coverage, quality. No times, so that
    the same input gives the same bytes."""
    from compressor.exporters.hf_config import loads_in

    tensors = {}
    for name, tensor in artifact.tensors().items():
        # Hashed in memory: what the file is checked against is what was measured, not what was written.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        tensors[name] = {"shape": list(tensor.shape), "sha256": hashlib.sha256(raw.data).hexdigest()}
    files = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        "format": MANIFEST_FORMAT,
        "versions": versions(),
        "kind": artifact.kind,
        "seed": artifact.recipe.seed,
        **artifact.record,
        "coverage": coverage(artifact),
        "loads_in": loads_in(artifact),
        "tied": dict(sorted(artifact.tied.items())),
        "tensors": tensors,
        "files": files,
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    temporary = folder / f".{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Raises ModelError when the folder is not one of ours or its manifest is damaged."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a folder that compressor wrote: it has no {MANIFEST}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged ({error}); write the folder again.") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != MANIFEST_FORMAT:
        raise ModelError(f"{path} has format {found}; this version reads {MANIFEST_FORMAT}.")
    return manifest


def load(folder: str | Path) -> Artifact:
    """The Artifact of a folder that `write` made. Raises ModelError."""
    from transformers import AutoConfig, GenerationConfig

    from compressor.exporters.hf_config import packed_from, structure_from, without_refusal
    from compressor.exporters.safetensors_file import read
    from compressor.model import load_tokenizer

    folder = Path(folder)
    manifest = read_manifest(folder)
    tensors = read(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tied = manifest["tied"]
    packed = packed_from(raw, {**tensors, **{alias: tensors[name] for alias, name in tied.items()}})
    inside = tuple(f"{name}." for name in packed)
    config = without_refusal(AutoConfig.from_pretrained(folder))
    for extra in ("quantization_config", "compressor"):
        if hasattr(config, extra):
            delattr(config, extra)
    generation = folder / "generation_config.json"
    return Artifact(
        config=config,
        kind=manifest["kind"],
        tokenizer=load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None,
        recipe=Recipe.load(folder / "recipe.yaml"),
        packed=packed,
        kept={name: t for name, t in tensors.items() if not name.startswith(inside)},
        tied=tied,
        structure=structure_from(raw),
        generation_config=GenerationConfig.from_pretrained(folder) if generation.is_file() else None,
        record={k: manifest[k] for k in RECORD if k in manifest},
    )


def coverage(artifact: Artifact) -> dict[str, Any]:
    """How much of the model is compressed: parameters, bits, bytes."""
    compressed = sum(p.attributes["in_features"] * p.attributes["out_features"] for p in _stored(artifact))
    bits = sum(8 * t.numel() * t.element_size() for p in _stored(artifact) for n, t in p.tensors.items() if n != "bias")
    rest = sum(t.numel() for t in artifact.kept.values())
    stored = sum(t.numel() * t.element_size() for t in artifact.tensors().values())
    return {
        "original_parameters": artifact.record.get("parameters", compressed + rest),
        "parameters": compressed + rest,
        "compressed_parameters": compressed,
        "share": round(compressed / max(1, compressed + rest), 4),
        "bits_per_compressed_weight": round(bits / max(1, compressed), 4),
        "bits_per_parameter": round(8 * stored / max(1, compressed + rest), 4),
        "size_bytes": stored,
    }


def _stored(artifact: Artifact) -> list[Any]:
    """Packed modules whose tensors are in the file under their own name (a tied head is its table)."""
    return [
        p
        for name, p in artifact.packed.items()
        if not any(f"{name}.{t}" in artifact.tied for t in p.tensors if t != "bias")
    ]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of what computed and wrote the folder."""
    from importlib import metadata

    names = ("compressor", "torch", "transformers", "safetensors", "onnx", "onnxscript", "compressed-tensors")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
