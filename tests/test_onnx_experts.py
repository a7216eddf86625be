"""Layers of experts in a graph: the sum that is traced, and the graph in stock onnxruntime and with the library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor import Recipe, compress
from compressor.errors import ModelError
from compressor.exporters import onnx_experts
from compressor.kernels import native
from compressor.model import as_loaded

IDS = torch.randint(5, 288, (2, 20), generator=torch.Generator().manual_seed(1))
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe",
)  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_traced_sum_is_what_the_model_computes(name, tiny):
    model = as_loaded(tiny(name)).model
    expected = logits(model)
    with onnx_experts.dense(model):
        found = logits(model)
        assert any("_dense" in vars(m)["forward"].__qualname__ for m in model.modules() if "forward" in vars(m))
    assert (found - expected).abs().amax() <= 1e-5 * expected.abs().amax()
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(logits(model), expected)


def test_a_layer_that_adds_something_else_is_refused(tiny):
    model = as_loaded(tiny("qwen2_moe")).model
    layer = model.model.layers[0].mlp
    own = layer.forward

    def twice(x):
        y = own(x)
        more = layer.shared_expert(x)  # without its gate
        return y + more if isinstance(y, torch.Tensor) else (y[0] + more, *y[1:])

    layer.forward = twice
    with pytest.raises(ModelError, match="what it computes beside its experts is not known"), onnx_experts.dense(model):
        pass


def test_the_graph_of_a_mixture_gives_its_logits(tiny, tiny_tokenizer, prose, tmp_path):
    pytest.importorskip("onnxruntime")
    from compressor.runtimes import OnnxSession, read_graph

    text = tmp_path / "text.txt"
    text.write_text(prose)
    step = {"targets": ["*.experts.*"], "bits": 2.25, "choices": [1, 2, 3, 4], "group_size": 32, "scope": "layer"}
    chosen = {
        "calibration": {"windows": 2, "length": 32}, "exports": ["safetensors", "onnx"],
        "steps": [{"pmq": step}, {"quantize": {"targets": ["*"], "ignore": ["*.experts.*"], "weights": "int8"}}],
    }  # fmt: skip
    model = tiny("mixtral", num_hidden_layers=1)
    artifact = compress(model, Recipe.from_dict(chosen), tokenizer=tiny_tokenizer, data=text, measure=False)
    folder = artifact.save(tmp_path / "out")
    assert {p.attributes["bits"] for n, p in artifact.packed.items() if ".experts." in n} >= {2, 3}
    expected = logits(artifact.model())
    assert artifact.record["graph"] == {"MixedBitMoE": 1}
    assert [n.op_type for n in read_graph(folder).graph.node].count("MixedBitMoE") == 1
    for library in (False, True) if native.built() else (False,):
        session = OnnxSession(folder, library=library)
        found, _ = session.prefill(IDS)
        assert (found - expected).abs().amax() <= 1e-4 * expected.abs().amax(), f"library {library}"
        _, cache = session.prefill(IDS[:, :-1])
        last, _ = session.prefill(IDS[:, -1:], cache)
        assert (last[:, 0] - expected[:, -1]).abs().amax() <= 1e-4 * expected.abs().amax()
