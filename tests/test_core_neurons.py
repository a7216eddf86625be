"""Core neurons: what decodes with them, which they are, when they are chosen anew, and that nothing stays changed."""

from __future__ import annotations

import pytest
import torch

from compressor.core_neurons import PROBES, contribution, core_neurons, energy, positive, size_of
from compressor.errors import ModelError

IDS = torch.arange(4, 60)[None]
WIDE = {"llama": {"intermediate_size": 256}, "phi3": {"intermediate_size": 256}, "phi": {"intermediate_size": 256},
        "opt": {"ffn_dim": 256}}  # fmt: skip


def decoded(model, ids, prompt):
    """Logits of the last of `prompt` tokens of ids [1, L] and of what comes behind them, a token at a time."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        found = [out.logits[:, -1]]
        for token in ids[0, prompt:]:
            out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.cat(found)


@pytest.mark.parametrize("which", WIDE)
def test_all_neurons_are_the_dense_model_bitwise_and_nothing_stays_changed(tiny, which):
    model = tiny(which, **WIDE[which])
    before = {n: p for n, p in model.named_parameters()}
    dense = decoded(model, IDS, 40)
    with core_neurons(model, 1.0) as core:
        assert torch.equal(decoded(model, IDS, 40), dense)
        assert core.gathers == len(core.layers) == 2
    with core_neurons(model, 0.5):
        assert (decoded(model, IDS, 40) - dense).abs().max() > 1e-3
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(p is after[n] for n, p in before.items())
    assert torch.equal(decoded(model, IDS, 40), dense)


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize("which", WIDE)
def test_a_core_is_the_model_with_the_other_neurons_silenced(tiny, which, fill):
    model, silenced = tiny(which, **WIDE[which]), tiny(which, **WIDE[which])
    with core_neurons(model, 0.5, fill=fill) as core, torch.no_grad():
        found = decoded(model, IDS, 40)[1:]
        again = model(input_ids=IDS[:, :40], use_cache=True)
        with core.held():
            at_once = model(input_ids=IDS[:, 40:], past_key_values=again.past_key_values).logits[0]
        chosen = {layer.name: layer.chosen for layer in core.layers}
        assert all(len(c) == 128 for c in chosen.values())
    assert (at_once - found).abs().max() < 1e-4
    means = {}
    for name in chosen:
        reader = silenced.get_submodule(name)
        reader.register_forward_pre_hook(lambda r, args: means.update({r: args[0].reshape(40, -1)[1:].mean(0)}))
    with torch.no_grad():
        cache = silenced(input_ids=IDS[:, :40], use_cache=True).past_key_values
        for name, c in chosen.items():
            reader = silenced.get_submodule(name)
            others = ~torch.isin(torch.arange(256), c)
            if fill == "mean":
                bias = reader.weight[:, others] @ means[reader][others]
                reader.bias = torch.nn.Parameter(bias if reader.bias is None else bias + reader.bias)
            reader.weight[:, others] = 0
            reader._forward_pre_hooks.clear()
        expected = silenced(input_ids=IDS[:, 40:], past_key_values=cache).logits[0]
    assert (expected - found).abs().max() < 1e-4


def test_scores():
    x = torch.tensor([[1.0, -9.0, 2.0, 0.5, 0.1], [1.0, -9.0, 0.2, 3.0, -1.0]])
    norms = torch.tensor([10.0, 1.0, 1.0, 1.0, 1.0])
    assert torch.equal(contribution(x, norms), torch.tensor([20.0, 18.0, 2.2, 3.5, 1.1]))
    assert torch.equal(positive(x), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]))  # 40 % of 3.5: one a token
    assert torch.allclose(energy(x, norms), torch.tensor([200.0, 162.0, 4.04, 9.25, 1.01]))
    assert [size_of(1536, s, 64) for s in (0.01, 0.4, 0.41, 1.0)] == [64, 640, 640, 1536]
    assert size_of(96, 0.9, 64) == 64 and size_of(96, 1.0, 64) == 96


def test_contributions_retain_more_energy_than_positive_counts_on_each_layer(tiny):
    retained = {}
    for score in ("contribution", "positive"):
        model, seen = tiny("llama", **WIDE["llama"]), {}

        def keep(reader, args, seen=seen):
            seen[reader] = args[0][0, 1:]

        with core_neurons(model, 0.25, score=score) as core:
            for layer in core.layers:
                layer.readers[0].register_forward_pre_hook(keep)
            decoded(model, IDS[:, :49], 49)
            decided = [(o.choose(), o.chosen)[1] for o in core.layers]
            shares = [energy(seen[o.readers[0]], o.norms) for o in core.layers]
            retained[score] = [(e[c].sum() / e.sum()).item() for e, c in zip(shares, decided, strict=True)]
    assert all(a > b + 0.05 for a, b in zip(retained["contribution"], retained["positive"], strict=True))


def test_a_larger_core_is_nearer_to_the_dense_model(tiny):
    model = tiny("llama", **WIDE["llama"])
    dense = decoded(model, IDS, 30)[1:].log_softmax(-1)
    found = []
    for share in (1.0, 0.75, 0.5, 0.25):
        with core_neurons(model, share):
            ours = decoded(model, IDS, 30)[1:].log_softmax(-1)
        found.append((dense.exp() * (dense - ours)).sum(-1).mean().item())
    assert found[0] == 0 and found == sorted(set(found))


def test_a_refresh_gathers_only_where_the_core_has_changed(tiny):
    model = tiny("llama", **WIDE["llama"])
    calls = []
    with core_neurons(model, 0.5, refresh=4) as core:
        layer = core.layers[0]
        layer.readers[0].register_forward_pre_hook(lambda _, a: calls.append(a[0].shape[-1]))
        decoded(model, IDS[:, :37], 20)
        assert calls == [256] + [128] * 4 + [256] * PROBES + [128] * 4 + [256]
        gathered = core.gathers
        layer.score[:] = 0  # the half that counts what was is gone: another core
        layer.choose()
        layer.fresh, layer.seen = -layer.norms, 1
        layer.score = torch.zeros_like(layer.norms)
        assert layer.choose() is True
        layer.fresh, layer.seen = layer.score.clone(), 1
        assert layer.choose() is False and layer.choose() is False
        decoded(model, IDS[:, :22], 20)
        assert core.gathers == gathered + 2  # a new sentence chooses anew


def test_generate_and_a_prompt_in_two_pieces(tiny):
    model = tiny("llama", **WIDE["llama"])
    with torch.inference_mode(), core_neurons(model, 1.0):
        ours = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, model.generate(IDS, max_new_tokens=6, do_sample=False))
    chosen = []
    for pieces in ((40,), (25, 15)):
        with core_neurons(model, 0.5) as core, torch.no_grad():
            cache, at = None, 0
            for length in (*pieces, 1):
                cache = model(IDS[:, at : at + length], past_key_values=cache, use_cache=True).past_key_values
                at += length
            chosen.append([layer.chosen for layer in core.layers])
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))


def test_errors(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="share 0 of the neurons must be above 0"), core_neurons(model, 0.0):
        pass
    with pytest.raises(ValueError, match="refresh 0 is no number"), core_neurons(model, refresh=0):
        pass
    with pytest.raises(ModelError, match="of one sentence, and 2 were given"), core_neurons(model):
        model(input_ids=IDS.repeat(2, 1))
    with pytest.raises(ModelError, match="has experts"), core_neurons(tiny("mixtral")):
        pass
    with pytest.raises(ModelError, match="no feed-forward layer"), core_neurons(model, within=()):
        pass
