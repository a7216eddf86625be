"""The rows of `compress bench`: models in runtimes, what is built for them, and why one cannot be measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor import ops
from compressor.errors import CompressorError, ModelError
from compressor.own_process import run_module
from compressor.progress import Progress
from compressor.verify import installed

ENCODER = "encoder"
ORIGINAL, STOCK_INT4 = "original, fp32", "stock INT4"
GENAI, ORT, TORCH = "onnxruntime-genai", "onnxruntime", "torch"
WEIGHTS = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.safetensors")


@dataclass(frozen=True)
class Figure:
    median: float
    low: float
    high: float


@dataclass
class Row:
    """`figures` holds what benchmark_process reports, by its names; empty when the row was not measured."""

    model: str
    runtime: str
    size_bytes: int | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    perplexity: float | None = None
    kl: float | None = None  # to the original
    reason: str | None = None  # why it was not measured


@dataclass(frozen=True)
class Case:
    """A row to measure, and what its process gets beside what all get."""

    row: Row
    job: dict[str, Any]


def cases_of(
    folder: Path, manifest: dict[str, Any], source: str, asked: bool, scratch: Path, progress: Progress
) -> list[Case]:
    """Every row, in the order of the table."""
    original = scratch / "original"
    progress.stage("original")
    lost = run_module("compressor.stock", "save", source, str(original))
    if lost is not None and asked:
        raise ModelError(f"--against {lost}")
    if lost is not None:
        lost = f"the original cannot be loaded, give --against MODEL ({lost})"
    before = {"perplexity": (manifest.get("quality") or {}).get("base_ppl")}
    return [
        _case(ORIGINAL, TORCH, original, {"driver": "torch"}, lost, **before),
        *_stock_cases(manifest["kind"], source, original, lost, before, progress),
        *_our_cases(folder, manifest),
    ]


def _stock_cases(
    kind: str, source: str, original: Path, lost: str | None, before: dict[str, Any], progress: Progress
) -> Iterator[Case]:
    """The original in other tools' graphs, which are made here; errors name `source`, not our copy of it."""
    made_by, jobs = GENAI, {"fp32": ORIGINAL, "int4": STOCK_INT4}
    if kind == ENCODER:
        made_by, jobs = "optimum", {"encoder": ORIGINAL}
    for job, name in jobs.items():
        progress.stage(f"build {name}")
        made = original.with_name(job)
        reason = lost or _absent(made_by) or run_module("compressor.stock", job, str(original), str(made))
        reason = reason and reason.replace(str(original), source)
        yield _graph_case(kind, name, made, reason, **({} if job == "int4" else before))
    if kind == ENCODER:
        yield _graph_case(kind, STOCK_INT4, original, f"the builder of {GENAI} makes language models only")


def _our_cases(folder: Path, manifest: dict[str, Any]) -> Iterator[Case]:
    kind, found = manifest["kind"], manifest.get("quality") or {}
    after = {"perplexity": found.get("ppl"), "kl": found.get("kl")}
    graph = None if (folder / "model.onnx").is_file() else "the recipe exports no ONNX graph"
    without = graph or _without_library()
    yield _graph_case(kind, folder.name, folder, graph or _names_library(folder), ", bodies", **after)
    yield _graph_case(kind, folder.name, folder, without, ", library", {"library": True}, **after)
    yield _case(folder.name, TORCH, folder, {"driver": "torch", "ours": True}, None, **after)


def _graph_case(
    kind: str,
    model: str,
    source: Path,
    reason: str | None,
    how: str = "",
    job: dict[str, Any] | None = None,
    **quality: Any,
) -> Case:
    """A row of a graph: decoded by genai, encoded by onnxruntime."""
    runtime, driver = (ORT, "onnxruntime") if kind == ENCODER else (GENAI, "genai")
    return _case(model, runtime + how, source, {"driver": driver, **(job or {})}, reason or _absent(runtime), **quality)


def _case(model: str, runtime: str, source: Path, job: dict[str, Any], reason: str | None, **quality: Any) -> Case:
    size = None if reason else _size(source, only_weights=runtime == TORCH)
    row = Row(model, runtime, size, reason=reason, **quality)
    return Case(row, {"ours": False, "library": False, "source": str(source), **job})


def _absent(runtime: str) -> str | None:
    return None if installed(runtime) else f"{runtime} is not installed"


def _names_library(folder: Path) -> str | None:
    """Why a folder has no row through bodies: its genai_config.json loads the library."""
    config = folder / "genai_config.json"
    if config.is_file() and ops.KEY in config.read_text(encoding="utf-8"):
        return "the folder names the library; compress ops --out-of FOLDER takes it out"
    return None


def _without_library() -> str | None:
    """Why the fused kernels cannot be registered; None when they can."""
    import compressor

    try:
        import onnxruntime

        compressor.register_ops(onnxruntime.SessionOptions())
    except CompressorError as error:
        return str(error)
    return None


def _size(folder: Path, only_weights: bool) -> int:
    """Bytes of the graph and its weights; the tokenizer, the same for all, is left out."""
    patterns = WEIGHTS[-1:] if only_weights else WEIGHTS
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    return sum(path.stat().st_size for path in files)
