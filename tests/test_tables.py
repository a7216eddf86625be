"""Token tables in every format: the plan is what is stored, and what is stored runs in torch and onnxruntime."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from compressor import Recipe, compress, load
from compressor.artifact import Artifact
from compressor.errors import DataError, ModelError, NumericsError, RecipeError
from compressor.exporters import hf_config
from compressor.exporters.onnx_graph import compressed_nodes
from compressor.layers import Packed, build
from compressor.plan import plan_of
from compressor.recipe import TableFormat
from compressor.runtimes import OnnxSession, expose, read_graph
from compressor.tables import TABLE_METHODS, head_importance, pack_tables, place_tables

CHOICES = list(TABLE_METHODS)
IDS = torch.randint(4, 288, (2, 17), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-4  # whole models in float32


def recipe(embedding: str, head: str | None = None, *overrides: str) -> Recipe:
    tables = [f"embedding={embedding}", f"lm_head={head or embedding}"]
    return Recipe.load("nvfp4a16", ["calibration.windows=2", "calibration.length=24", *tables, *overrides])


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_every_name_of_the_recipe_has_a_method() -> None:
    assert set(typing.get_args(TableFormat)) == {"keep", "bf16", *TABLE_METHODS}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("choice", [*CHOICES, "bf16", "keep"])
def test_the_plan_has_the_exact_bytes(tiny: Any, choice: str, tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied, hidden_size=128)
    chosen = recipe(choice)
    tables = pack_tables(model, chosen)
    rows = {row.name: row for row in plan_of(model, chosen).rows}
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert [n for n in rows if ".layers." not in n] == names
    for name in names:
        bits = {"bf16": 16, "keep": 32}.get(choice)
        stored = 288 * 128 * bits // 8 if bits else tables.packed[name].size_bytes
        assert rows[name].bytes_after == stored


def test_keep_counts_two_bytes_where_bf16_loses_nothing(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama").bfloat16().float()
    size = place_tables(model, recipe("keep")).placements["lm_head"][1].size_bytes
    artifact = compress(model, recipe("keep"), tokenizer=tiny_tokenizer)
    weight = artifact.tensors()["lm_head.weight"]
    assert size == weight.numel() * weight.element_size() == 288 * 64 * 2


@pytest.mark.parametrize(
    ("choice", "kind", "attributes", "scales"),
    [
        ("int8-row", "int_embedding", {"bits": 8, "group_size": None}, (288, 1)),
        ("int8", "int_embedding", {"bits": 8, "group_size": 32}, (288, 4)),
        ("int4", "int_embedding", {"bits": 4, "group_size": 32}, (288, 4)),
        ("int4-g64", "int_embedding", {"bits": 4, "group_size": 64}, (288, 2)),
        ("int4-g128", "int_embedding", {"bits": 4, "group_size": 128}, (288, 1)),
        ("nvfp4", "fp4_embedding", {"format": "nvfp4"}, (288, 8)),
        ("mxfp4", "fp4_embedding", {"format": "mxfp4"}, (288, 4)),
    ],
)
def test_what_a_tied_pair_stores(
    tiny: Any, choice: str, kind: str, attributes: dict[str, Any], scales: tuple[int, int]
) -> None:
    model = tiny("llama", tie_word_embeddings=True, hidden_size=128)
    tables = pack_tables(model, recipe(choice))
    table, head = tables.packed["model.embed_tokens"], tables.packed["lm_head"]
    assert table.kind == kind and attributes.items() <= table.attributes.items()
    assert head.kind == kind.replace("embedding", "linear") and head.attributes["activations"] == "none"
    assert table.tensors["weight_scale"].shape == scales
    assert all(head.tensors[name] is tensor for name, tensor in table.tensors.items())
    assert tables.tied == {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in table.tensors}
    assert ("weight_global_scale" in table.tensors) == (choice == "nvfp4")
    dense = build(table).dequantize()
    weight = model.get_input_embeddings().weight
    assert torch.equal(build(head).dequantize(), dense)
    assert (dense - weight).norm() / weight.norm() < (0.02 if "int8" in choice else 0.16)
    assert torch.equal(build(table)(IDS), dense[IDS])


def test_rows_keep_the_multiplier_of_the_model(tiny: Any) -> None:
    model = tiny("gemma3")
    table = pack_tables(model, recipe("nvfp4")).packed["model.embed_tokens"]
    original = model.get_input_embeddings()(IDS)
    assert table.attributes["multiplier"] == 8.0
    assert (build(table)(IDS) - original).norm() / original.norm() < 0.15


def test_the_node_of_a_table_with_a_multiplier_ends_behind_it(tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    artifact = compress(tiny("gemma3", num_hidden_layers=1), recipe("nvfp4"), tokenizer=tiny_tokenizer)
    folder = artifact.save(tmp_path / "out")
    graph = read_graph(folder)
    _, target, _ = compressed_nodes(graph, artifact.packed)["model.embed_tokens"]
    expose(graph, [target])
    found = torch.from_numpy(OnnxSession(folder, graph).run(IDS)[target])
    assert torch.equal(found, build(artifact.packed["model.embed_tokens"])(IDS))


def test_rows_have_the_dtype_of_the_model(tiny: Any, tiny_tokenizer: Any) -> None:
    artifact = compress(tiny("llama"), recipe("nvfp4"), tokenizer=tiny_tokenizer)
    model = artifact.model(torch.bfloat16)
    assert model.get_input_embeddings()(IDS).dtype == logits(model).dtype == torch.bfloat16


def test_a_head_with_a_bias_keeps_it(tiny: Any) -> None:
    model = tiny("phi")
    packed = pack_tables(model, recipe("nvfp4")).packed["lm_head"]
    assert torch.equal(packed.tensors["bias"], model.lm_head.bias)


def test_what_does_not_fit_is_refused_with_what_does(tiny: Any) -> None:
    model = tiny("llama", hidden_size=72, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(
        RecipeError, match=r"embedding: nvfp4 does not fit model.embed_tokens.* 72 .*; use int8-row, bf16 or"
    ):
        plan_of(model, recipe("nvfp4", "bf16", "quantize.on_misfit=pad"))
    with pytest.raises(RecipeError, match=r"^lm_head: int4 does not fit lm_head, "):
        place_tables(model, recipe("bf16", "int4"))
    half = tiny("llama", hidden_size=80, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(RecipeError, match="use int8-row, int8, int4, int4-g64, int4-g128, nvfp4, bf16 or keep"):
        place_tables(half, recipe("mxfp4"))
    # The integer formats go to the next smaller group that divides, and the plan says so.
    row = next(r for r in plan_of(half, recipe("int4-g64", None, "quantize.on_misfit=pad")).rows if r.name == "lm_head")
    assert row.action == "int4 g16" and row.note == "group 16: 64 does not divide in_features 80"
    assert row.bytes_after == pack_tables(half, recipe("int4-g64")).packed["lm_head"].size_bytes


def test_a_wrong_name_is_told_what_there_is() -> None:
    with pytest.raises(RecipeError, match="embedding is 'int4-g46'; did you mean 'int4-g64'\\? Allowed: auto, bf16,"):
        recipe("int4-g46", "bf16")


class TestImportance:
    def test_it_is_the_mean_square_of_what_the_head_reads(self, family: str, tiny: Any) -> None:
        if family == "bert":
            with pytest.raises(ModelError, match="no output head"):
                head_importance(tiny(family), IDS)
            return
        model = tiny(family)
        seen: list[Tensor] = []
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        expected = logits(model)
        handle.remove()
        found = head_importance(model, IDS)
        assert torch.allclose(found, seen[0].square().mean((0, 1)), rtol=1e-4)
        assert torch.equal(logits(model), expected), "a hook was left behind"

    def test_bad_input_is_one_sentence(self, tiny: Any) -> None:
        model = tiny("llama")
        with pytest.raises(DataError, match=r"\[S, L\]"):
            head_importance(model, IDS[0])
        with torch.no_grad():
            model.model.norm.weight[3] = float("nan")
        with pytest.raises(NumericsError, match="output head"):
            head_importance(model, IDS)

    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("tied", [True, False])
    def test_it_lowers_the_weighted_error_of_the_head_and_of_nothing_else(
        self, tiny: Any, choice: str, tied: bool
    ) -> None:
        model = tiny("llama", tie_word_embeddings=tied, hidden_size=128)
        importance = torch.logspace(-2, 2, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
        plain, weighted = (pack_tables(model, recipe(choice), h).packed for h in (None, importance))

        def error(packed: Packed) -> float:
            weight = model.lm_head.weight.detach()
            return float(((build(packed).dequantize() - weight).square() * importance).sum())

        assert error(weighted["lm_head"]) < error(plain["lm_head"])
        assert weighted["lm_head"].size_bytes == plain["lm_head"].size_bytes
        before, after = (packed["model.embed_tokens"].tensors for packed in (plain, weighted))
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) != tied

    def test_compress_measures_it(self, tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from compressor import tables

        asked: list[Any] = []
        measure = tables.head_importance
        monkeypatch.setattr(tables, "head_importance", lambda *a: asked.append(measure(*a)) or asked[-1])
        model = tiny("llama")
        artifact = compress(model, recipe("bf16", "nvfp4"), tokenizer=tiny_tokenizer)
        expected = pack_tables(model, recipe("bf16", "nvfp4"), asked[0]).packed["lm_head"]
        assert all(torch.equal(t, expected.tensors[n]) for n, t in artifact.packed["lm_head"].tensors.items())
        # Nobody has a use for it here, and an encoder has no head to ask.
        compress(model, recipe("nvfp4", "bf16"), tokenizer=tiny_tokenizer)
        compress(tiny("bert"), recipe("nvfp4"), tokenizer=tiny_tokenizer)
        assert len(asked) == 1


@pytest.fixture(
    scope="module", params=[("nvfp4", True), ("nvfp4", False), ("mxfp4", True), ("int8-row", True)], ids=str
)
def exported(
    request: Any, tiny: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Path, str, bool]:
    """(artifact, its folder with an ONNX graph, the choice, tied)."""
    choice, tied = request.param
    artifact = compress(tiny("llama", tie_word_embeddings=tied), recipe(choice), tokenizer=tiny_tokenizer)
    return artifact, artifact.save(tmp_path_factory.mktemp("out") / "folder"), choice, tied


def test_the_graph_gives_our_logits_in_stock_onnxruntime(exported: tuple[Artifact, Path, str, bool]) -> None:
    artifact, folder, _, _ = exported
    assert relative(OnnxSession(folder).prefill(IDS)[0], logits(artifact.model())) < TOLERANCE


def test_the_graph_reads_the_stored_table_where_it_lies(exported: tuple[Artifact, Path, str, bool]) -> None:
    artifact, folder, choice, tied = exported
    graph = read_graph(folder)
    onnx.checker.check_model(str(folder / "model.onnx"))
    nodes = {n.name: n for n in graph.graph.node if n.name in artifact.packed}
    head = "MatMulNBits" if choice == "int8-row" else "FP4Linear"
    table = "IntEmbedding" if choice == "int8-row" else "FP4Embedding"
    assert (nodes["model.embed_tokens"].op_type, nodes["lm_head"].op_type) == (table, head)
    assert set(compressed_nodes(graph, artifact.packed)) == set(artifact.packed)
    places = {
        t.name: tuple(e.value for e in t.external_data if e.key in ("offset", "length"))
        for t in graph.graph.initializer
    }
    for number in (1, 2) if table == "FP4Embedding" else (1,):  # codes, block scales; MatMulNBits reads spread scales
        first, second = (places[nodes[name].input[number]] for name in ("model.embed_tokens", "lm_head"))
        assert (first == second) == tied


def test_the_folder_comes_back_and_says_what_loads_it(exported: tuple[Artifact, Path, str, bool]) -> None:
    artifact, folder, _, tied = exported
    again = load(folder)
    assert again.tied == artifact.tied
    assert any(n.startswith("lm_head") for n in again.tensors()) != tied
    for name, packed in artifact.packed.items():
        assert (again.packed[name].kind, again.packed[name].attributes) == (packed.kind, packed.attributes)
    for name, tensor in artifact.tensors().items():
        assert torch.equal(again.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(logits(again.model()), logits(artifact.model()))
    assert "no: model.embed_tokens: a quantized embedding" in hf_config.loads_in(again)["transformers"]
