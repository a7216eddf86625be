"""What the command line looks like: progress, tables, error lines. Only this file and `cli.py` print.

Results go to stdout, everything else to stderr; with --json stdout is one JSON object and nothing else.
"""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from compressor.progress import Progress, Silent
from compressor.recipe import Recipe

WIDE = 200  # columns when stdout is not a terminal, so that no module name is cut


def emit(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """The one JSON object of --json."""
    print(json.dumps(data, indent=1, ensure_ascii=False, default=str))


def say(*lines: object) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
    for line in lines:  # a line of text is never broken, so that commands can be copied
        console.print(line, soft_wrap=isinstance(line, str))


def complain(message: str, error: BaseException | None = None) -> None:
    """One line on stderr; the traceback of `error` follows it when it is given."""
    print(message, file=sys.stderr)
    if error is not None:
        traceback.print_exception(error)


def table(title: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Plain columns; those that hold numbers or sizes are aligned right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(title):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    return made


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.2f} GB"


def quality_line(quality: Mapping[str, Any]) -> str:
    """`perplexity 26.07 -> 31.20 (29.8 to 32.7), KL 0.25, top-1 0.81`, with what there is."""
    said = []
    if quality.get("ppl") is not None:
        before = f"{quality['base_ppl']:.2f} -> " if quality.get("base_ppl") is not None else ""
        said.append(f"perplexity {before}{quality['ppl']:.2f} ({quality['ppl_low']:.2f} to {quality['ppl_high']:.2f})")
    names = {"kl": "KL to the original", "top1": "top-1 agreement", "cosine": "cosine to the original"}
    said += [f"{text} {quality[key]:.4f}" for key, text in names.items() if quality.get(key) is not None]
    return ", ".join(said) + f", on {quality['tokens']} tokens"


@contextmanager
def working(*, quiet: bool = False, verbose: bool = False) -> Iterator[Progress]:
    """A Progress for the length of a job: bars on a terminal, else a line per stage, nothing when `quiet`.

    What libraries print in between goes to stderr, and their warnings and bars are off unless `verbose`.
    """
    if not verbose:
        _hush()
    with redirect_stdout(sys.stderr):
        if quiet:
            yield Silent()
        elif sys.stderr.isatty():
            with Bars() as bars:
                yield bars
        else:
            yield Lines()


class Lines:
    """One line a stage, for logs."""

    def stage(self, name: str, total: int | None = None) -> None:
        print(name if total is None else f"{name} ({total})", file=sys.stderr, flush=True)

    def advance(self, n: int = 1) -> None:
        pass

    def note(self, message: str) -> None:
        print(f"note: {message}", file=sys.stderr, flush=True)


class Bars:
    """One bar a stage, with an estimate of the time that remains."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = RichProgress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._finish()
        self._bars.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self._bars.add_task(name, total=total)

    def advance(self, n: int = 1) -> None:
        if self._bars.task_ids:
            self._bars.advance(self._bars.task_ids[-1], n)

    def note(self, message: str) -> None:
        self._bars.console.print(f"note: {message}", markup=False, highlight=False)

    def _finish(self) -> None:
        if self._bars.tasks and not (last := self._bars.tasks[-1]).finished:
            total = last.total or last.completed or 1
            self._bars.update(last.id, total=total, completed=total)


def _hush() -> None:
    """Warnings and progress bars of the libraries off, for this process."""
    import logging
    import warnings

    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()


def checks(rows: Sequence[Any]) -> Table:
    """Verification, a row a check."""
    return table(("runtime", "check", "status", "detail"), [(r.runtime, r.check, r.status, r.detail) for r in rows])


def show_tolerances(rows: Sequence[Mapping[str, Any]], error: float) -> None:
    """One line a block; of several experts, the mean."""

    def mean(values: Mapping[str, float]) -> str:
        return f"{sum(values.values()) / len(values):.3f}" if values else "–"

    cells = [(r["block"], f"{r['turned']:.3f}", mean(r["channels"]), mean(r["heads"])) for r in rows]
    say(table(("block", "turned", f"channels that can go at {error:g}", "share of the least head"), cells))


def show_sparsity(found: Mapping[str, Any]) -> None:
    """One line a layer, then what is massive."""
    cells = [
        (r["layer"], f"{r['left_out']:.3f}", f"{r['excluded']:.4f}", f"{r['moved']:.3f}", f"{r['ratio']:.0f}")
        for r in found["layers"]
    ]
    say(table(("layer", "neurons left out", "tokens excluded", "they move it by", "largest / median"), cells))
    fit, judged, length = found["windows"]
    mean, ratio = found["left_out"], found["ratio"]
    say(
        "",
        f"PPL-{found['percent']:g} %: {mean:.1%} of neurons left out, CETT {found['cett']:.4f}, "
        f"perplexity x {ratio:.4f} ({fit} windows of {length} tokens gave thresholds, {judged} others these figures)",
    )
    massive = found["massive"]
    for kind in ("strict", "relative", "small"):
        places = massive[kind]
        said = "none"
        if places["channels"]:
            often = sorted(places["tokens"].items(), key=lambda item: -item[1])[:3]
            said = f"channels {places['channels']}, tokens {', '.join(f'{t} ({n} values)' for t, n in often)}"
        say(f"massive, {kind}: {said}")
    say(f"tenfold jumps: up at {massive['onset'] or 'no block'}, down at {massive['offset'] or 'no block'}")


def show_bench(report: Any) -> None:
    """The report as a Markdown table, ready for a README, and the line that says how it was made."""
    encoder = report.kind == "encoder"
    speed = (
        [("one sequence ms", "latency_ms", 1), ("sequences a second", "sequences_per_s", 1)]
        if encoder
        else [("first token ms", "first_token_ms", 0), ("tokens a second", "tokens_per_s", 1)]
    )
    columns = [("load s", "load_s", 2), *speed, ("peak MB", "peak_bytes", 0)]
    titles = ["model", "runtime", "size MB", *(title for title, _, _ in columns)]
    titles += [] if encoder else ["perplexity", "KL"]
    say(f"| {' | '.join(titles)} |", "|---" * 2 + "|---:" * (len(titles) - 2) + "|")
    for row in report.rows:
        size = "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.0f}"
        cells = [_figure(row.figures.get(key), digits, 1e6 if key == "peak_bytes" else 1) for _, key, digits in columns]
        if row.reason is not None:
            cells = [f"not measured: {row.reason}", *[""] * (len(cells) - 1)]
        if not encoder:
            cells += [f"{value:.{digits}f}" if value else "" for value, digits in ((row.perplexity, 2), (row.kl, 3))]
        say(f"| {' | '.join([row.model, row.runtime, size, *cells])} |")
    work = "" if encoder else f", {report.new_tokens} more after the first"
    made_by = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    asked = f"{report.prompt_tokens} tokens{work}, --threads {report.threads}"
    spread = f"median of {report.repeats} processes (lowest to highest)"
    say("", f"{report.original}: {asked}, {spread}. {report.processor}; {made_by}.")


def _figure(figure: Any, digits: int, unit: float) -> str:
    """`24.7 (24.1–25.0)`"""
    if figure is None:
        return ""
    median, low, high = (f"{value / unit:.{digits}f}" for value in (figure.median, figure.low, figure.high))
    return median if low == high else f"{median} ({low}–{high})"


def failures(rows: Sequence[Any]) -> None:
    """The checks that failed, as a table on stderr; nothing when none did."""
    if wrong := [row for row in rows if row.status == "FAILED"]:
        Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDE).print(
            checks(wrong)
        )


def how_to_load(folder: Path, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each runtime and the one line of Python that loads the folder in it, or why it cannot."""
    out, text = repr(str(folder)), manifest["kind"] == "causal-lm"
    auto = "AutoModelForCausalLM" if text else "AutoModel"
    ort = "ORTModelForCausalLM" if text else "ORTModelForFeatureExtraction"
    lines = {"compressor": f"compressor.load({out}).model()"}
    if "model.safetensors" in manifest["files"]:
        lines["transformers"] = f"transformers.{auto}.from_pretrained({out}, dtype=torch.bfloat16)"
    if "model.onnx" in manifest["files"]:
        lines["onnxruntime"] = f"onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})"
        lines["optimum"] = f"optimum.onnxruntime.{ort}.from_pretrained({out})"
        if text:
            lines["onnxruntime-genai"] = f"onnxruntime_genai.Model({out})"
    for name, answer in manifest.get("loads_in", {}).items():
        if (line := lines.get(name.partition(" ")[0])) and answer != "yes":  # "transformers 5" where it differs
            lines[name] = answer if answer.startswith("no:") else f"{line}  ({answer})"
    return list(lines.items())


def show_plan(plan: Any) -> None:
    """--dry-run: every weight, what it becomes, and the sum."""
    title = ("weight", "shape", "becomes", "bits a weight", "bytes in bf16", "bytes after", "")
    rows = [
        (r.name, "x".join(map(str, r.shape)), r.action, r.bits_per_weight, r.bytes_before, r.bytes_after, r.note)
        for r in plan.rows
    ]
    sums = f"{megabytes(plan.bytes_before)} in bf16 -> {megabytes(plan.bytes_after)}; nothing was written"
    say(table(title, rows), "", sums)


def _weights(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many weights are left where some went, and how many bits those take that are packed."""
    rows = []
    if result["parameters"] != (before := result["original_parameters"]):
        rows.append(("weights", f"{result['parameters'] / before:.1%} of {before / 1e6:.1f} million are left"))
    for row in result["ledger"]:
        found = quality_line(row) if "kl" in row or "cosine" in row else "not measured"
        rows.append((f"after {row['after']}", found))
    if result["coverage"]:
        bits, share = result["bits_per_weight"], result["coverage"]
        rows.append(("bits a weight", f"{bits:.2f} with scales, for {share:.1%} of all weights"))
    return rows


def show_result(result: Mapping[str, Any], manifest: Mapping[str, Any], recipe: Recipe) -> None:
    """What the main job did, how to load it, and what to do next."""
    from compressor.verify import CACHES

    folder, before, after = Path(result["folder"]), result["size_before"], result["size_after"]
    text = result["calibration"]
    status = Counter(check["status"] for check in result["checks"])
    counts = ", ".join(f"{count} {name}" for name, count in status.items())
    peak = f", {megabytes(result['peak_bytes'])} at its peak" if result["peak_bytes"] else ""
    rows = [
        ("size", f"{megabytes(before)} in bf16 -> {megabytes(after)}, {before / after:.2f}x smaller"),
        *_weights(result),
        (
            "calibrated on",
            f"{text['windows']} windows of {text['length']} tokens: {text['text']}" if text else "nothing",
        ),
        (
            "quality",
            quality_line(result["quality"]) if result["quality"] else "not measured; give --data or --eval-text",
        ),
        *((f"step {name}", report["summary"]) for name, report in manifest["steps"].items() if "summary" in report),
        ("checks", counts or "none were made"),
        ("took", f"{result['seconds']:.0f} s{peak}"),
        ("folder", str(folder)),
    ]
    quoted = shlex.quote(str(folder))
    following = [] if result["verified"] else [f"compress verify {quoted}"]
    following.append(f"compress eval {quoted} --against {shlex.quote(str(recipe.model))} --text FILE")
    found = {check["runtime"]: check["detail"] for check in result["checks"] if check["check"] == CACHES}
    told = {**manifest, "loads_in": manifest.get("loads_in", {}) | found}
    loading = [f"{name:18} {line}" for name, line in how_to_load(folder, told)]
    for title, lines in (("load it", loading), ("next", following)):
        rows += [(title if i == 0 else "", line) for i, line in enumerate(lines)]
    for name, value in rows:
        say(f"{name:14} {value}")
