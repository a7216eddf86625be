"""The command through its own door: flags, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from compressor import console
from compressor.cli import app
from compressor.errors import ModelError, NumericsError
from compressor.recipe import Recipe
from compressor.recipe_yaml import SHIPPED, shipped

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 60
SMALL = ["--set", "calibration.windows=2", "--set", "calibration.length=32"]
WEIGHTS_ONLY = ["--set", "exports=[safetensors]", "--no-verify"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def shell(*arguments: object):
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def error_line(result, code: int) -> str:
    """The one line on stderr of a failed run; stdout is empty."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert last.startswith(("error: ", "interrupted: "))
    assert not any("Traceback" in line for line in progress)
    return last


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that a test starts, and those that verify starts
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama of two blocks with a tokenizer of bytes, as a transformers folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text() -> Path:
    path = Path("text.txt")
    path.write_text(TEXT)
    return path


# -- without any model


def test_help_fits_one_screen_and_shows_an_example():
    result = shell("--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "  compress --recipe w4a4 " in result.stdout
    for flag in "recipe model out data eval-text set seed device dry-run force no-verify json verbose".split():
        assert f"--{flag} " in result.stdout
    for command in ("recipes", "verify", "eval", "probe", "bench"):
        assert f"\n  {command} " in result.stdout


def test_nothing_given_is_help():
    assert shell().stdout == shell("--help").stdout


def test_help_does_not_wait_for_torch():
    code = "import sys, compressor.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_recipes_are_listed():
    listed = run("recipes")
    assert listed.exit_code == 0
    assert all(name in listed.stdout and description in listed.stdout for name, description in shipped().items())
    assert json.loads(run("recipes", "--json").stdout) == shipped()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--recip", "w4a4"], "error: No such option: --recip"),
        (["verfy", "x"], "error: No such command 'verfy'."),
        (["eval"], "error: Missing argument 'MODEL'."),
        (["--recipe", "w4a4", "--seed", "-1"], "error: Invalid value for '--seed'"),
        (["eval", "x", "--text", "t", "--runtime", "onx"], "error: Invalid value for '--runtime'"),
    ],
)
def test_usage_errors_are_one_line(arguments, line):
    result = shell(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--recipe", "w4a5"], "error: no recipe 'w4a5'"),
        (["--seed", "1"], "error: --recipe is missing; give a file or one of: bert-flashsvd, cfsp-20, "),
        (
            ["--recipe", "w4a4", "--set", "quantize.wieghts=int4"],
            "error: --set quantize.wieghts=int4, step 2 (quantize): unknown option",
        ),
        (["--recipe", "w4a4", "--set", "oops"], "error: --set oops: allowed is name=value"),
        (["--recipe", "w4a4", "--device", "cdua"], "error: --device cdua: unknown device; did you mean 'cuda'?"),
        (["--recipe", "w4a4", "--device", "cuda:999"], "error: --device cuda:999: torch cannot use it here ("),
        (["--json", "recipes"], "error: flags of 'recipes' go behind it"),
    ],
)
def test_wrong_flags_and_recipes(arguments, start):
    line = error_line(run(*arguments), 2)
    assert line.startswith(start) and line.endswith(".")
    assert list(Path().iterdir()) == []


def test_malformed_recipe_names_file_and_line():
    Path("w4a4.yaml").write_text("steps:\n  - quantize:\n      wieghts: int4\n")
    assert error_line(run("--recipe", "w4a4.yaml"), 2).startswith(
        "error: w4a4.yaml line 3, step 1 (quantize): unknown option"
    )


# -- with the work replaced: what the command makes of what happens


@pytest.fixture
def work(monkeypatch):
    """Let `compress` of the pipeline be any function; it is called with the arguments of the real one."""

    def replace(function):
        monkeypatch.setattr("compressor.pipeline.compress", function)

    return replace


def raising(error: BaseException):
    def function(*args, **options):
        raise error

    return function


def test_interrupted(work):
    work(raising(KeyboardInterrupt()))
    assert error_line(run("--recipe", "w4a4"), 130) == "interrupted: nothing was written"


def test_interrupted_after_writing(work, monkeypatch):
    class Written:
        def save(self, folder, **options):
            Path(folder).mkdir()

    work(lambda *args, **options: Written())
    monkeypatch.setattr("compressor.verify.verify", raising(KeyboardInterrupt()))
    line = error_line(run("--recipe", "w4a4", "--out", "small"), 130)
    assert line == "interrupted: small is complete but not verified"


def test_full_disk(work):
    work(raising(OSError(errno.ENOSPC, "No space left on device")))
    assert error_line(run("--recipe", "w4a4"), 6).startswith("error: the disk is full; free some space")


def test_other_trouble_with_files(work):
    work(raising(PermissionError(errno.EACCES, "Permission denied", "secret.txt")))
    assert error_line(run("--recipe", "w4a4"), 1) == "error: secret.txt: Permission denied"


@pytest.mark.parametrize(("error", "code"), [(ModelError("x: not a model."), 3), (NumericsError("NaN in y."), 5)])
def test_exit_codes(error, code, work):
    work(raising(error))
    assert error_line(run("--recipe", "w4a4"), code) == f"error: {error}"
    verbose = run("--recipe", "w4a4", "-v")
    assert verbose.exit_code == code
    assert verbose.stderr.splitlines()[-1].endswith(str(error)) and "Traceback" in verbose.stderr


def test_a_bug_is_not_dressed_up(work):
    work(raising(ZeroDivisionError("bug")))
    assert isinstance(run("--recipe", "w4a4").exception, ZeroDivisionError)


def test_flags_win_over_the_recipe(work, text):
    seen = {}

    def function(model, recipe, *, quality_text, measure, device, progress):
        seen.update(model=model, recipe=recipe, quality_text=quality_text, device=device)
        raise KeyboardInterrupt

    work(function)
    run(
        "--recipe",
        "w4a4",
        "--model",
        "m",
        "--seed",
        5,
        "--data",
        "d.txt",
        "--eval-text",
        text,
        "--set",
        "embedding=int8",
        *SMALL,
    )
    recipe = seen["recipe"]
    assert (seen["model"], recipe.model, recipe.seed, recipe.calibration.data) == ("m", "m", 5, "d.txt")
    assert (recipe.embedding, recipe.calibration.windows, recipe.calibration.length) == ("int8", 2, 32)
    assert (seen["quality_text"], seen["device"]) == (str(text), "cpu")
    run("--recipe", "w4a4")
    assert seen["recipe"] == Recipe.load("w4a4") and seen["model"] == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--recipe", "w4a4"], "smollm2-135m-instruct-w4a4"),
        (["--recipe", SHIPPED / "fp8.yaml", "--model", "a/b-1.5.gguf"], "b-1.5-fp8"),
        (["--recipe", "w8a8.yaml", "--model", "org/name"], "name-w8a8"),
    ],
)
def test_where_it_goes_by_default_and_that_it_is_free_is_checked_first(arguments, folder, work):
    work(raising(AssertionError("the work began")))
    Path(folder).mkdir()
    assert error_line(run(*arguments), 6).startswith(f"error: {folder} already exists; choose another --out")
    (Path(folder) / "mine.txt").write_text("precious")
    assert "will not replace it" in error_line(run(*arguments, "--force"), 6)
    assert (Path(folder) / "mine.txt").read_text() == "precious"


def test_verify_shows_every_check(monkeypatch):
    from compressor.verify import Check, VerifyReport

    rows = [Check("torch", "load", "ok", "fine"), Check("optimum", "load", "skipped", "not installed")]
    monkeypatch.setattr("compressor.verify.verify", lambda folder, progress: VerifyReport(rows))
    result = run("verify", "small")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [
        ["torch", "load", "ok", "fine"],
        ["optimum", "load", "skipped", "not", "installed"],
    ]
    assert json.loads(run("verify", "small", "--json").stdout)["ok"] is True
    rows.append(Check("torch", "logits", "FAILED", "far off"))
    broken = run("verify", "small", "--json")
    assert broken.exit_code == 7 and json.loads(broken.stdout)["ok"] is False
    assert broken.stderr == "error: small: is not what was measured; do not deploy it, compress again with --force.\n"


def test_eval_in_words(monkeypatch):
    figures = {"ppl": 31.204, "ppl_low": 30, "ppl_high": 33, "base_ppl": 26.07, "kl": 0.25, "top1": 0.8, "tokens": 9}
    seen = {}

    def evaluate(source, against, **options):
        seen.update(options, source=source, against=against)
        return figures

    monkeypatch.setattr("compressor.evaluate.evaluate", evaluate)
    result = run("eval", "small", "--against", "m", "--text", "t", "--windows", 3, "--length", 16, "--runtime", "onnx")
    assert result.stdout == (
        "perplexity 26.07 -> 31.20 (30.00 to 33.00), KL to the original 0.2500, top-1 agreement 0.8000, on 9 tokens\n"
    )
    del seen["progress"]
    assert seen == dict(source="small", against="m", text="t", windows=3, length=16, runtime="onnx")
    figures.update(base_ppl=None, kl=None, top1=None)
    assert run("eval", "small", "--text", "t").stdout == "perplexity 31.20 (30.00 to 33.00), on 9 tokens\n"
    figures.clear()
    figures.update(cosine=0.99, tokens=9)
    assert run("eval", "small", "--text", "t").stdout == "cosine to the original 0.9900, on 9 tokens\n"


# -- progress


def test_bars_show_stages_and_notes():
    screen = io.StringIO()
    with console.Bars(Console(file=screen, force_terminal=True, width=100)) as bars:
        bars.advance()  # before any stage: nothing to advance
        bars.stage("load")
        bars.stage("calibrate", 4)
        bars.advance(3)
        bars.advance()
        bars.note("the [text] is short")
        bars.stage("export", 2)
        bars.advance()
    shown = screen.getvalue()
    assert all(word in shown for word in ("load", "calibrate", "4/4", "the [text] is short", "export", "2/2"))


def test_lines_when_stderr_is_no_terminal(capsys):
    with console.working() as progress:
        progress.stage("calibrate", 4)
        progress.advance(4)
        progress.note("short")
        print("a library prints")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "calibrate (4)\nnote: short\na library prints\n"


def test_quiet_shows_nothing(capsys):
    with console.working(quiet=True) as progress:
        progress.stage("calibrate", 4)
        progress.advance()
        progress.note("short")
    assert capsys.readouterr() == ("", "")


# -- the real thing, small


def test_dry_run(tiny):
    result = run("--recipe", "w4a16", "--model", tiny, "--dry-run")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "model.layers.1.mlp.down_proj" in result.stdout and "model.embed_tokens" in result.stdout
    assert "group 64: 128 does not divide in_features 64" in result.stdout
    plan = json.loads(run("--recipe", "w4a16", "--model", tiny, "--dry-run", "--json").stdout)
    assert len([row for row in plan["rows"] if ".layers." in row["name"]]) == 14
    assert plan["bytes_before"] == sum(row["bytes_before"] for row in plan["rows"])
    assert plan["bytes_after"] == sum(row["bytes_after"] for row in plan["rows"]) < plan["bytes_before"]
    assert list(Path().iterdir()) == []


def test_compress_writes_a_folder_and_says_how_to_go_on(tiny, text):
    result = run("--recipe", "w4a4", "--model", tiny, "--data", text, "--out", "small", *SMALL, *WEIGHTS_ONLY)
    assert result.exit_code == 0, (result.stderr, result.exception)
    for name in ("model.safetensors", "config.json", "recipe.yaml", "manifest.json"):
        assert (Path("small") / name).is_file()
    for part in (
        "in bf16 ->",
        "bits a weight",
        "perplexity",
        "calibrated on",
        " at its peak",
        "compressor.load('small').model()",
    ):
        assert part in result.stdout
    assert "compress verify small" in result.stdout and "compress eval small --against" in result.stdout
    ran = Recipe.load("small/recipe.yaml")
    assert (ran.calibration.data, ran.calibration.windows, ran.exports) == (str(text), 2, ["safetensors"])
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_json_is_one_object_and_nothing_else(tiny, text):
    arguments = [
        "--recipe",
        "w4a16",
        "--model",
        tiny,
        "--out",
        "small",
        "--eval-text",
        text,
        *SMALL,
        *WEIGHTS_ONLY,
        "--json",
    ]
    result = shell(*arguments)
    assert result.returncode == 0 and result.stderr == ""
    figures = json.loads(result.stdout)
    assert figures["folder"] == "small" and figures["size_after"] < figures["size_before"]
    assert 4 < figures["bits_per_weight"] < 5 and 0 < figures["coverage"] < 1
    assert figures["quality"]["ppl"] > 1 and figures["verified"] is None
    assert figures["seconds"] > 0 and figures["peak_bytes"] > 50e6
    again = run(*arguments)
    assert error_line(again, 6).startswith("error: small already exists")
    stamp = Path("small/model.safetensors").stat().st_ino
    replaced = run(*arguments, "--force")
    assert replaced.exit_code == 0 and Path("small/model.safetensors").stat().st_ino != stamp


def test_shipped_prose_is_said_to_be_used(tiny):
    result = run("--recipe", "w4a4", "--model", tiny, "--out", "small", *SMALL, *WEIGHTS_ONLY)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert [line for line in result.stderr.splitlines() if line.startswith("note: ") and "--data" in line]


def test_wrong_models_and_texts(tiny):
    Path("folder").mkdir()
    error_line(run("--recipe", "w4a4", "--model", "folder"), 3)
    Path("broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00nothing")
    error_line(run("--recipe", "w4a4", "--model", "broken.gguf"), 3)
    Path("short.txt").write_text("too short")
    line = error_line(run("--recipe", "w4a4", "--model", tiny, "--data", "short.txt"), 4)
    assert "9 tokens found, 512 needed for one window" in line
    error_line(run("--recipe", "w4a4", "--model", tiny, "--data", "missing.txt"), 4)
    error_line(run("verify", "folder"), 3)
    error_line(run("verify", "nothing-here"), 3)
    error_line(run("eval", "folder", "--text", "short.txt"), 3)
    assert sorted(path.name for path in Path().iterdir()) == ["broken.gguf", "folder", "short.txt"]


def test_verify_and_eval_see_what_was_written(tiny, text):
    done = run("--recipe", "w8a8", "--model", tiny, "--data", text, "--out", "small", *SMALL, "--json")
    assert done.exit_code == 0, (done.stdout, done.stderr, done.exception)
    result = json.loads(done.stdout)
    assert result["verified"] is True and {row["runtime"] for row in result["checks"]} >= {"files", "torch"}
    assert json.loads(Path("small/manifest.json").read_text())["verification"] == result["checks"]

    arguments = ["eval", "small", "--against", tiny, "--text", text, "--windows", 4, "--length", 32, "--json"]
    figures = json.loads(run(*arguments).stdout)
    assert set(figures) == {"ppl", "ppl_low", "ppl_high", "base_ppl", "kl", "top1", "tokens"}
    assert figures["tokens"] == 4 * 31 and 0 <= figures["kl"] < 0.1
    assert figures["ppl_low"] <= figures["ppl"] <= figures["ppl_high"]
    through_onnx = json.loads(run(*arguments, "--runtime", "onnx").stdout)
    assert through_onnx["ppl"] == pytest.approx(figures["ppl"], rel=0.01)

    weights = Path("small/model.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 0x10
    weights.write_bytes(raw)
    broken = run("verify", "small")
    assert broken.exit_code == 7
    assert "FAILED" in broken.stdout and "small: is not what was measured" in broken.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_nothing(tiny):
    command = [sys.executable, "-m", "compressor", "--recipe", "w4a4", "--model", str(tiny), "--out", "small"]
    Path("text.txt").write_text(TEXT * 12)
    # Many windows, so that calibration lasts longer than the signal takes.
    command += ["--data", "text.txt", "--set", "calibration.windows=350", "--set", "calibration.length=128"]
    # A shell that runs tests in the background lets its children ignore the signal.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("calibrate"):
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130, (seen, rest)
    assert out == "" and (seen + rest.splitlines())[-1] == "interrupted: nothing was written"
    assert [path.name for path in Path().iterdir()] == ["text.txt"]
