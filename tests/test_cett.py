"""CETT and PPL-p %: what layers lose, the largest loss that perplexity allows, and the step."""

from __future__ import annotations

import pytest
import torch

from compressor import Recipe, cett, compress, sparsity
from compressor.calibrate import calibrate
from compressor.data import windows
from compressor.errors import DataError, RecipeError
from compressor.evaluate import measure, torch_runner
from compressor.sparse import SparseLinear
from compressor.sparsity import Activations

NAMES = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


@pytest.fixture(scope="module")
def trained(tiny, tiny_tokenizer, prose):
    """A tiny model that needs its neurons, as one with random weights does not, and the text that it knows."""
    model, ids = tiny("llama"), windows(tiny_tokenizer, prose * 6, 8, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False), ids


def curves(model, ids):
    return cett.curves(model, NAMES, calibrate(model, ids, {Activations}, NAMES))


def test_nothing_and_everything_and_never_less_for_more():
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 40, generator=rng), torch.randn(100, 40, generator=rng)
    one = cett.curve(weight, x)
    assert cett.loss_of(weight, x, one.threshold(0.0)) == 0 and (one.threshold(0.0) == 0).all()
    assert cett.loss_of(weight, x, one.threshold(1.0)) == pytest.approx(1) and torch.isinf(one.threshold(1.0)).all()
    found = [cett.loss_of(weight, x, one.threshold(c)) for c in (0.02, 0.1, 0.3, 0.5, 0.8)]
    assert found == pytest.approx([0.02, 0.1, 0.3, 0.5, 0.8], abs=0.02)
    assert one.dip < 1e-3
    columns = weight.norm(dim=0)
    assert torch.allclose(one.threshold(0.3) * columns, one.threshold(0.3)[0] * columns[0])


@pytest.mark.parametrize("percent", [1.0, 5.0])
def test_perplexity_rises_by_what_was_asked_for(trained, percent):
    model, ids = trained
    found = curves(model, ids[:4])
    best = cett.search(model, found, ids[4:], percent)
    assert 1 + 0.9 * percent / 100 <= best.ratio <= 1 + percent / 100 and 0 < best.cett < 1
    sparse = cett.sparse_twin(model, found, best.cett, "all")
    losses = [measure(torch_runner(m), ids[4:]).losses.mean() for m in (sparse, model)]
    assert (losses[0] - losses[1]).exp().item() == pytest.approx(best.ratio, rel=1e-6)
    kept = []
    layer = sparse.get_submodule(NAMES[0])
    layer.inner.register_forward_pre_hook(lambda _, args: kept.append((args[0][:, 1:] != 0).double().mean()))
    measure(torch_runner(sparse), ids[4:])
    assert 1 - torch.stack(kept).mean().item() == pytest.approx(best.left_out[NAMES[0]], abs=1e-6)


def test_more_perplexity_allows_more_sparsity_and_harmless_layers_go_whole(trained):
    model, ids = trained
    found = curves(model, ids[:4])
    shares = [sum(cett.search(model, found, ids[4:], p).left_out.values()) for p in (1.0, 10.0)]
    assert shares[0] < shares[1]
    assert cett.search(model, {}, ids[4:], 1.0).cett == 1.0


def test_the_step(tiny_tokenizer, trained, text):
    steps = [{"cett": {"targets": ["*.down_proj"], "ppl": 2}}]
    chosen = Recipe.from_dict({"calibration": {"windows": 4, "length": 48}, "steps": steps, "exports": ["safetensors"]})
    artifact = compress(trained[0], chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    layer = artifact.model().model.layers[1].mlp.down_proj
    assert isinstance(layer, SparseLinear)
    contributions = layer.threshold * sparsity.scores(layer.inner.weight, "columns", None)
    assert torch.allclose(contributions, contributions[0].expand(96))
    assert 1 < artifact.record["steps"]["1 cett"]["ppl_ratio"] <= 1.02


def test_errors():
    with pytest.raises(DataError, match="give 2 windows or more"):
        cett.halves(torch.zeros(1, 4, dtype=torch.long))
    for options, message in (
        ({"ppl": 1, "cett": 0.1}, "either ppl or cett"),
        ({"ppl": 0}, "ppl 0 must be above 0"),
        ({"ppl": None, "cett": 2}, "cett 2 is not a share"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.from_dict({"steps": [{"cett": options}]})
