"""Verification passes on what was written, and every kind of wrong folder is caught and located."""

import hashlib
import json
import shutil

import onnx
import pytest

from compressor import Recipe, compress
from compressor.verify import FAILED, OK, verify

CORE = ("torch", "onnxruntime")


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    recipe = Recipe.load("w4a4", ["calibration.windows=2", "calibration.length=24"])
    return compress(tiny_folder("llama"), recipe, measure=False).save(tmp_path_factory.mktemp("verify") / "w4a4")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "out")


def rehash(folder, name):
    """Pretend that the damaged file is what was written: the hashes alone must not be what catches it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_graph(folder, change):
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    change(graph)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    rehash(folder, "model.onnx")


def failures(report):
    return {(r.runtime, r.check): r.detail for r in report.rows if r.status == FAILED}


def test_a_good_folder_passes_in_every_installed_runtime(written):
    report = verify(written)
    assert report.ok, failures(report)
    passed = {r.runtime for r in report.rows if r.status == OK}
    assert {"files", "torch", "onnxruntime"} <= passed
    import importlib.util

    for runtime, module in {
        "optimum": "optimum",
        "onnxruntime-genai": "onnxruntime_genai",
        "transformers": "compressed_tensors",
    }.items():
        assert (importlib.util.find_spec(module) is None) or runtime in passed


def test_one_flipped_nibble_is_found_by_name(folder):
    from compressor.exporters.safetensors_file import header

    name = "model.layers.1.mlp.down_proj.weight_packed"
    _, _, offset, length = header(folder / "model.safetensors")[name]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(offset + length // 2)
        file.write(bytes([byte ^ 1]))
    rehash(folder, "model.safetensors")
    assert list(failures(verify(folder, runtimes=CORE))) == [("files", name)]


def test_a_scale_with_the_wrong_direction_is_found(folder):
    def multiply_instead(graph):
        function = next(f for f in graph.functions if f.name == "FP4Linear")
        node = next(n for n in function.node if n.op_type == "Div" and "weight_global_scale" in n.input)
        node.op_type = "Mul"

    edit_graph(folder, multiply_instead)
    found = failures(verify(folder, runtimes=CORE))
    assert any(runtime == "onnxruntime" and "proj" in check for runtime, check in found), found


def test_a_dropped_input_of_a_body_is_found(folder):
    def drop_block_scale(graph):
        function = next(f for f in graph.functions if f.name == "FP4Linear")
        cast = next(n for n in function.node if n.op_type == "Cast" and "weight_scale" in n.input)
        users = [n for n in function.node if cast.output[0] in n.input]
        for node in users:  # scale / divisor becomes 1 / divisor
            node.input[list(node.input).index(cast.output[0])] = "one"
        one = onnx.helper.make_node("Constant", [], ["one"], value=onnx.helper.make_tensor("one", 1, [1, 1], [1.0]))
        function.node.insert(0, one)

    edit_graph(folder, drop_block_scale)
    assert any(runtime == "onnxruntime" for runtime, _ in failures(verify(folder, runtimes=CORE)))


def test_lost_activation_rounding_is_found(folder):
    """Same weights and wiring: only the node comparison can see that a body does not round its input."""
    from compressor.exporters.onnx_graph import smooth_graph

    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    (folder / "model.onnx").write_bytes(smooth_graph(graph).SerializeToString())
    rehash(folder, "model.onnx")
    found = failures(verify(folder, runtimes=CORE))
    assert sum(runtime == "onnxruntime" for runtime, _ in found) >= 14, found


def test_swapped_wires_are_found(folder):
    """Every node is right on its own input; the model is not."""

    def swap(graph):
        a, b = (
            next(n for n in graph.graph.node if n.name.endswith(f"layers.0.mlp.{p}")) for p in ("gate_proj", "up_proj")
        )
        for i in range(1, len(a.input)):
            a.input[i], b.input[i] = b.input[i], a.input[i]
        a.name, b.name = b.name, a.name

    edit_graph(folder, swap)
    found = failures(verify(folder, runtimes=CORE))
    assert ("onnxruntime", "prefill without activation rounding") in found and not any(
        "proj" in check for _, check in found
    )


def test_a_file_that_is_gone_or_changed_is_named(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{}")
    assert set(failures(verify(folder, runtimes=CORE))) == {("files", "tokenizer.json"), ("files", "config.json")}
