"""Proof that the folder is the model that was measured: re-loaded from disk, in a process of its own per runtime.

    files          every file and every tensor still has the hash that the manifest recorded from memory
    torch          compressor.load
    onnxruntime    every compressed node against our op on the node's own input, then the whole graph, then its cache;
                   with the library of fused ops (kernels/ort) the same again, where it was built
    optimum, onnxruntime-genai, transformers     where installed

A model with 4-bit activations is chaotic: a difference of one unit in the last place flips a rounding, which moves
the next layer's input by whole steps, so two correct runtimes end up as far apart as two samples of the same
rounding noise. Whole-model parity is therefore asserted with activation rounding switched off in both (same
weights, same wiring, same cache), activation rounding is asserted node by node on equal inputs, and the model
as it is deployed is held against the noise between float32 and float64 sums in torch alone. docs/verify.md has
the measurement.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import VerificationError
from compressor.folder import MANIFEST, read_manifest, sha256, write_manifest
from compressor.kernels import native
from compressor.own_process import run_module
from compressor.progress import Progress, Silent

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
LIBRARY = "onnxruntime + library"
CACHES = "caches"  # the check that says what a user of a runtime must set for the caches of a model
# The module each runtime needs; they are checked in this order and the first one is the reference of the others.
RUNTIMES = {
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    LIBRARY: "onnxruntime",
    "optimum": "optimum.onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "transformers": "compressed_tensors",
}


@dataclass(frozen=True)
class Check:
    runtime: str
    check: str
    status: str  # ok | FAILED | skipped
    detail: str


@dataclass
class VerifyReport:
    rows: list[Check]

    @property
    def ok(self) -> bool:
        return not any(r.status == FAILED for r in self.rows)


def verify(
    folder: str | Path, *, runtimes: Collection[str] = tuple(RUNTIMES), progress: Progress = Silent()
) -> VerifyReport:
    """Check a folder in every installed runtime of `runtimes`, each after torch, which makes their reference.

    Raises ModelError when it is not a folder of ours.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    progress.stage("verify files")
    rows = check_files(folder, manifest)
    if any(r.status == FAILED for r in rows):
        return VerifyReport(rows)  # a runtime would only repeat that the bytes are wrong
    with tempfile.TemporaryDirectory() as scratch:
        for name in RUNTIMES:
            if name not in runtimes:
                continue
            progress.stage(f"verify {name}")
            if reason := _not_applicable(name, manifest, folder):
                rows.append(Check(name, "load", SKIPPED, reason))
                continue
            rows += _in_own_process(name, folder, Path(scratch))
    return VerifyReport(rows)


def record(folder: str | Path, report: VerifyReport) -> None:
    """Write the report into the folder's manifest. Raises VerificationError when a check failed."""
    manifest = read_manifest(folder)
    manifest["verification"] = [asdict(r) for r in report.rows]
    write_manifest(Path(folder), manifest)
    if not report.ok:
        failed = sorted({f"{r.runtime} {r.check}" for r in report.rows if r.status == FAILED})
        raise VerificationError(f"{folder}: not verified: {', '.join(failed)}; do not deploy this folder.")


def check_files(folder: Path, manifest: dict[str, Any]) -> list[Check]:
    """Hashes of files, and of each tensor where the weight file differs."""
    from compressor.exporters.safetensors_file import tensor_hashes

    rows = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            rows.append(Check("files", name, FAILED, "missing"))
        elif sha256(path) != expected:
            rows.append(Check("files", name, FAILED, "its bytes are not those that were written"))
    if not any(r.check == "model.safetensors" and r.detail == "missing" for r in rows):
        found = tensor_hashes(folder)
        for name, entry in manifest["tensors"].items():
            if found.get(name) != entry["sha256"]:
                rows.append(
                    Check(
                        "files",
                        name,
                        FAILED,
                        "tensor missing" if name not in found else "tensor differs from what was measured",
                    )
                )
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    extra = sorted(names - set(manifest["files"]) - {MANIFEST})
    if extra:
        rows.append(Check("files", "extra files", SKIPPED, f"not in the manifest: {', '.join(extra[:5])}"))
    return rows or [Check("files", "hashes", OK, f"{len(manifest['files'])} files, {len(manifest['tensors'])} tensors")]


def _not_applicable(name: str, manifest: dict[str, Any], folder: Path) -> str | None:
    if name in ("onnxruntime", LIBRARY, "optimum", "onnxruntime-genai") and not (folder / "model.onnx").is_file():
        return "the recipe exports no ONNX graph"
    if name == "onnxruntime-genai" and manifest["kind"] != "causal-lm":
        return "not a language model"
    if name == "transformers":
        said = manifest["loads_in"]
        version = metadata.version(name).partition(".")[0]
        answer = said.get(f"{name} {version}", said.get(name, "yes"))
        if answer != "yes":
            return answer
    if name == LIBRARY and not native.built():
        return "the library was not built"
    if not installed(name):
        return "not installed"
    return None


def installed(runtime: str) -> bool:
    """Whether the module that one of RUNTIMES needs is there."""
    module = RUNTIMES[runtime]
    top = module.split(".")[0]
    return importlib.util.find_spec(top) is not None and importlib.util.find_spec(module) is not None


def _in_own_process(name: str, folder: Path, scratch: Path) -> list[Check]:
    result = scratch / f"{name}.json"
    wrong = run_module("compressor.verify_runtimes", name, str(folder), str(scratch), str(result))
    if wrong is not None:
        return [Check(name, "load", FAILED, wrong)]
    return [Check(**row) for row in json.loads(result.read_text())]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|; infinite where not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
