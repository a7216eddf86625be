"""The straight line through the Python door: what is compressed, kept, shared, refused."""

import pytest
import torch

from compressor import Recipe, compress, load
from compressor.errors import DataError, NumericsError, RecipeError
from compressor.kernels import activations as act
from compressor.layers import QuantLinear
from compressor.model import as_loaded, blocks, exempt, linears
from compressor.plan import plan_of


def recipe(name="w4a4", *overrides):
    return Recipe.load(name, ["calibration.windows=3", "calibration.length=24", *overrides])


def logits(model, ids):
    with torch.inference_mode():
        output = model(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


IDS = torch.arange(4, 40)[None]


def test_every_family_is_compressed_whole(family, tiny, tiny_tokenizer, text):
    model = tiny(family)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    artifact = compress(model, recipe("nvfp4a16"), tokenizer=tiny_tokenizer, data=text)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "the original was changed"
    rebuilt = artifact.model()
    inside = [m for name, _ in blocks(as_loaded(model).model) for m in rebuilt.get_submodule(name).modules()]
    kept = sum(isinstance(m, torch.nn.Linear) for m in inside)
    routers = [n for n, rule in exempt(as_loaded(model).model).items() if rule == "router"]
    assert kept == sum(isinstance(rebuilt.get_submodule(n.removesuffix(".weight")), torch.nn.Linear) for n in routers)
    assert bool(routers) == (family == "mixtral")
    assert sum(isinstance(m, QuantLinear) for m in inside) == len(artifact.packed) > 0
    ours, original = logits(rebuilt, IDS), logits(model, IDS)
    error = (ours - original).norm() / original.norm()
    assert 0.001 < error < 0.35, f"4-bit weights should be near the original, not equal to it: {error}"


def test_dense_and_packed_models_agree_bit_for_bit(tiny, tiny_tokenizer, text, plain_torch):
    artifact = compress(tiny("llama"), recipe("w4a4"), tokenizer=tiny_tokenizer, data=text)
    assert torch.equal(logits(artifact.model(), IDS), logits(artifact.model(dense=True), IDS))


def test_sites_share_their_global_scales(tiny, tiny_tokenizer, text):
    packed = compress(tiny("llama"), recipe("w4a4-rtn"), tokenizer=tiny_tokenizer, data=text).packed
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for scale in ("weight_global_scale", "input_global_scale"):
            values = {
                packed[n].tensors[scale].item() for n in packed if n.startswith("model.layers.0") and n.endswith(group)
            }
            assert len(values) == 1, (group, scale)


def test_everything_that_is_kept_has_a_name_and_a_reason(tiny, tiny_tokenizer, text):
    artifact = compress(
        tiny("llama", tie_word_embeddings=True),
        recipe("w4a16", "quantize.ignore=['*.down_proj']"),
        tokenizer=tiny_tokenizer,
        data=text,
    )
    assert artifact.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert artifact.kept["model.embed_tokens.weight"].dtype == torch.bfloat16
    reasons = artifact.record["kept"]
    assert reasons["model.layers.1.mlp.down_proj"] == "step 1 (quantize): ignore"
    assert reasons["model.embed_tokens"] == "recipe: bf16"
    stored = set(artifact.tensors())
    assert "lm_head.weight" not in stored and "model.layers.1.mlp.down_proj.weight" in stored


@pytest.mark.parametrize("choice", ["int8", "int8-row", "int4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("tied", [True, False])
def test_tables_can_be_quantized(tiny, tiny_tokenizer, text, choice, tied):
    model = tiny("llama", tie_word_embeddings=tied)
    chosen = recipe("nvfp4a16", f"embedding={choice}", f"lm_head={choice}")
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=text)
    assert {"model.embed_tokens", "lm_head"} <= set(artifact.packed)
    names = [n for n in artifact.tensors() if n.startswith("lm_head")]
    assert bool(names) != tied
    rebuilt = artifact.model()
    table = model.get_input_embeddings().weight
    error = (rebuilt.get_input_embeddings()(torch.arange(9)) - table[:9]).norm() / table[:9].norm()
    assert error < (0.01 if choice.startswith("int8") else 0.15)
    assert logits(rebuilt, IDS).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_can_round_its_input(tiny, tiny_tokenizer, text, tmp_path, tied):
    model = tiny("llama", tie_word_embeddings=tied)
    tables = ["embedding=nvfp4", "lm_head=nvfp4"]
    plain, rounding = (
        compress(model, recipe("nvfp4a16", *tables, *more, "runtime=compressor"), tokenizer=tiny_tokenizer, data=text)
        for more in ([], ["head_activations=int8_block"])
    )
    rounding.save(tmp_path / "folder")
    loaded = load(tmp_path / "folder").model()
    assert loaded.lm_head.attributes["activations"] == "int8_block"
    hidden = torch.randn(3, model.config.hidden_size)
    rounded = act.int8_blocks(hidden, 16)
    expected = rounded @ plain.model().lm_head.dequantize().T
    assert torch.allclose(loaded.lm_head(hidden), expected, atol=1e-5)
    assert not torch.allclose(plain.model().lm_head(hidden), expected, atol=1e-5)
    assert torch.equal(loaded.get_input_embeddings()(IDS), plain.model().get_input_embeddings()(IDS))


def test_only_a_head_in_fp4_rounds_its_input():
    with pytest.raises(
        RecipeError, match=r"'int8_block' go with lm_head nvfp4 or mxfp4, and it is 'int8-row'; change one"
    ):
        recipe("nvfp4a16", "lm_head=int8-row", "embedding=int8-row", "head_activations=int8_block")


def test_a_tied_pair_takes_one_format(tiny, tiny_tokenizer, text):
    with pytest.raises(RecipeError, match="one tied table"):
        compress(
            tiny("llama", tie_word_embeddings=True),
            recipe("w4a16", "embedding=int8"),
            tokenizer=tiny_tokenizer,
            data=text,
        )


def test_the_plan_is_what_happens(tiny, tiny_tokenizer, text):
    model, chosen = tiny("llama"), recipe("w4a16")
    plan = {row.name: row for row in plan_of(model, chosen).rows}
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, data=text)
    assert set(plan) == set(linears(model)) | {"model.embed_tokens", "lm_head"}
    for name, packed in artifact.packed.items():
        stored = sum(t.numel() * t.element_size() for n, t in packed.tensors.items() if n != "weight_shape")
        assert plan[name].bytes_after == stored, name
    assert (
        "g64" in plan["model.layers.0.self_attn.q_proj"].action
        and "128 does not divide" in plan["model.layers.0.self_attn.q_proj"].note
    )


def test_padding_runs_and_is_close(tiny, tiny_tokenizer, text):
    model = tiny("llama", intermediate_size=88)
    artifact = compress(model, recipe("nvfp4a16", "quantize.on_misfit=pad"), tokenizer=tiny_tokenizer, data=text)
    assert artifact.packed["model.layers.0.mlp.down_proj"].attributes["padding"] == 8
    assert (logits(artifact.model(), IDS) - logits(model, IDS)).norm() / logits(model, IDS).norm() < 0.35
    with pytest.raises(RecipeError, match="on_misfit: pad or"):
        compress(model, recipe("nvfp4a16", "quantize.on_misfit=smaller"), tokenizer=tiny_tokenizer, data=text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["quantize.targets=['*.nope']"], "matches no linear"), (["quantize.four_over_six=true"], "runtime: compressor")],
)
def test_recipes_that_do_not_fit_are_refused(tiny, tiny_tokenizer, text, overrides, message):
    with pytest.raises(RecipeError, match=message):
        compress(tiny("llama"), recipe("w4a4", *overrides), tokenizer=tiny_tokenizer, data=text)


def test_damaged_weights_and_missing_text_are_refused(tiny, tiny_tokenizer, tmp_path):
    model = tiny("llama")
    with pytest.raises(DataError, match="tokenizer"):
        compress(model, recipe())
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match="24"):
        compress(model, recipe(), tokenizer=tiny_tokenizer, data=short)
    with pytest.raises(DataError, match="missing"):  # found before the long work
        compress(model, recipe(), tokenizer=tiny_tokenizer, quality_text="missing.txt")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="up_proj"):
        compress(model, recipe(), tokenizer=tiny_tokenizer)


def test_quality_is_measured_on_text_that_calibration_did_not_see(tiny, tiny_tokenizer, text):
    artifact = compress(tiny("llama"), recipe("nvfp4a16"), tokenizer=tiny_tokenizer, data=text)
    quality = artifact.record["quality"]
    assert (
        quality["tokens"] == 16 * 23
        and quality["kl"] > 0
        and quality["ppl_low"] <= quality["ppl"] <= quality["ppl_high"]
    )
    assert (
        "quality"
        not in compress(tiny("llama"), recipe("nvfp4a16"), tokenizer=tiny_tokenizer, data=text, measure=False).record
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["w4a4", "w4a16", "w8a8", "fp8", "mxfp4"])
def test_a_model_on_the_gpu_gives_the_same_artifact(tiny, tiny_tokenizer, text, name):
    chosen = recipe(name, "calibration.dtype=float32", "embedding=int8", "lm_head=int8")
    cpu = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text, measure=False)
    gpu = compress(tiny("llama").cuda(), chosen, tokenizer=tiny_tokenizer, data=text)
    equal = [torch.equal(t.view(torch.uint8), gpu.tensors()[n].view(torch.uint8)) for n, t in cpu.tensors().items()]
    assert sum(equal) >= 0.95 * len(equal)  # sums in another order may move a scale that lies on a threshold
    with torch.inference_mode():
        assert gpu.model(device="cuda")(IDS.cuda()).logits.isfinite().all()
