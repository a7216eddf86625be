"""What can be cut out is found in every family, without names, and cutting it out is zeroing it."""

import pytest
import torch
from torch import nn

from compressor.model import as_loaded, linears
from compressor.prunable import _matched, cut, find_prunable
from compressor.structure import hollow

# Family -> units of ffn and of heads in a block; attention that reshapes to a width of its own has no heads to cut.
FOUND = {
    "llama": (96, 2),
    "mistral": (96, 2),
    "qwen2": (96, 2),
    "qwen3": (96, 2),
    "gemma": (96, 2),
    "gemma2": (96, 2),
    "gemma3": (96, 2),
    "phi": (96, 4),
    "phi3": (96, 0),
    "opt": (96, 0),
    "gpt_neox": (96, 0),
    "gpt2": (96, 0),
    "bert": (96, 0),
    "mixtral": (96, 2),
}


def logits(model, seed=0):
    tokens = torch.randint(4, 288, (1, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=tokens)[0]


def masked(model, what, keep):
    stays = torch.zeros(what.units, dtype=torch.bool)
    stays[keep] = True
    for name in what.readers:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach() * stays[what.columns])


def test_found_in_every_family(tiny, family):
    model = as_loaded(tiny(family)).model
    found = find_prunable(model)
    ffns = [one for one in found if one.kind == "ffn"]
    heads = [one for one in found if one.kind == "heads"]
    ffn, head = FOUND[family]
    assert {one.units for one in ffns} == {ffn}
    assert {one.units for one in heads} == ({head} if head else set())
    experts = 4 if family == "mixtral" else 1
    assert (len(ffns), len(heads)) == (2 * experts, 2 if head else 0)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_cut_is_masked(tiny, family, kind):
    model, other = as_loaded(tiny(family)).model, as_loaded(tiny(family)).model
    found = [one for one in find_prunable(model) if one.kind == kind]
    if not found:
        assert FOUND[family][1] == 0 and kind == "heads"
        return
    before = logits(model)
    for number, one in enumerate(found):
        keep = torch.randperm(one.units, generator=torch.Generator().manual_seed(number))[: one.units // 2]
        cut(model, one, keep)
        masked(other, one, keep)
    after, expected = logits(model), logits(other)
    assert (expected - before).abs().max() > 1e-3  # something was cut
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in linears(model).values())


def test_everything_kept_changes_no_bit(tiny):
    model = tiny("llama")
    before = logits(model)
    for one in find_prunable(model):
        cut(model, one, torch.arange(one.units))
    assert torch.equal(logits(model), before)


def test_rows_that_never_fire_go_by_the_order_of_the_others():
    v, slopes = torch.randn(6, dtype=torch.float64), torch.rand(5, 12, dtype=torch.float64)
    slopes[:, 7] = 0
    channel = torch.arange(12) % 6
    assert torch.equal(_matched(slopes, slopes * v[channel], v, 1e-5), channel)
    assert _matched(slopes.flip(1), slopes.flip(1) * v[channel.flip(0)], v, 1e-5) is None


def test_blocks_of_other_shapes_are_looked_at_one_by_one(tiny):
    model = tiny("llama", num_hidden_layers=3)
    first = [one for one in find_prunable(model) if one.kind == "ffn"]
    cut(model, first[1], torch.arange(32))
    again = {one.readers[0]: one.units for one in find_prunable(hollow(model)) if one.kind == "ffn"}
    assert list(again.values()) == [96, 32, 96]


def test_a_norm_between_the_linears_is_no_feed_forward_layer(tiny):
    class Normed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm = inner, nn.LayerNorm(96)

        def forward(self, x):
            return self.inner(self.norm(x))

    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Normed(mlp.down_proj)
    kinds = {one.readers[0]: one.kind for one in find_prunable(model)}
    assert not any("layers.0.mlp" in name for name in kinds)
    assert "model.layers.1.mlp.down_proj" in kinds
