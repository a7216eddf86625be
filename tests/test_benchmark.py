"""`compress bench`: what is measured, in which processes, and how the table says it. No test looks at a speed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compressor import Recipe, benchmark, benchmark_process, benchmark_rows, compress, console, own_process
from compressor.benchmark import BenchReport, bench
from compressor.benchmark_rows import Figure, Row
from compressor.errors import DataError, ModelError
from compressor.own_process import run_module

SMALL = ["calibration.windows=2", "calibration.length=24", "quantize.rounding=nearest", "quantize.on_misfit=keep"]


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    recipe = Recipe.load("nvfp4a16", SMALL)
    return compress(tiny_folder("llama"), recipe, measure=False).save(tmp_path_factory.mktemp("bench") / "small")


@pytest.fixture(scope="module")
def encoder_folder(tiny_folder, tmp_path_factory):
    recipe = Recipe.load("nvfp4a16", SMALL)
    return compress(tiny_folder("bert"), recipe, measure=False).save(tmp_path_factory.mktemp("bench") / "small")


@pytest.fixture
def processes(monkeypatch):
    """The processes that `bench` starts, without starting them: a list of (module, job), and answers to give."""
    started, wrong = [], {}

    def run(module, *arguments):
        if module == "compressor.stock":
            job, _, made = arguments
            started.append((module, job))
            Path(made).mkdir()
            (Path(made) / "model.safetensors").write_bytes(b"12345")
            return wrong.get(job)
        job = json.loads(Path(arguments[0]).read_text())
        started.append((module, job))
        speed = {"latency_ms": 2.0} if job["batch"] else {"tokens_per_s": float(len(started))}
        Path(arguments[1]).write_text(json.dumps({**speed, "peak_bytes": 5e6}))
        return wrong.get(job["driver"])

    def missing(options):
        raise ModelError("libcompressor_ops.so: is not there.")

    for module in (benchmark, benchmark_rows):
        monkeypatch.setattr(module, "run_module", run)
    monkeypatch.setattr("compressor.register_ops", missing)  # whether or not it was built here
    return started, wrong


def rows_of(report):
    return {(row.model, row.runtime): row for row in report.rows}


def test_every_row_is_measured_in_turn(folder, processes):
    started, _ = processes
    report = bench(folder, prompt_tokens=7, new_tokens=3, threads=1, repeats=2)
    jobs = [job for module, job in started if module.endswith("process")]
    drivers = [(job["driver"], Path(job["source"]).name) for job in jobs]
    assert drivers[:5] == [
        ("torch", "original"),
        ("genai", "fp32"),
        ("genai", "int4"),
        ("genai", "small"),
        ("torch", "small"),
    ]
    assert drivers == drivers[:5] * 2  # not one row twice, then the next
    assert all((job["threads"], job["new_tokens"], len(job["ids"])) == (1, 3, 7) for job in jobs)
    assert [job["ours"] for job in jobs[:5]] == [False, False, False, False, True]  # genai loads all in one way
    rows = rows_of(report)
    assert len(rows) == 6
    assert rows["stock INT4", "onnxruntime-genai"].figures["tokens_per_s"] == Figure(8.5, low=6.0, high=11.0)
    assert rows["original, fp32", "torch"].size_bytes == 5
    weights = sum((folder / name).stat().st_size for name in ("model.onnx", "model.safetensors"))
    assert rows["small", "onnxruntime-genai, bodies"].size_bytes == weights


def test_a_row_that_cannot_be_measured_says_why_and_the_others_go_on(folder, processes):
    started, wrong = processes
    wrong |= {"int4": "ImportError: no builder", "torch": "ended by SIGKILL"}
    rows = rows_of(bench(folder, prompt_tokens=7, new_tokens=3, repeats=3))
    assert rows["stock INT4", "onnxruntime-genai"].reason == "ImportError: no builder"
    assert rows["small", "torch"].reason == "ended by SIGKILL"
    assert not rows["small", "torch"].figures
    assert rows["small", "onnxruntime-genai, bodies"].figures
    assert sum(job["driver"] == "torch" for module, job in started if module.endswith("process")) == 2  # no repeats


def test_a_lost_original_loses_its_rows_only(folder, processes):
    _, wrong = processes
    wrong["save"] = "gone: no such file or folder."
    rows = rows_of(bench(folder, prompt_tokens=7, new_tokens=3, repeats=1))
    assert "give --against MODEL (gone" in rows["stock INT4", "onnxruntime-genai"].reason
    assert rows["small", "torch"].figures
    with pytest.raises(ModelError, match="--against gone: no such"):
        bench(folder, "gone", prompt_tokens=7, new_tokens=3)


def test_an_encoder_is_timed_in_batches(encoder_folder, processes):
    started, _ = processes
    rows = rows_of(bench(encoder_folder, prompt_tokens=7, repeats=1))
    jobs = [job for module, job in started if module.endswith("process")]
    assert [job["driver"] for job in jobs] == ["torch", "onnxruntime", "onnxruntime", "torch"]
    assert all(job["batch"] == benchmark.BATCH for job in jobs)
    assert "language models only" in rows["stock INT4", "onnxruntime"].reason


def test_quality_is_measured_on_a_text(folder, tiny_folder, processes, monkeypatch, prose, tmp_path):
    """The fakes leave no graph to evaluate: INT4 is our own folder, whose figures must then be ours."""
    import shutil

    pytest.importorskip("onnxruntime_genai")

    def build(module, job, source, made):
        shutil.copytree(tiny_folder("llama") if job == "save" else folder, made)

    monkeypatch.setattr(benchmark_rows, "run_module", build)
    (tmp_path / "text.txt").write_text(prose)
    report = bench(folder, prompt_tokens=7, new_tokens=3, repeats=1, text=str(tmp_path / "text.txt"))
    rows = rows_of(report)
    before, ours = rows["original, fp32", "torch"], rows["small", "torch"]
    stock = rows["stock INT4", "onnxruntime-genai"]
    assert before.kl is None and before.perplexity != ours.perplexity
    assert ours.kl > 1e-4
    assert (stock.perplexity, stock.kl) == (pytest.approx(ours.perplexity, 1e-4), pytest.approx(ours.kl, 1e-2))
    assert rows["small", "onnxruntime-genai, bodies"].perplexity == ours.perplexity


def test_an_encoder_has_no_perplexity(encoder_folder, tmp_path):
    with pytest.raises(DataError, match="is an encoder, which has no perplexity; leave --text out"):
        bench(encoder_folder, prompt_tokens=7, text="text.txt")


def test_the_library_is_asked_for_by_its_name(folder, processes, monkeypatch):
    import compressor

    started, _ = processes
    monkeypatch.setattr(compressor, "register_ops", lambda options: None)
    rows = rows_of(bench(folder, prompt_tokens=7, new_tokens=3, repeats=1))
    assert rows["small", "onnxruntime-genai, library"].figures
    assert sum(job["library"] for module, job in started if module.endswith("process")) == 1

    def fails(options):
        raise ModelError("libcompressor_ops.so: was built for another onnxruntime.")

    monkeypatch.setattr(compressor, "register_ops", fails)
    rows = rows_of(bench(folder, prompt_tokens=7, new_tokens=3, repeats=1))
    assert rows["small", "onnxruntime-genai, library"].reason.startswith("libcompressor_ops.so: was built")


def test_a_folder_that_names_the_library_has_no_row_without_it(folder, processes, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "libcompressor_ops.so"
    (own / "genai_config.json").write_text(json.dumps(config))
    rows = rows_of(bench(own, prompt_tokens=7, new_tokens=3, repeats=1))
    assert "compress ops --out-of" in rows["own", "onnxruntime-genai, bodies"].reason


def test_genai_gets_the_path_that_register_ops_gives(monkeypatch, tmp_path):
    """register_ops gives sessions `native.path()`; genai opens its own session and takes the path."""
    from compressor.kernels import native

    asked = []

    class Stop(Exception):
        pass

    class Config:
        def __init__(self, source):
            asked.append(source)

        def overlay(self, text):
            asked.append(json.loads(text)["model"]["decoder"]["session_options"]["custom_ops_library"])
            raise Stop

    monkeypatch.setitem(sys.modules, "onnxruntime_genai", SimpleNamespace(Config=Config))
    monkeypatch.setattr(native, "path", lambda: tmp_path / "ops.so")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop):
        benchmark_process.run_genai({"threads": 1, "source": "small", "library": True, "ids": [5], "new_tokens": 1})
    assert asked == [str(tmp_path / "small"), str(tmp_path / "ops.so")]


def test_the_library_is_found_from_any_folder(folder, tmp_path, monkeypatch):
    """onnxruntime-genai loads a library from the model's folder or the current one only, and `bench` runs anywhere."""
    pytest.importorskip("onnxruntime_genai")
    from compressor.kernels import native

    if not native.built():
        pytest.skip("the library of fused ops was not built here")
    monkeypatch.chdir(folder.parent)  # and a relative source stays what it was
    job = {"driver": "genai", "source": folder.name, "ours": False, "library": True, "ids": [5, 6, 7], "batch": 0}
    (tmp_path / "job").write_text(json.dumps(job | {"new_tokens": 2, "threads": 1}))
    assert run_module("compressor.benchmark_process", str(tmp_path / "job"), str(tmp_path / "result")) is None
    assert json.loads((tmp_path / "result").read_text())["tokens_per_s"] > 0


def test_more_tokens_than_the_model_holds(folder):
    with pytest.raises(DataError, match="129 tokens are asked for and the model holds 128; give fewer"):
        bench(folder, prompt_tokens=100, new_tokens=28)


def test_decode_steps_exactly_as_often_as_asked(monkeypatch):
    calls = []

    def load():
        return lambda: calls.append("begin"), lambda: calls.append("step")

    figures = benchmark_process.decode(load, {"new_tokens": 4})
    assert calls == ["begin", "step", "begin", *["step"] * 4]
    assert set(figures) == {"load_s", "first_token_ms", "tokens_per_s"}
    monkeypatch.setattr(benchmark_process, "DECODE_LIMIT_S", 0.0)
    calls.clear()
    benchmark_process.decode(load, {"new_tokens": 4})
    assert calls == ["begin", "step", "begin", "step"]  # a slow runtime stops, after one step at least


@pytest.mark.parametrize("driver", ["genai", "torch"])
def test_drivers_of_language_models(driver, folder, tmp_path):
    if driver == "genai":
        pytest.importorskip("onnxruntime_genai")
    job = {"driver": driver, "source": str(folder), "ours": True, "library": False, "batch": 0}
    (tmp_path / "job").write_text(json.dumps({**job, "ids": [5, 6, 7], "new_tokens": 2, "threads": 1}))
    benchmark_process.main(str(tmp_path / "job"), str(tmp_path / "result"))
    figures = json.loads((tmp_path / "result").read_text())
    assert set(figures) == {"load_s", "first_token_ms", "tokens_per_s", "peak_bytes"}
    assert all(value > 0 for value in figures.values())


@pytest.mark.parametrize("driver", ["onnxruntime", "torch"])
def test_drivers_of_encoders(driver, encoder_folder, tmp_path):
    job = {"driver": driver, "source": str(encoder_folder), "ours": True, "library": False, "batch": 3}
    (tmp_path / "job").write_text(json.dumps({**job, "ids": [5, 6, 7], "new_tokens": 0, "threads": 1}))
    benchmark_process.main(str(tmp_path / "job"), str(tmp_path / "result"))
    figures = json.loads((tmp_path / "result").read_text())
    assert set(figures) == {"load_s", "latency_ms", "sequences_per_s", "peak_bytes"}


@pytest.mark.slow
def test_stock_int4_is_built_from_the_saved_original(tiny_folder, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    import torch

    from compressor.evaluate import torch_runner
    from compressor.model import load_model

    assert run_module("compressor.stock", "save", str(tiny_folder("llama")), str(tmp_path / "original")) is None
    assert run_module("compressor.stock", "int4", str(tmp_path / "original"), str(tmp_path / "int4")) is None
    import onnx

    graph = onnx.load(tmp_path / "int4" / "model.onnx", load_external_data=False)
    assert {"MatMulNBits", "GroupQueryAttention"} <= {node.op_type for node in graph.graph.node}
    logits = benchmark._genai_runner(tmp_path / "int4")(torch.tensor([[5, 6, 7]]))
    expected = torch_runner(load_model(tiny_folder("llama")).model)(torch.tensor([[5, 6, 7]]))
    assert logits.shape == expected.shape
    assert torch.cosine_similarity(logits, expected, dim=-1).min() > 0.95  # 0.978 found


def test_a_process_says_what_went_wrong_in_one_line(tmp_path):
    assert run_module("compressor.stock", "save", "nowhere!", str(tmp_path)).startswith("nowhere!: no such file")


def test_peak_memory_is_not_that_of_the_process_before(tmp_path, monkeypatch):
    """A small program started by a large one: ru_maxrss would give it the large one's figure."""
    (tmp_path / "small_program.py").write_text(
        "import sys; from pathlib import Path; from compressor.own_process import peak_bytes\n"
        "Path(sys.argv[1]).write_text(str(peak_bytes()))\n"
    )
    root = Path(benchmark.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tmp_path}")
    ballast = bytearray(300_000_000)
    assert run_module("small_program", str(tmp_path / "peak")) is None
    assert int((tmp_path / "peak").read_text()) < 100e6 < len(ballast) < own_process.peak_bytes()


def test_the_command(folder, processes):
    from typer.testing import CliRunner

    from compressor.cli import app

    asked = ["bench", str(folder), "--prompt-tokens", "7", "--new-tokens", "3", "--repeats", "1"]
    result = CliRunner().invoke(app, [*asked, "--json"])
    report = json.loads(result.stdout)
    assert (report["prompt_tokens"], report["new_tokens"], report["original"][-5:]) == (7, 3, "llama")
    assert report["rows"][2]["model"] == "stock INT4" and report["rows"][2]["figures"]["tokens_per_s"]["median"]
    assert CliRunner().invoke(app, asked).stdout.startswith("| model | runtime | size MB | load s |")
    wrong = CliRunner().invoke(app, ["bench", str(folder.parent)])
    assert (wrong.exit_code, wrong.stdout) == (3, "") and "is not a folder that compressor wrote" in wrong.stderr


def test_the_table(capsys):
    figures = {
        "load_s": Figure(0.25, 0.25, 0.25),
        "first_token_ms": Figure(101.6, 99.4, 105.0),
        "tokens_per_s": Figure(30.04, 29.0, 31.0),
        "peak_bytes": Figure(411e6, 410e6, 412e6),
    }
    rows = [
        Row("small", "onnxruntime-genai, bodies", 112_700_000, figures, 27.283, 0.0593),
        Row("small", "onnxruntime-genai, library", reason="this version has no library of fused kernels"),
    ]
    console.show_bench(BenchReport("small", "big", "causal-lm", 128, 126, 2, 3, "a processor", {"torch": "2"}, rows))
    title, rule, first, second, _, caption = capsys.readouterr().out.splitlines()
    assert title.count("|") == rule.count("|") == first.count("|") == second.count("|") == 10
    assert "| 113 | 0.25 | 102 (99–105) | 30.0 (29.0–31.0) | 411 (410–412) | 27.28 | 0.059 |" in first
    assert "not measured: this version has no library" in second
    assert caption.startswith("big: 128 tokens, 126 more after the first, --threads 2, median of 3 processes")
