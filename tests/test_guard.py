"""Guards: the budget is kept, the noisy input is found, and the prediction is what rounding inputs really costs."""

import pytest
import torch

from compressor import Recipe, compress
from compressor.calibrate import calibrate
from compressor.errors import RecipeError
from compressor.kernels import codec
from compressor.methods import guard
from compressor.methods.quantize import Quantize
from compressor.model import linears, twin
from compressor.sensitivity import output_fisher
from compressor.statistics import BlockNoise, ChannelSquare

WINDOWS = torch.randint(4, 288, (4, 48), generator=torch.Generator().manual_seed(2))


def surveyed(model, kl=True):
    calibration = calibrate(model, WINDOWS, {BlockNoise, ChannelSquare})
    layers = linears(model)
    generator = torch.Generator().manual_seed(0)
    return layers, calibration, output_fisher(model, WINDOWS, list(layers), generator) if kl else None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_the_share_is_kept_and_used(tiny, share):
    layers, calibration, fisher = surveyed(tiny("llama"))
    guards = guard.choose(layers, calibration, fisher, share)
    assert guards.share <= share + 1e-9
    total = sum(m.weight.numel() for m in layers.values())
    assert guards.share == pytest.approx(sum(layers[n].weight.numel() for n in guards.names) / total)
    smallest = min(m.weight.numel() for m in layers.values()) / total
    assert (len(guards.sites) > 0) == (share > smallest)
    before, after = guards.predicted
    assert after < before if guards.names else after == before


@pytest.mark.parametrize("kl", [True, False])
def test_the_input_with_an_outlier_is_guarded(tiny, kl):
    """Blocks that hold one value a hundred times the others lose the others."""
    model = tiny("llama")
    noisy = model.model.layers[1].post_attention_layernorm
    with torch.no_grad():
        noisy.weight[5::16] *= 100
        for reader in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            reader.weight[:, 5::16] /= 100
    guards = guard.choose(*surveyed(model, kl), share=0.25)
    assert {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"} <= guards.names
    worst = max(guards.sites, key=lambda site: site.noise)
    assert worst.names == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")


def test_the_prediction_is_the_measured_kl(tiny):
    """KL of a model whose inputs alone are rounded, against the second-order estimate of it."""
    model = tiny("llama")
    layers, calibration, fisher = surveyed(model)
    predicted = guard.choose(layers, calibration, fisher, 0.0).predicted[0]

    def rounded(_, args):
        blocks = codec.blocks_of(args[0], 16)
        step = blocks.abs().amax(-1, keepdim=True) / 6
        return ((codec.round_e2m1(blocks / step) * step).flatten(-2),)

    noisy = twin(model)
    for layer in linears(noisy).values():
        layer.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        p, q = (torch.log_softmax(m(input_ids=WINDOWS).logits, -1) for m in (model, noisy))
    assert predicted == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.35)


def test_a_recipe_with_guards(tiny, tiny_tokenizer, prose, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(prose * 6)
    recipe = Recipe.load("w4a4", ["calibration.windows=3", "calibration.length=24", "quantize.guard=0.3"])
    artifact = compress(tiny("llama"), recipe, tokenizer=tiny_tokenizer, data=text)
    report = artifact.record["steps"]["2 quantize"]
    named = {n for site in report["sites"] for n in site["site"]}
    found = {n for n, p in artifact.packed.items() if p.attributes["activations"] == "fp8"}
    assert found == named and 0.1 < report["share_of_multiply_adds"] <= 0.3
    for name, packed in artifact.packed.items():
        assert ("input_global_scale" in packed.tensors) == (name not in named)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"guard": 1.5}, "not a share"), ({"guard": 0.2, "activations": "none"}, "'none' have none")],
)
def test_impossible_guards_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**{"activations": "nvfp4"} | options)
    with pytest.raises(RecipeError, match=message):
        Recipe.load("w4a4", [f"quantize.{k}={v}" for k, v in options.items()])
