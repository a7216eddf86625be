"""examples/: a compressed folder in Node and in a headless browser gives the tokens that it gives in Python.

`make test-web` runs all of it. The part without packages runs wherever node is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "The history of the café began in"  # a character of two bytes, and no digits or quotes
TOKENS = 48


def node(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    command = ["node", *map(str, arguments)]
    return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=400)


def test_the_shared_code_without_a_model():
    result = node("--test", "generate.test.js")
    assert result.returncode == 0, result.stdout


def test_the_examples_name_exact_versions_and_no_lock_file():
    package = json.loads((EXAMPLES / "package.json").read_text())
    versions = {**package["dependencies"], **package["devDependencies"]}
    assert all(version.replace(".", "").isdigit() for version in versions.values()), versions
    assert "package-lock=false" in (EXAMPLES / ".npmrc").read_text()


@pytest.fixture(scope="session", params=["w4a16", "nvfp4a16"])
def written(request, tmp_path_factory) -> Path:
    """The demo model as stock MatMulNBits nodes, and as our own ops with their bodies."""
    from compressor import Recipe, compress

    if not (EXAMPLES / "node_modules").is_dir():
        pytest.skip("the packages are not installed; run: npm install --prefix examples")
    recipe = Recipe.load(request.param, ["calibration.windows=2", "quantize.rounding=nearest"])
    return compress(None, recipe, measure=False).save(tmp_path_factory.mktemp("web") / request.param)


@pytest.fixture(scope="session")
def expected(written) -> tuple[list[int], list[int]]:
    """Prompt and greedy tokens in Python's onnxruntime, up to the end token."""
    import torch

    from compressor.runtimes import OnnxSession
    from compressor.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(written)
    ids = tokenizer(PROMPT)["input_ids"]
    tokens = OnnxSession(written).greedy(torch.tensor([ids]), TOKENS)
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    assert len(set(tokens)) > 10  # text, not one token again and again
    return ids, tokens


@pytest.mark.slow
def test_node(written, expected):
    result = node("node/main.js", written, PROMPT, "--tokens", TOKENS, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["prompt"], found["tokens"]) == expected


@pytest.mark.slow
def test_browser(written, expected):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    result = node("web/browser.js", written, PROMPT, "--tokens", TOKENS, "--browser", browser)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["prompt"], found["tokens"]) == expected
    assert found["elsewhere"] == []  # nothing but the page's own server was asked
    assert found["text"].startswith(PROMPT) and len(found["text"]) > len(PROMPT) + TOKENS
