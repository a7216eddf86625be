"""Experts in the weight file, one after the other: read with one read, found through the manifest."""

from __future__ import annotations

import os

import pytest
import torch

from compressor import Recipe, compress, load
from compressor.errors import OutputError, RecipeError
from compressor.expert_layout import BOUNDARY, owner
from compressor.exporters.safetensors_file import header
from compressor.folder import read_manifest

PMQ = {"targets": ["*.experts.*"], "bits": 2.5, "choices": [2, 4], "group_size": 32, "significance": "random"}
REST = {"quantize": {"targets": ["*"], "ignore": ["*.experts.*"], "weights": "int8"}}
IDS = torch.randint(5, 288, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tiny, tiny_tokenizer, prose, tmp_path_factory):
    """A mixture of 2 and 4 bits for stock QMoE."""
    root = tmp_path_factory.mktemp("experts")
    (root / "text.txt").write_text(prose)
    recipe = Recipe.from_dict(
        {"calibration": {"windows": 2, "length": 32}, "experts": "qmoe", "steps": [{"pmq": PMQ}, REST]}
    )
    model = tiny("mixtral", num_hidden_layers=1)
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer, data=root / "text.txt", measure=False)
    return artifact.save(root / "out")


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
    report = verify(folder, runtimes=["torch", "onnxruntime"])
    assert report.ok, report.rows
    assert any(r.check == "experts" and r.detail.startswith("layers: 1,") for r in report.rows)


def test_widths_that_stock_qmoe_does_not_read_are_refused(tiny, tiny_tokenizer, prose, tmp_path):
    with pytest.raises(RecipeError, match="stock QMoE has no kernel for 3 bits"):
        Recipe.from_dict({"experts": "qmoe", "steps": [{"pmq": PMQ | {"choices": [2, 3]}}]})
    model = tiny("mixtral", num_hidden_layers=1)
    recipe = Recipe.from_dict({"experts": "qmoe", "steps": [{"quantize": {"weights": "int8", "activations": "int8"}}]})
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer, measure=False)
    with pytest.raises(OutputError, match="stock QMoE cannot compute these experts: not all of their weights are"):
        artifact.save(tmp_path / "out")
