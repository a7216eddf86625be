"""`compress bench`: a folder's speed, memory and size beside the original and stock INT4, each in fresh processes.

A row is one model in one runtime. Rows are measured in turn, all of them once, then all of them again: a machine that
slows down in between slows every row. A row that cannot be measured says why. docs/bench.md explains the figures.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compressor.benchmark_rows import ENCODER, GENAI, ORIGINAL, ORT, Case, Figure, Row, cases_of
from compressor.data import text_of
from compressor.data import windows as windows_of
from compressor.errors import DataError
from compressor.folder import read_manifest, versions
from compressor.own_process import run_module
from compressor.progress import Progress, Silent

if TYPE_CHECKING:
    from compressor.evaluate import Runner

QUALITY_WINDOWS, QUALITY_LENGTH = 16, 512
BATCH = 8  # sequences at once, for the throughput of an encoder


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


def bench(
    folder: str | Path,
    against: str | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 126,
    threads: int = 2,
    repeats: int = 3,
    text: str | None = None,
    progress: Progress = Silent(),
) -> BenchReport:
    """Measure every row. `against`: the original, where it is not what the folder was made from. `text`: measure
    perplexity and KL on it instead of taking the manifest's.

    Raises ModelError for what is not a folder of ours and for an `against` that cannot be loaded, DataError when the
    model holds fewer tokens than asked for and for a text that cannot be read or an encoder has no use for.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    encoder = manifest["kind"] == ENCODER
    if encoder and text is not None:
        raise DataError(f"{folder} is an encoder, which has no perplexity; leave --text out, and see compress eval.")
    windows = None if text is None else _windows(folder, text_of(text)[0], QUALITY_WINDOWS, QUALITY_LENGTH)
    common = {
        "ids": _prompt(folder, prompt_tokens, 0 if encoder else new_tokens + 1),
        "new_tokens": new_tokens,
        "threads": threads,
        "batch": BATCH if encoder else 0,
    }
    source = against or manifest["model"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        cases = cases_of(folder, manifest, source, against is not None, scratch, progress)
        ready = [case for case in cases if case.row.reason is None]
        progress.stage("measure", repeats * len(ready))
        found: dict[int, list[dict[str, float]]] = {id(case): [] for case in ready}
        for _ in range(repeats):
            for case in ready:
                if case.row.reason is None:
                    found[id(case)] += _run(case, {**common, **case.job}, scratch)
                progress.advance()
        if windows is not None:
            _evaluate(cases, scratch / "original", folder, windows, progress)
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


def _run(case: Case, job: dict[str, Any], scratch: Path) -> list[dict[str, float]]:
    """The figures of one process; none, and the row's reason, when it failed."""
    question, answer = scratch / "job.json", scratch / "result.json"
    question.write_text(json.dumps(job), encoding="utf-8")
    case.row.reason = run_module("compressor.benchmark_process", str(question), str(answer))
    return [] if case.row.reason else [json.loads(answer.read_text(encoding="utf-8"))]


def _prompt(folder: Path, length: int, following: int) -> list[int]:
    """Token ids [length] of shipped prose. Raises DataError when they and those that follow do not fit the model."""
    most = _context(folder)
    if length + following > most:
        raise DataError(f"{folder}: {length + following} tokens are asked for and the model holds {most}; give fewer.")
    ids: list[int] = _windows(folder, text_of(None)[0], 1, length)[0].tolist()
    return ids


def _windows(folder: Path, text: str, count: int, length: int) -> Tensor:
    """Token ids [S, L] of the text, S and L at most these."""
    from compressor.tokenizer import load_tokenizer

    return windows_of(load_tokenizer(folder), text, count, min(length, _context(folder)))


def _context(folder: Path) -> int:
    """Most tokens that the model holds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)


def _evaluate(cases: list[Case], original: Path, folder: Path, windows: Tensor, progress: Progress) -> None:
    """Perplexity and KL of the original, of the folder and of stock INT4, into their rows."""
    from compressor.evaluate import compare, torch_runner
    from compressor.folder import load
    from compressor.model import load_model

    base = torch_runner(load_model(original).model) if original.is_dir() else None
    found = compare(torch_runner(load(folder).model(dense=True)), windows, base, progress=progress)
    for case in cases:
        if case.row.model == ORIGINAL:
            case.row.perplexity = found["base_ppl"]
        elif case.row.model == folder.name:
            case.row.perplexity, case.row.kl = found["ppl"], found["kl"]
        elif case.row.reason is None:
            stock = compare(_genai_runner(Path(case.job["source"])), windows, base, progress=progress)
            case.row.perplexity, case.row.kl = stock["ppl"], stock["kl"]


def _genai_runner(folder: Path) -> Runner:
    """ids [1, L] -> logits [1, L, V] of a graph of the builder, whose cache has no size that a session could read."""
    import onnxruntime_genai as genai
    import torch

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)

    def run(ids: Tensor) -> Tensor:
        parameters.set_search_options(do_sample=False, max_length=ids.shape[1])
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids[0].tolist())
        return torch.from_numpy(generator.get_output("logits")).float()

    return run


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
