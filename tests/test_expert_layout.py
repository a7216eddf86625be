"""Experts in the weight file, one after the other: read with one read, found through the manifest."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from compressor import Recipe, compress, load
from compressor.errors import OutputError, RecipeError
from compressor.expert_layout import BOUNDARY, owner
from compressor.exporters.safetensors_file import header
from compressor.folder import read_manifest
from compressor.verify import FAILED, OK, SKIPPED

PMQ = {"targets": ["*.experts.*"], "bits": 2.5, "choices": [2, 4], "group_size": 32, "significance": "random"}
REST = {"quantize": {"targets": ["*"], "ignore": ["*.experts.*"], "weights": "int8"}}
IDS = torch.randint(5, 288, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tiny, tiny_tokenizer, prose, tmp_path_factory):
    """made(pmq's options): a folder of a mixture of 2 and 4 bits for stock QMoE."""

    def make(**options):
        root = tmp_path_factory.mktemp("experts")
        (root / "text.txt").write_text(prose)
        steps = [{"pmq": PMQ | options}, REST]
        recipe = Recipe.from_dict({"calibration": {"windows": 2, "length": 32}, "experts": "qmoe", "steps": steps})
        model = tiny("mixtral", num_hidden_layers=1)
        artifact = compress(model, recipe, tokenizer=tiny_tokenizer, data=root / "text.txt", measure=False)
        return artifact.save(root / "out")

    return make


@pytest.fixture(scope="module")
def folder(made):
    return made()


def test_one_read_gives_an_expert(folder):
    entries = header(folder / "model.safetensors")
    index = read_manifest(folder)["expert_index"]
    assert [*index] == [f"model.layers.{i}.block_sparse_moe.experts" for i in range(1)]
    seen, file = set(), os.open(folder / "model.safetensors", os.O_RDONLY)
    for container, places in index.items():
        assert len(places) == 4
        for number, (offset, length) in enumerate(places):
            assert offset % BOUNDARY == 0
            raw = os.pread(file, length, offset)
            own = {n: e for n, e in entries.items() if owner(n, index) == (container, number)}
            assert len(own) == 9 and sum(e[3] for e in own.values()) == length == len(raw)
            for name, (_, _, start, size) in own.items():
                assert raw[start - offset : start - offset + size] == os.pread(file, size, start), name
            seen |= own.keys()
    os.close(file)
    packed = load(folder).packed
    assert seen == {f"{n}.{t}" for n, p in packed.items() if ".experts." in n for t in p.tensors}


def test_the_package_reads_the_file(folder):
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.uint8 and not t.any() for n, t in stored.items() if n.endswith(".padding"))
    assert {n for n in stored if not n.endswith(".padding")} == header(folder / "model.safetensors").keys()


def test_stock_qmoe_runs_the_folder(folder):
    pytest.importorskip("onnxruntime")
    from compressor.runtimes import OnnxSession, read_graph
    from compressor.verify import verify

    kinds = [n.op_type for n in read_graph(folder).graph.node]
    assert kinds.count("QMoE") == 2 and "MixedBitMoE" not in kinds
    with torch.no_grad():
        expected = load(folder).model()(input_ids=IDS, use_cache=False).logits
    found, _ = OnnxSession(folder).prefill(IDS)
    assert (found - expected).abs().amax() <= 2e-2 * expected.abs().amax()
    report = verify(folder)
    assert report.ok, report.rows
    rows = {(r.runtime, r.check): r for r in report.rows}
    assert rows["onnxruntime", "experts"].detail.startswith("layers: 1,")
    assert rows["onnxruntime", "batch of two lengths with torch's routing"].detail.endswith("allowed 2e-02")
    assert " of 72 times a token went to other experts" in rows["onnxruntime", "as deployed"].detail
    if ("optimum", "caches") in rows:
        assert rows["optimum", "caches"].status == SKIPPED and rows["optimum", "greedy"].status == OK
        assert rows["optimum", "caches"].detail == "set model.num_key_value_heads = 2; optimum takes 4 for mixtral"


def test_groups_of_16_are_exact_in_stock_qmoe(made):
    pytest.importorskip("onnxruntime")
    from compressor.verify import verify

    rows = {r.check: r for r in verify(made(group_size=16), runtimes=["torch", "onnxruntime"]).rows}
    assert all(r.status == OK for r in rows.values()), rows
    assert rows["experts"].detail.endswith("allowed 1e-04") and rows["greedy"].detail == "64 of 64 tokens equal"
    assert rows["batch of two lengths"].detail.endswith("allowed 1e-03")


def test_a_router_that_chooses_others_is_found(folder, tmp_path):
    """Held to torch's routing, the rest of the graph is right: only the router's own check can see it."""
    pytest.importorskip("onnxruntime")
    from compressor.runtimes import read_graph
    from compressor.verify_runtimes import check_onnxruntime, check_torch

    copy = shutil.copytree(folder, tmp_path / "out")
    check_torch(copy, tmp_path)
    graph = read_graph(copy)
    node = next(n for n in graph.graph.node if n.op_type == "TopK")
    next(a for a in node.attribute if a.name == "largest").i = 0
    (copy / "model.onnx").write_bytes(graph.SerializeToString())
    rows = check_onnxruntime(copy, tmp_path)
    assert {r.check for r in rows if r.status == FAILED} == {"routing"}, rows
    assert next(r for r in rows if r.check == "as deployed").detail.startswith("72 of 72 times")


def test_the_graph_takes_the_routing_that_it_is_given(folder):
    pytest.importorskip("onnxruntime")
    from compressor.exporters.onnx_graph import expert_nodes, held_routing
    from compressor.runtimes import OnnxSession, expose, read_graph
    from compressor.verify_runtimes import routing

    model, (value,) = load(folder).model(), (weights for _, weights, _ in expert_nodes(read_graph(folder)).values())
    with torch.no_grad(), routing(model, True) as chosen:
        model(input_ids=IDS, use_cache=False)
    (weights,) = chosen.values()
    assert weights.shape == (*IDS.shape, 4) and ((weights != 0).sum(-1) == 2).all()
    own = read_graph(folder)
    expose(own, [value])
    outputs, held = OnnxSession(folder, own).run(IDS), OnnxSession(folder, held_routing(read_graph(folder)))
    same, _ = held.prefill(IDS, more={value: outputs[value]})
    assert torch.equal(same, torch.from_numpy(outputs["logits"]))
    other, _ = held.prefill(IDS, more={value: np.roll(outputs[value], 1, -1)})
    assert (other - same).abs().amax() > 2e-2 * same.abs().amax()


def test_widths_that_stock_qmoe_does_not_read_are_refused(tiny, tiny_tokenizer, prose, tmp_path):
    with pytest.raises(RecipeError, match="stock QMoE has no kernel for 3 bits"):
        Recipe.from_dict({"experts": "qmoe", "steps": [{"pmq": PMQ | {"choices": [2, 3]}}]})
    model = tiny("mixtral", num_hidden_layers=1)
    recipe = Recipe.from_dict({"experts": "qmoe", "steps": [{"quantize": {"weights": "int8", "activations": "int8"}}]})
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer, measure=False)
    with pytest.raises(OutputError, match="stock QMoE cannot compute these experts: not all of their weights are"):
        artifact.save(tmp_path / "out")
