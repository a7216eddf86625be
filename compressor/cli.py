"""The `compress` command: flags in, one call into the library, a table or JSON out.

The main job has no subcommand of its own: `compress --recipe w4a4`. Whatever it does is open to Python through
`compressor.compress` and `compressor.load`. An error that a user can cause is one line on stderr and an exit code.
"""

from __future__ import annotations

import errno
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import typer

from compressor import console
from compressor.errors import CompressorError, OutputError, RecipeError, VerificationError, nearest
from compressor.recipe import Recipe
from compressor.recipe_yaml import shipped

HELP = """Make a language model or encoder smaller: recipe and model in, one folder out.

\b
Examples:
  compress --recipe w4a4                                     the demo model, as shipped
  compress --recipe w4a16 --model ./mine --data train.jsonl  your model, your text
  compress --recipe w4a16 --set quantize.group_size=64 --dry-run
"""
INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__  # typer has no public name for it

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
Text = typer.Option(metavar="TEXT", help="A text, .jsonl or .parquet file, or hub dataset.")
WindowCount = Annotated[int, typer.Option("--windows", metavar="N", min=1, help="Windows of text.")]
WindowLength = Annotated[int, typer.Option("--length", metavar="N", min=2, help="Tokens in a window.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Messages of the libraries, tracebacks of errors.")]


def main() -> None:
    """The entry point of the `compress` script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed job cleans up like an interrupted one
    try:
        sys.exit(app(prog_name="compress", standalone_mode=False))
    except UsageError as error:
        console.complain(f"error: {error.format_message()} See: compress --help")
        sys.exit(error.exit_code)


class Job:
    """Around a command: turns what went wrong into one line and an exit code."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.written: Path | None = None  # the folder, once it is complete

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = OutputError("the disk is full; free some space, or choose an --out on another disk.")
        match error:
            case CompressorError():
                line, code = f"error: {error}", error.exit_code
            case KeyboardInterrupt():
                done = f"{self.written} is complete but not verified" if self.written else "nothing was written"
                line, code = f"interrupted: {done}", INTERRUPTED
            case OSError():
                line, code = (
                    f"error: {error.filename or 'the system'}: {error.strerror or error}",
                    CompressorError.exit_code,
                )
            case _:
                return
        console.complain(line, error if self.verbose else None)
        raise typer.Exit(code) from None


@app.callback(invoke_without_command=True, help=HELP)
def main_job(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="A file or a shipped recipe.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder, hub id, .gguf file or demo name [the recipe's].")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="What to write [MODEL-RECIPE].")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Calibrate on a text, .jsonl or .parquet file, or hub dataset.")
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Measure quality before and after on it.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=X", help="Change a value of the recipe; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of all randomness [the recipe's].")] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would happen to every layer.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FOLDER if compress wrote it.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure quality before and after.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not load and check what was written.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if not given and context.invoked_subcommand is None:
        console.say(context.get_help())
    if not given:
        return
    with Job(verbose) as job:
        if context.invoked_subcommand is not None:
            raise RecipeError(
                f"flags of '{context.invoked_subcommand}' go behind it; the main job's do not go with it."
            )
        if recipe is None:
            raise RecipeError(f"--recipe is missing; give a file or one of: {', '.join(shipped())}.")
        chosen = _with_flags(Recipe.load(recipe, overrides or []), model, data, seed)
        _check_device(device)
        folder = out or _default_folder(chosen.model, recipe)
        if dry_run:
            _dry_run(chosen, as_json, verbose)
        else:
            _run(job, chosen, folder, eval_text, device, force, not no_eval, not no_verify, as_json)


def _run(
    job: Job,
    recipe: Recipe,
    folder: Path,
    eval_text: str | None,
    device: str,
    force: bool,
    measures: bool,
    verifies: bool,
    as_json: bool,
) -> None:
    """compress, save, verify, and say what came out."""
    from compressor.folder import check_target, read_manifest
    from compressor.own_process import peak_bytes
    from compressor.pipeline import compress
    from compressor.verify import record, verify

    check_target(folder, force)
    start = time.monotonic()
    with console.working(quiet=as_json, verbose=job.verbose) as progress:
        artifact = compress(
            recipe.model, recipe, quality_text=eval_text, measure=measures, device=device, progress=progress
        )
        artifact.save(folder, force=force, progress=progress)
        job.written = folder
        seconds, peak = time.monotonic() - start, peak_bytes()
        report = verify(folder, progress=progress) if verifies else None
    manifest = read_manifest(folder)
    coverage = manifest["coverage"]
    result = {
        "folder": str(folder),
        "size_before": coverage["original_parameters"] * 2,
        "size_after": coverage["size_bytes"],
        "bits_per_weight": coverage["bits_per_compressed_weight"],
        "coverage": coverage["share"],
        "parameters": coverage["parameters"],
        "original_parameters": coverage["original_parameters"],
        "ledger": manifest.get("ledger", []),
        "quality": manifest.get("quality"),
        "calibration": manifest.get("calibration"),
        "verified": None if report is None else report.ok,
        "checks": [] if report is None else [asdict(row) for row in report.rows],
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
    }
    if as_json:
        console.emit(result)
    else:
        console.show_result(result, manifest, recipe)
    if report is not None:
        console.failures(report.rows)
        record(folder, report)


@app.command("recipes")
def recipes_command(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    if as_json:
        console.emit(shipped())
    else:
        console.say(console.facts(list(shipped().items())))


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress wrote.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Load a folder in every installed runtime and compare."""
    with Job(verbose):
        from compressor.verify import verify

        with console.working(quiet=as_json, verbose=verbose) as progress:
            report = verify(folder, progress=progress)
        if as_json:
            console.emit({"folder": str(folder), "ok": report.ok, "checks": [asdict(row) for row in report.rows]})
        else:
            console.say(console.checks(report.rows))
        if not report.ok:
            raise VerificationError(
                f"{folder}: is not what was measured; do not deploy it, compress again with --force."
            )


@app.command("ops")
def ops_command(
    path: Annotated[bool, typer.Option("--path", help="Only the library's file, for C++ and others.")] = False,
    into: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Copy it into a folder, for onnxruntime-genai.")
    ] = None,
    out_of: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Undo --into.")] = None,
    verbose: Verbose = False,
) -> None:
    """Where the library of fused CPU ops is, and what it uses of this processor."""
    with Job(verbose):
        from compressor.kernels import native

        if into is not None or out_of is not None:
            from compressor import ops

            if out_of is not None:
                ops.remove(out_of)
                console.say(f"{out_of} runs through its function bodies again.")
            if into is not None:
                console.say(f"{ops.place(into)} is what onnxruntime-genai will use.")
        elif path:
            console.say(str(native.path()))
        else:
            console.say(console.facts([("library", str(native.path())), ("instructions", native.isa())]))


@app.command("eval")
def eval_command(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that compress wrote, or any model.")],
    text: Annotated[str, Text],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, for KL and top-1 agreement.")
    ] = None,
    windows: WindowCount = 64,
    length: WindowLength = 512,
    runtime: Annotated[Literal["torch", "onnx"], typer.Option(help="What runs the folder.")] = "torch",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure perplexity, KL to the original and top-1 agreement."""
    with Job(verbose):
        from compressor.evaluate import evaluate

        with console.working(quiet=as_json, verbose=verbose) as progress:
            figures = evaluate(
                source, against, text=text, windows=windows, length=length, runtime=runtime, progress=progress
            )
        if as_json:
            console.emit(figures)
        else:
            console.say(console.quality_line(figures))


@app.command("probe")
def probe_command(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Any model; it is only read.")],
    data: Annotated[str | None, Text] = None,
    windows: WindowCount = 16,
    length: WindowLength = 512,
    error: Annotated[float, typer.Option(metavar="E", help="Share of a layer's output that may be lost.")] = 0.05,
    sparsity: Annotated[
        bool, typer.Option("--sparsity", help="Say instead which neurons a token does not need, and what is massive.")
    ] = False,
    percent: Annotated[
        float, typer.Option("--ppl", metavar="P", help="With --sparsity: per cent that perplexity may rise.")
    ] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="With --sparsity: draw the neurons by layer.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Say how much depth and width each block would bear to lose; nothing is changed."""
    with Job(verbose):
        if sparsity:
            _probe_sparsity(source, data, windows, length, percent, plot, as_json, verbose)
            return
        if plot is not None:
            raise RecipeError("--plot draws what --sparsity measures; give both, or neither.")
        from compressor.tolerance import probe

        with console.working(quiet=as_json, verbose=verbose) as progress:
            rows = probe(source, data, windows=windows, length=length, error=error, progress=progress)
        if as_json:
            console.emit(rows)
        else:
            console.show_tolerances(rows, error)


def _probe_sparsity(
    source: str,
    data: str | None,
    windows: int,
    length: int,
    percent: float,
    plot: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """`compress probe --sparsity`."""
    from compressor.chart import bars
    from compressor.sparsity_probe import probe_sparsity

    if not percent > 0:
        raise RecipeError(f"--ppl {percent:g}: must be above 0 per cent; 1 is usual.")
    if plot is not None and (plot.suffix != ".svg" or not plot.absolute().parent.is_dir()):
        raise OutputError(f"--plot {plot}: must be a file that ends in .svg, in a folder that exists.")
    with console.working(quiet=as_json, verbose=verbose) as progress:
        found = probe_sparsity(source, data, windows=windows, length=length, percent=percent, progress=progress)
    if plot is not None:
        rows = found["layers"]
        title = f"{source}: neurons left out at perplexity x {found['ratio']:.3f} (PPL-{percent:g} %)"
        numbers = [str(i) for i in range(len(rows))]
        svg = bars(title, numbers, [r["left_out"] for r in rows], "feed-forward layer", "share of neurons left out")
        plot.write_text(svg, encoding="utf-8")
    if as_json:
        console.emit(found)
    else:
        console.show_sparsity(found)


@app.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress wrote.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original [what the folder was made from].")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens decoded after the first.")] = 126,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads of each runtime.")] = 2,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Fresh processes for each row.")] = 3,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Measure perplexity and KL on it [the manifest's].")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure speed, memory and size beside the original and stock INT4."""
    with Job(verbose):
        from compressor.benchmark import bench

        with console.working(quiet=as_json, verbose=verbose) as progress:
            report = bench(
                folder,
                against,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                threads=threads,
                repeats=repeats,
                text=text,
                progress=progress,
            )
        if as_json:
            console.emit(asdict(report))
        else:
            console.show_bench(report)


def _with_flags(recipe: Recipe, model: str | None, data: str | None, seed: int | None) -> Recipe:
    """Flags win over the recipe, and are part of what is recorded as run."""
    update: dict[str, Any] = {}
    if model is not None:
        update["model"] = model
    if seed is not None:
        update["seed"] = seed
    if data is not None:
        update["calibration"] = recipe.calibration.model_copy(update={"data": data})
    return recipe.model_copy(update=update)


def _default_folder(model: str | None, recipe: str) -> Path:
    name = Path(model).resolve().name.removesuffix(".gguf") if model else "model"
    return Path(f"{name}-{Path(recipe).name.removesuffix('.yaml')}")


def _check_device(name: str) -> None:
    import torch

    kinds = ("cpu", "cuda", "mps", "xpu")
    if name.partition(":")[0] not in kinds:
        raise RecipeError(f"--device {name}: unknown device; {nearest(name, kinds)}")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RecipeError(f"--device {name}: torch cannot use it here ({reason}); use --device cpu.") from error


def _dry_run(recipe: Recipe, as_json: bool, verbose: bool) -> None:
    from compressor.plan import plan_of

    with console.working(quiet=as_json, verbose=verbose):
        plan = plan_of(recipe.model, recipe)
    if as_json:
        console.emit(asdict(plan))
    else:
        console.show_plan(plan)
