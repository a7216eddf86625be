"""`compress bench`: a folder's speed, memory and size beside the original and stock INT4, each in fresh processes.

A row is one model in one runtime. Rows are measured in turn, all of them once, then all of them again: a machine that
slows down in between slows every row. A row that cannot be measured says why. docs/bench.md explains the figures.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, DataError, ModelError
from compressor.folder import read_manifest, versions
from compressor.own_process import run_module
from compressor.progress import Progress, Silent

ENCODER = "encoder"
BATCH = 8  # sequences at once, for the throughput of an encoder
GENAI, ORT, TORCH = "onnxruntime-genai", "onnxruntime", "torch"
MODULES = {GENAI: "onnxruntime_genai", ORT: "onnxruntime", "optimum": "optimum.onnxruntime"}
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
    reason: str | None = None  # why it was not measured


@dataclass
class BenchReport:
    folder: str
    original: str
    kind: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    repeats: int
    processor: str
    versions: dict[str, str]
    rows: list[Row]


@dataclass(frozen=True)
class _Case:
    """A row to measure: what the process gets, or why there is nothing to measure."""

    row: Row
    job: dict[str, Any]


def bench(
    folder: str | Path,
    against: str | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 126,
    threads: int = 2,
    repeats: int = 3,
    progress: Progress = Silent(),
) -> BenchReport:
    """Measure every row. `against`: the original, where it is not what the folder was made from.

    Raises ModelError for what is not a folder of ours and for an `against` that cannot be loaded, DataError when the
    model holds fewer tokens than asked for.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    encoder = manifest["kind"] == ENCODER
    common = {
        "ids": _prompt(folder, prompt_tokens, 0 if encoder else new_tokens + 1),
        "new_tokens": new_tokens,
        "threads": threads,
        "batch": BATCH if encoder else 0,
    }
    source = against or manifest["model"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        cases = _cases(folder, manifest, source, against is not None, scratch, progress)
        ready = [case for case in cases if case.row.reason is None]
        progress.stage("measure", repeats * len(ready))
        found: dict[int, list[dict[str, float]]] = {id(case): [] for case in ready}
        for _ in range(repeats):
            for case in ready:
                if case.row.reason is None:
                    found[id(case)] += _run(case, {**common, **case.job}, scratch)
                progress.advance()
    for case in ready:
        runs = found[id(case)] if case.row.reason is None else []
        names = runs[0] if runs else {}
        case.row.figures = {name: _figure([run[name] for run in runs]) for name in names if names[name] is not None}
    return BenchReport(
        folder=str(folder),
        original=source,
        kind=manifest["kind"],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        repeats=repeats,
        processor=_processor(),
        versions=_versions(),
        rows=[case.row for case in cases],
    )


def _cases(
    folder: Path, manifest: dict[str, Any], source: str, asked: bool, scratch: Path, progress: Progress
) -> list[_Case]:
    """Every row, in the order of the table."""
    original = scratch / "original"
    progress.stage("original")
    lost = run_module("compressor.stock", "save", source, str(original))
    if lost is not None and asked:
        raise ModelError(f"--against {lost}")
    if lost is not None:
        lost = f"the original cannot be loaded, give --against MODEL ({lost})"
    before = (manifest.get("quality") or {}).get("base_ppl")
    return [
        _case("original, fp32", TORCH, original, {"driver": "torch"}, lost, before),
        *_stock_cases(manifest["kind"], original, lost, before, progress),
        *_our_cases(folder, manifest),
    ]


def _stock_cases(
    kind: str, original: Path, lost: str | None, before: float | None, progress: Progress
) -> Iterator[_Case]:
    """The original in other tools' graphs, which are made here."""
    made_by, jobs = GENAI, {"fp32": "original, fp32", "int4": "stock INT4"}
    if kind == ENCODER:
        made_by, jobs = "optimum", {"encoder": "original, fp32"}
    for job, name in jobs.items():
        progress.stage(f"build {name}")
        made = original.with_name(job)
        reason = lost or _absent(made_by) or run_module("compressor.stock", job, str(original), str(made))
        yield _graph_case(kind, name, made, reason, None if job == "int4" else before)
    if kind == ENCODER:
        yield _graph_case(kind, "stock INT4", original, f"the builder of {GENAI} makes language models only", None)


def _our_cases(folder: Path, manifest: dict[str, Any]) -> Iterator[_Case]:
    kind, after = manifest["kind"], (manifest.get("quality") or {}).get("ppl")
    graph = None if (folder / "model.onnx").is_file() else "the recipe exports no ONNX graph"
    yield _graph_case(kind, folder.name, folder, graph, after, ", bodies")
    yield _graph_case(kind, folder.name, folder, graph or _without_library(), after, ", library", library=True)
    yield _case(folder.name, TORCH, folder, {"driver": "torch", "ours": True}, None, after)


def _graph_case(
    kind: str, model: str, source: Path, reason: str | None, perplexity: float | None, how: str = "", **job: Any
) -> _Case:
    """A row of a graph: decoded by genai, encoded by onnxruntime."""
    runtime, driver = (ORT, "onnxruntime") if kind == ENCODER else (GENAI, "genai")
    return _case(model, runtime + how, source, {"driver": driver, **job}, reason or _absent(runtime), perplexity)


def _case(
    model: str, runtime: str, source: Path, job: dict[str, Any], reason: str | None, perplexity: float | None
) -> _Case:
    size = None if reason else _size(source, only_weights=runtime == TORCH)
    row = Row(model, runtime, size, {}, perplexity, reason)
    return _Case(row, {"ours": False, "library": False, "source": str(source), **job})


def _run(case: _Case, job: dict[str, Any], scratch: Path) -> list[dict[str, float]]:
    """The figures of one process; none, and the row's reason, when it failed."""
    question, answer = scratch / "job.json", scratch / "result.json"
    question.write_text(json.dumps(job), encoding="utf-8")
    case.row.reason = run_module("compressor.benchmark_process", str(question), str(answer))
    return [] if case.row.reason else [json.loads(answer.read_text(encoding="utf-8"))]


def _prompt(folder: Path, length: int, following: int) -> list[int]:
    """Token ids [length] of shipped prose. Raises DataError when they and those that follow do not fit the model."""
    from compressor.data import text_of, windows
    from compressor.tokenizer import load_tokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if most is not None and length + following > most:
        raise DataError(f"{folder}: {length + following} tokens are asked for and the model holds {most}; give fewer.")
    ids: list[int] = windows(load_tokenizer(folder), text_of(None)[0], 1, length)[0].tolist()
    return ids


def _absent(runtime: str) -> str | None:
    module = MODULES[runtime]
    top = module.partition(".")[0]
    found = importlib.util.find_spec(top) and importlib.util.find_spec(module)
    return None if found else f"{runtime} is not installed"


def _without_library() -> str | None:
    """Why the fused kernels cannot be registered; None when they can."""
    import compressor

    if not hasattr(compressor, "register_ops"):
        return "this version has no library of fused kernels"
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


def _figure(values: list[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values))


def _processor() -> str:
    """The processor's name as the system gives it, and its cores."""
    import os
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {name: text for name, text in versions().items() if name in ("compressor", "torch", "transformers")}
    for name in (ORT, GENAI):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
