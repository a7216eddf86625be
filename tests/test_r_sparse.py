"""Activation sparsity: thresholds, what they leave out, the folder and the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor import Recipe, cett, compress, load, sparsity, sparsity_trial
from compressor.data import text_of, windows
from compressor.errors import RecipeError
from compressor.kernels import native, sparsify
from compressor.layers import QuantLinear
from compressor.runtimes import read_graph
from compressor.sparse import SparseLinear, everywhere
from compressor.sparsity import Choices
from compressor.verify import FAILED, LIBRARY, OK, verify

IDS = torch.arange(4, 40)[None]


def recipe(*steps, **more):
    return Recipe.from_dict({"calibration": {"windows": 3, "length": 64}, "steps": list(steps), **more})


@pytest.fixture
def text(tmp_path, prose):
    path = tmp_path / "text.txt"
    path.write_text(prose * 6)
    return path


def logits(model):
    with torch.inference_mode(), everywhere():
        return model(input_ids=IDS).logits


def made(tiny, tokenizer, text, *steps, **options):
    chosen = recipe({"r_sparse": options}, *steps, exports=["safetensors"])
    return compress(tiny("llama"), chosen, tokenizer=tokenizer, data=text, measure=False)


def test_sparsify_keeps_what_is_large_and_the_first_token_of_longer_rows():
    x = torch.tensor([[[0.1, -3.0], [2.0, 0.2]]])
    threshold = torch.tensor([1.0, 1.0])
    assert torch.equal(sparsify.sparsify(x, threshold, "decode"), x)
    assert torch.equal(sparsify.sparsify(x, threshold, "all"), torch.tensor([[[0.1, -3.0], [2.0, 0.0]]]))
    assert torch.equal(sparsify.sparsify(x, threshold, "none"), x)
    for tokens in ("decode", "all"):
        assert torch.equal(sparsify.sparsify(x[:, 1:], threshold, tokens), torch.tensor([[[2.0, 0.0]]]))


def test_everywhere_leaves_a_share_of_the_tokens_dense_where_it_is_asked_to():
    layer = SparseLinear(nn.Linear(2, 2, bias=False), torch.full((2,), 9.0), "decode")
    x = torch.ones(1, 5, 2)
    for dense, first in ((0.0, 1), (0.5, 2), (1.0, 5)):
        with torch.no_grad(), everywhere(dense):
            y = layer(x)
        assert torch.equal(y[:, :first], layer.inner(x[:, :first])) and not y[:, first:].any()


def test_nothing_dropped_is_the_model_and_alpha_0_its_truncated_svd(tiny, tiny_tokenizer, text):
    model = tiny("llama")
    dense = made(tiny, tiny_tokenizer, text, sparsity=0.0, allocation="uniform").model()
    for p in model.parameters():
        if p.dim() == 2:  # linears and tables are stored in bf16
            p.data = p.data.bfloat16().float()
    assert torch.equal(logits(dense), logits(model))
    low = made(tiny, tiny_tokenizer, text, sparsity=0.4, allocation="uniform", alpha=0.0).model()
    layer, weight = low.model.layers[0].mlp.up_proj, tiny("llama").model.layers[0].mlp.up_proj.weight
    assert torch.isinf(layer.threshold).all() and layer.rank == int(0.6 * 64 * 96 / 160)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        truncated = x.double() @ ((u[:, : layer.rank] * s[: layer.rank]) @ v[: layer.rank]).T
        assert (layer(x[None, :1])[0] - truncated[:1]).norm() < 5e-3 * truncated[:1].norm()


def test_alpha_1_is_thresholding_and_the_folded_pair_the_two_branches(tiny, tiny_tokenizer, text):
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    plain = made(tiny, tiny_tokenizer, text, sparsity=0.5, allocation="uniform", score="magnitude").model()
    layer = plain.model.layers[1].mlp.gate_proj
    t = layer.threshold[0]
    assert (layer.threshold == t).all()
    with torch.inference_mode():
        assert torch.equal(layer(x), nn.functional.linear(x * (x.abs() > t), layer.inner.weight))
    pair = made(tiny, tiny_tokenizer, text, sparsity=0.5, allocation="uniform", alpha=0.6).model()
    layer = pair.model.layers[1].mlp.gate_proj
    weight = tiny("llama").model.layers[1].mlp.gate_proj.weight
    with torch.inference_mode():
        m = x.abs() > layer.threshold
        branches = (x * m) @ weight.T + ((x * ~m) @ layer.down.weight.T) @ layer.up.weight.T
        assert (layer(x) - branches).norm() < 5e-3 * branches.norm()  # bf16 weights


@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {}, {"alpha": None}])
def test_the_budget_is_kept_on_other_text(tiny, tiny_tokenizer, text, options):
    """The share of weights that are read, pairs counted, within one percent of what was asked for."""
    artifact = made(tiny, tiny_tokenizer, text, sparsity=0.5, tokens="all", **options)
    model = artifact.model()
    read, every = 0.0, 0

    def count(layer, args):
        nonlocal read, every
        x = args[0][:, 1:]
        n, k = layer.out_features, layer.in_features
        share = float((x.abs() > layer.threshold).double().mean())
        read += share * n * k + layer.rank * (n + k)
        every += n * k

    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.register_forward_pre_hook(count)
    other = "The lazy dog says 42 things before; names and numbers occur where it has been told."
    with torch.inference_mode():
        model(**tiny_tokenizer(other, return_tensors="pt"))
    assert 0.46 < read / every < 0.54  # few tokens of a random model; the real one is in test_real_sparse.py


def test_kl_loses_less_than_uniform_by_its_own_estimate():
    rng = torch.Generator().manual_seed(0)
    tables, shapes = {}, {}
    for i in range(4):
        weight, x = torch.randn(32, 48, generator=rng), torch.randn(200, 48, generator=rng) * (i + 1)
        c = sparsity.scores(weight, "columns", None)
        tables[str(i)] = sparsity.losses(weight, x, c, torch.rand(32, generator=rng), (1.0,))
        shapes[str(i)] = (32, 48)
    found = sparsity.share_out(tables, shapes, 0.5)
    cost = sum(tables[n][found[n]] for n in tables)
    assert cost < 0.95 * sum(tables[n][Choices(1.0, 0.5)] for n in tables)
    assert sum(c.sparsity for c in found.values()) / 4 >= 0.5


def test_massive_tokens_do_not_move_thresholds():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    spiked = torch.cat((x, 1000 * torch.ones(50, 16)))
    assert torch.equal(sparsity.usual(spiked), x)


@pytest.mark.parametrize(
    ("inner", "graph"), [("float", "portable"), ("int4", "ort"), ("nvfp4", "portable")]
)
def test_a_sparse_folder_runs_everywhere_and_its_inner_linears_are_quantized(
    tiny, tiny_tokenizer, text, tmp_path, inner, graph
):
    quantize = {"targets": ["*.inner"], "weights": inner} | ({"group_size": 32} if inner == "int4" else {})
    steps = [] if inner == "float" else [{"quantize": quantize}]
    chosen = recipe({"r_sparse": {"sparsity": 0.5, "alpha": 0.8, "allocation": "uniform"}}, *steps, graph=graph)
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    layer = artifact.model().model.layers[0].mlp.down_proj
    assert isinstance(layer, SparseLinear) and isinstance(layer.inner, QuantLinear) == (inner != "float") and layer.rank
    folder = artifact.save(tmp_path / "out")
    assert torch.equal(logits(load(folder).model()), logits(artifact.model()))
    nodes = [n for n in read_graph(folder).graph.node if n.op_type in ("Sparsify", "SparseLinear")]
    assert [n.op_type for n in nodes] == ["SparseLinear"] * 14
    assert {a.s.decode() for n in nodes for a in n.attribute if a.name == "format"} == {inner}
    report = verify(folder, runtimes=("torch", "onnxruntime", LIBRARY))
    assert report.ok, [r for r in report.rows if r.status == FAILED]
    ran = {r.runtime for r in report.rows if r.status == OK}
    assert ran == {"files", "torch", "onnxruntime"} | ({LIBRARY} if native.built() else set())


def test_thresholds_leave_out_what_was_asked_in_the_sparse_model(tiny, tiny_tokenizer, text, monkeypatch):
    """Each layer, on the calibration's own windows; thresholds of the dense model's inputs do not."""

    def worst(rounds):
        monkeypatch.setattr(sparsity_trial, "ROUNDS", rounds)
        artifact = made(tiny, tiny_tokenizer, text, sparsity=0.6, allocation="uniform")
        model = artifact.model()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
        seen = windows(tiny_tokenizer, text_of(str(text))[0], 3, 64)

        def run():
            with torch.inference_mode(), everywhere():
                model(input_ids=seen)

        return max(abs(share - 0.6) for share in cett.realised(layers, run).values())

    assert worst(2) < 0.01 < worst(0)


def test_errors():
    for options, message in (
        ({"sparsity": 1.0}, "sparsity 1 must be from 0 to 0.9"),
        ({"alpha": 2}, "alpha 2 is not a share"),
        ({"alpha": None, "allocation": "uniform"}, "alpha: null is chosen with the sparsities"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe({"r_sparse": options})
