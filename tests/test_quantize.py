"""The quantize method: placements, the scale search's promise, shared scales, what is packed."""

import pytest
import torch
from torch import nn

from compressor.calibrate import Calibration
from compressor.layers import build
from compressor.methods.quantize import LayerPlan, Quantize

FORMATS = [("nvfp4", None), ("mxfp4", None), ("int1", 32), ("int2", 32), ("int3", 32)]
FORMATS += [("int4", 32), ("int4", None), ("int8", None), ("fp8", None)]


def linear(rng, out_features=24, in_features=64, bias=False):
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.weight.data = torch.randn(out_features, in_features, generator=rng) * torch.rand(in_features, generator=rng)
    return layer


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def weighted_error(method, layer, importance):
    plan = LayerPlan(method.place(*layer.weight.shape), importance=importance)
    weight = build(method.apply(layer, plan)).dequantize()[:, : layer.in_features]
    h = torch.ones(layer.in_features) if importance is None else importance
    return ((weight - layer.weight).square() * h).sum(-1)


@pytest.mark.parametrize(("weights", "group"), FORMATS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_search_is_never_worse_than_abs_max(rng, weights, group, calibrated):
    layer = linear(rng)
    importance = torch.rand(64, generator=rng).square() * 10 if calibrated else None
    searched = weighted_error(Quantize(weights, group_size=group), layer, importance)
    plain = weighted_error(Quantize(weights, group_size=group, scales="absmax"), layer, importance)
    assert (searched <= plain * (1 + 1e-6)).all()
    if weights in ("int2", "int3"):  # whose longer end is put where the longer tail is
        plan = LayerPlan(Quantize(weights, group_size=group).place(24, 64))
        scale = Quantize(weights, group_size=group).apply(layer, plan).tensors["weight_scale"]
        assert (scale < 0).any() and (scale > 0).any()
    best = ("int8", "fp8") if calibrated else ("int1", "int8", "fp8")  # the mean |w| of one bit, abs-max of eight
    if weights not in best:
        assert searched.sum() < plain.sum() * 0.999


@pytest.mark.parametrize(("weights", "group"), FORMATS)
def test_relative_error_is_that_of_the_format(rng, weights, group):
    layer = linear(rng, 64, 128)
    method = Quantize(weights, group_size=group)
    weight = build(method.apply(layer, LayerPlan(method.place(64, 128)))).dequantize()
    error = ((weight - layer.weight).norm() / layer.weight.norm()).item()
    # About 0.6 of a step for 2 bits down to 0.01 for 8: a broken scale or packing is far above.
    limits = {"int1": 0.8, "int2": 0.6, "int3": 0.3, "int4": 0.15, "int8": 0.015}
    assert error < (limits | {"nvfp4": 0.12, "mxfp4": 0.16, "fp8": 0.04})[weights]


def test_size_is_predicted_exactly(rng):
    layer = linear(rng, 24, 96)
    for weights, group in FORMATS:
        method = Quantize(weights, group_size=group)
        place = method.place(24, 96)
        packed = method.apply(layer, LayerPlan(place))
        stored = sum(
            t.numel() * t.element_size()
            for n, t in packed.tensors.items()
            if n not in ("weight_shape", "weight_global_scale")
        )
        assert stored == place.size_bytes, weights


def test_misfit_goes_to_the_next_smaller_group_and_says_so():
    place = Quantize("int4", group_size=128).place(64, 576)
    assert (place.group_size, place.padding, place.kept) == (64, 0, None) and "128 does not divide" in place.note


def test_misfit_pads_or_keeps_on_request(rng):
    method = Quantize("nvfp4", on_misfit="pad")
    layer = linear(rng, 8, 40)
    place = method.place(8, 40)
    assert place.padding == 8
    module = build(method.apply(layer, LayerPlan(place)))
    x = torch.randn(3, 40, generator=rng)
    assert torch.allclose(module(x), x @ module.dequantize()[:, :40].T, atol=1e-4)
    assert "16 does not divide in_features 40" in Quantize("nvfp4", on_misfit="keep").place(8, 40).kept
    assert Quantize("nvfp4").place(8, 40).kept
    assert Quantize("int4", group_size=64).place(8, 40).kept


def test_one_site_shares_its_global_scales(rng):
    layers = {"q": linear(rng), "k": linear(rng), "o": linear(rng)}
    layers["k"].weight.data *= 5

    class Site:
        def __init__(self, *names):
            self.names = names

    class Stub(Calibration):
        sites = [Site("q", "k"), Site("o")]  # noqa: RUF012

        def __init__(self):
            pass

        def seen(self, name):
            return True

        def value(self, name, statistic):
            return torch.tensor(9.0) if statistic.__name__ == "AbsMax" else torch.ones(64)

    plans = Quantize("nvfp4", "nvfp4").plan(layers, Stub())
    assert torch.equal(plans["q"].weight_global_scale, plans["k"].weight_global_scale)
    assert plans["q"].weight_global_scale < plans["o"].weight_global_scale
    packed = Quantize("nvfp4", "nvfp4").apply(layers["q"], plans["q"])
    assert packed.tensors["input_global_scale"].item() == 298.0  # the bf16 value below 448 * 6 / 9


@pytest.mark.parametrize(
    ("weights", "activations"), [("nvfp4", "nvfp4"), ("int8", "int8"), ("fp8", "fp8"), ("mxfp4", "mxfp4")]
)
def test_held_dense_weights_change_nothing(rng, plain_torch, weights, activations):
    method = Quantize(weights, activations)
    layer = linear(rng, bias=True)
    plan = LayerPlan(method.place(24, 64), input_global_scale=torch.tensor([500.0]) if weights == "nvfp4" else None)
    module = build(method.apply(layer, plan))
    x = torch.randn(2, 7, 64, generator=rng)
    slow = module(x)
    module.hold_dense()
    assert torch.equal(module(x), slow)
    assert (slow - layer(x)).norm() / layer(x).norm() < 0.25


def test_zero_rows_survive_every_format(rng):
    layer = linear(rng)
    layer.weight.data[3] = 0
    for weights, group in FORMATS:
        method = Quantize(weights, group_size=group)
        weight = build(method.apply(layer, LayerPlan(method.place(24, 64)))).dequantize()
        assert weight.isfinite().all() and weight[3].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4", "activations": "nvfp4"}, "allowed: none"),
        ({"weights": "nvfp4", "group_size": 32}, "blocks are 16"),
        ({"weights": "int4", "group_size": 48}, "power of two"),
        ({"weights": "fp8", "group_size": 32}, "one scale a row"),
        ({"weights": "nvfp4", "four_over_six": True}, "needs activations"),
    ],
)
def test_impossible_combinations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**options)
