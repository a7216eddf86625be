"""What stock transformers with compressed-tensors makes of a folder: the same weights bit for bit, the same layers.

Whole-model logits of a tiny random model with quantized activations are noise (one flipped rounding moves everything
after it), so layers are compared one by one on equal inputs, and logits where activations are not rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import Recipe, compress, load
from compressor.artifact import Artifact
from compressor.errors import ModelError
from compressor.exporters import hf_config, safetensors_file
from compressor.layers import Packed, build

pytest.importorskip("compressed_tensors", reason="the runtime under test")

SCHEMES: dict[str, dict[str, Any]] = {
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
    "nvfp4a16": {"weights": "nvfp4"},
    "nvfp4 with fp8": {"weights": "nvfp4", "activations": "fp8"},
    "nvfp4 with int8": {"weights": "nvfp4", "activations": "int8"},
    "mxfp4": {"weights": "mxfp4", "activations": "mxfp4"},
    "mxfp4a16": {"weights": "mxfp4"},
    "int2": {"weights": "int2", "group_size": 32},
    "int3": {"weights": "int3", "group_size": 32},
    "int4": {"weights": "int4", "group_size": 32},
    "int4 rows": {"weights": "int4"},
    "int8": {"weights": "int8", "group_size": 16},
    "int8 rows": {"weights": "int8"},
    "w8a8": {"weights": "int8", "activations": "int8"},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "fp8a16": {"weights": "fp8"},
}
FORMATS = {"nv": "nvfp4-pack-quantized", "mx": "mxfp4-pack-quantized", "fp": "float-quantized", "in": "pack-quantized"}
WEIGHT_ONLY = [name for name, options in SCHEMES.items() if "activations" not in options]
IDS = torch.randint(4, 288, (2, 17), generator=torch.Generator().manual_seed(1))
# A bf16 layer against ours, relative norm of each row of the output: bf16 keeps 8 bits, so most rows are at 2 to 15e-3.
# A block scale that bf16 rounds to its neighbour moves a row by as much as quantization itself; those are few.
MEDIAN_TOLERANCE, ROW_TOLERANCE = 2e-2, 0.2
LOGIT_TOLERANCE = 3e-2

Make = Callable[..., tuple[Artifact, Path]]


@pytest.fixture(scope="module")
def folder_of(tiny: Any, tiny_tokenizer: Any, prose: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """folder_of(*steps, family=…, recipe keys) -> the artifact and the folder that its export wrote, once for each."""
    text = tmp_path_factory.mktemp("text") / "prose.txt"
    text.write_text(prose)
    made: dict[str, tuple[Artifact, Path]] = {}

    def run(*steps: dict[str, Any], family: str = "llama", config: dict[str, Any] | None = None, **recipe: Any) -> Any:
        key = repr((steps, family, config, recipe))
        if key not in made:
            settings = {
                "calibration": {"windows": 2, "length": 32, "data": str(text)},
                "exports": ["safetensors"],
                **recipe,
            }
            full = Recipe.from_dict({**settings, "steps": [{"quantize": step} for step in steps]})
            artifact = compress(tiny(family, **(config or {})), full, tokenizer=tiny_tokenizer)
            made[key] = artifact, artifact.save(tmp_path_factory.mktemp("out") / "folder")
        return made[key]

    return run


def stock(folder: Path, kind: str = "causal-lm", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The folder in transformers, every tensor accounted for, decompressed by a first forward."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if kind == "encoder" else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[k] for k in ("unexpected_keys", "mismatched_keys")), info
    assert not {k for k in info["missing_keys"] if "pooler" not in k}
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=IDS)
    return (output.logits if "logits" in output else output.last_hidden_state).float()


def assert_same_weights(model: nn.Module, artifact: Artifact) -> None:
    for name, packed in artifact.packed.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, build(packed).dequantize().to(weight.dtype)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_load_has_our_weights_and_our_layers(folder_of: Make, scheme: str) -> None:
    artifact, folder = folder_of(SCHEMES[scheme])
    model = stock(folder)
    assert_same_weights(model, artifact)
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 9).view(1, -1, 1)
    x[0, 0] = 0
    x[1, 3, :32] = 0
    for name, packed in artifact.packed.items():
        value = x[..., : packed.attributes["in_features"]].bfloat16()
        with torch.no_grad():
            found = model.get_submodule(name)(value)
            expected = build(packed)(value)
        rows = sorted(
            relative(a, b) for a, b in zip(found.flatten(0, 1), expected.flatten(0, 1), strict=True) if b.any()
        )
        assert len(rows) == 17 and rows[8] < MEDIAN_TOLERANCE and rows[-1] < ROW_TOLERANCE, name
    if scheme in WEIGHT_ONLY:
        found, expected = logits(model), logits(artifact.model(dense=True))
        assert (found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_decompressor_of_the_library_gives_our_weights_in_full_precision(folder_of: Make, scheme: str) -> None:
    artifact, folder = folder_of(SCHEMES[scheme])
    found = dict(hf_config.decompressed(folder, artifact))
    assert set(found) == set(artifact.packed)
    for name, packed in artifact.packed.items():
        assert torch.equal(found[name].float(), build(packed).dequantize()), name


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name[:2] in ("in", "w8", "fp")])
def test_integer_and_fp8_folders_load_in_float32(folder_of: Make, plain_torch: None, scheme: str) -> None:
    artifact, folder = folder_of(SCHEMES[scheme])
    assert relative(logits(stock(folder, dtype=torch.float32)), logits(artifact.model())) < 1e-5


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_fp4_folders_reach_float32_through_bf16(folder_of: Make, scheme: str) -> None:
    """The way docs/transformers.md gives: the bf16 values are exact, so casting them up loses nothing."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    artifact, folder = folder_of(SCHEMES[scheme])
    config = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).eval()
    model = nn.Module.float(model)
    for name, packed in artifact.packed.items():
        x = torch.randn(1, 9, packed.attributes["in_features"], generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert relative(model.get_submodule(name)(x), build(packed)(x)) < 1e-6, name


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("other", ["llama", "opt", "gemma"])
def test_static_integer_inputs_load_and_compute_our_layers(
    tiny: Any, tiny_tokenizer: Any, prose: str, tmp_path: Path, other: str, bits: int
) -> None:
    """Stored `input_scale`, folded norms and six-bit codes; codes at both ends of the range and beyond."""
    (tmp_path / "prose.txt").write_text(prose)
    settings = {"calibration": {"windows": 4, "length": 32, "data": str(tmp_path / "prose.txt")}}
    step = {"outlier_tune": {"bits": bits, "static_within": 1000.0, "static_down": True}}
    recipe = Recipe.from_dict({**settings, "exports": ["safetensors"], "runtime": "transformers", "steps": [step]})
    artifact = compress(tiny(other), recipe, tokenizer=tiny_tokenizer)
    rule = f"int{bits}_static"
    assert {p.attributes["activations"] for p in artifact.packed.values()} >= {rule}
    assert hf_config.loads_in(artifact) == {"transformers": "yes"}
    folder = artifact.save(tmp_path / "folder")
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert raw["format"] == "int-quantized"
    sides = [g["input_activations"] for g in raw["config_groups"].values()]
    assert {"num_bits": bits, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True} in sides
    model = stock(folder, dtype=torch.float32)
    for name, packed in artifact.packed.items():
        ours, theirs = build(packed), model.get_submodule(name)
        assert torch.equal(theirs.weight, ours.dequantize())
        x = torch.randn(2, 9, packed.attributes["in_features"], generator=torch.Generator().manual_seed(2))
        if packed.attributes["activations"] == rule:
            x *= packed.tensors["input_scale"] * 2 ** (bits - 1)
            assert (ours.quantize_input(x) - x).abs().max() > packed.tensors["input_scale"] * 2  # clipped somewhere
        with torch.no_grad():
            assert relative(theirs(x), ours(x)) < 1e-6, name
    assert relative(logits(model), logits(artifact.model())) < 1e-2
    assert_same_weights(stock(folder), artifact)  # and in bf16


@pytest.mark.parametrize("other", ["qwen2", "gemma3", "phi", "opt", "gpt_neox", "bert"])
def test_other_families_load(folder_of: Make, other: str) -> None:
    """Biases, tied tables, other names of blocks, encoders."""
    artifact, folder = folder_of(SCHEMES["int4"], family=other)
    model = stock(folder, artifact.kind)
    assert_same_weights(model, artifact)
    found, expected = logits(model), logits(artifact.model())
    assert (found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


def test_tied_tables_are_stored_once(folder_of: Make) -> None:
    artifact, folder = folder_of(SCHEMES["nvfp4a16"], config={"tie_word_embeddings": True})
    assert "lm_head.weight" not in safetensors_file.header(folder / safetensors_file.FILE)
    model = stock(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_weights(model, artifact)


def test_several_formats_in_one_folder(folder_of: Make) -> None:
    steps = (
        {"weights": "nvfp4", "activations": "nvfp4", "targets": ["*.q_proj", "*.k_proj", "*.v_proj"]},
        {"weights": "int8", "activations": "int8", "targets": ["*.down_proj"]},
        {"weights": "int4", "group_size": 32, "targets": ["*.gate_proj", "*.up_proj"]},
    )
    artifact, folder = folder_of(*steps, lm_head="int8")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert {t for g in config["config_groups"].values() for t in g["targets"]} == set(artifact.packed)
    assert "lm_head" in artifact.packed
    assert_same_weights(stock(folder), artifact)


@pytest.mark.parametrize("choice", ["int8-row", "int4-g64", "nvfp4", "mxfp4"])
def test_an_untied_head_loads_in_every_format(folder_of: Make, choice: str) -> None:
    artifact, folder = folder_of(SCHEMES["nvfp4a16"], lm_head=choice)
    assert hf_config.loads_in(artifact) == {"transformers": "yes"}
    model = stock(folder)
    assert_same_weights(model, artifact)
    found, expected = logits(model), logits(artifact.model(dense=True))
    assert (found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


def test_golden_quantization_config(folder_of: Make) -> None:
    _, folder = folder_of(SCHEMES["nvfp4"])
    config = json.loads((folder / "config.json").read_text())
    block = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
        "symmetric": True,
    }
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": block | {"dynamic": False},
                "input_activations": block | {"dynamic": "local"},
                "output_activations": None,
                "format": "nvfp4-pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_configs_are_those_of_the_librarys_presets(folder_of: Make, scheme: str) -> None:
    """Parsed by the library, each scheme equals its preset wherever there is one of that name."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    presets = {
        "nvfp4": "NVFP4",
        "nvfp4a16": "NVFP4A16",
        "mxfp4": "MXFP4",
        "mxfp4a16": "MXFP4A16",
        "w8a8": "W8A8",
        "fp8": "FP8_DYNAMIC",
    }
    _, folder = folder_of(SCHEMES[scheme])
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(raw).config_groups["group_0"]
    assert raw["format"] == ("int-quantized" if scheme == "w8a8" else FORMATS[scheme[:2]])
    if scheme in presets:
        preset = preset_name_to_scheme(presets[scheme], ["Linear"])
        keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype")
        for side in ("weights", "input_activations"):
            ours, theirs = getattr(found, side), getattr(preset, side)
            assert (ours is None) == (theirs is None)
            assert ours is None or all(getattr(ours, key) == getattr(theirs, key) for key in keys)


@pytest.mark.parametrize(
    ("other", "step", "recipe", "reason"),
    [
        ("llama", SCHEMES["int4"], {"embedding": "int8"}, "model.embed_tokens: a quantized embedding"),
        ("llama", SCHEMES["nvfp4a16"], {"embedding": "nvfp4"}, "model.embed_tokens: a quantized embedding"),
        ("llama", {"weights": "int4", "group_size": 64, "on_misfit": "pad"}, {}, "input is padded by 32"),
        ("gpt2", SCHEMES["int4"], {}, "is a Conv1D"),
        ("gpt2", {"weights": "int4", "group_size": 128, "on_misfit": "keep"}, {}, "is a Conv1D"),  # nothing compressed
    ],
)
def test_what_the_dialect_cannot_say_is_refused_and_not_run_on_random_weights(
    folder_of: Make, other: str, step: dict[str, Any], recipe: dict[str, Any], reason: str
) -> None:
    artifact, folder = folder_of(step, family=other, **recipe)
    with pytest.raises(Exception, match="(?i)compressor.load.*" + reason):
        stock(folder)
    assert reason in hf_config.loads_in(artifact)["transformers"]
    assert torch.equal(logits(load(folder).model()), logits(artifact.model()))


def test_loads_in_names_the_activation_rule_that_transformers_lacks(folder_of: Make) -> None:
    artifact, folder = folder_of({**SCHEMES["nvfp4"], "four_over_six": True}, runtime="compressor")
    assert "abs-max" in hf_config.loads_in(artifact)["transformers"]
    assert_same_weights(stock(folder), artifact)


@pytest.mark.parametrize("scheme", ["nvfp4", "int4", "w8a8", "fp8"])
def test_packed_modules_come_back_from_the_folder(folder_of: Make, scheme: str) -> None:
    artifact, folder = folder_of(SCHEMES[scheme], lm_head="int4")
    raw = json.loads((folder / "config.json").read_text())
    found = hf_config.packed_from(raw, safetensors_file.read(folder))
    assert list(found) == sorted(artifact.packed)
    for name, packed in artifact.packed.items():
        assert (found[name].kind, found[name].attributes) == (packed.kind, packed.attributes)
        assert set(found[name].tensors) == set(packed.tensors)
        assert all(torch.equal(found[name].tensors[leaf].float(), t.float()) for leaf, t in packed.tensors.items())


def test_a_config_that_does_not_fit_the_weights_is_one_sentence(folder_of: Make) -> None:
    _, folder = folder_of(SCHEMES["int4"])
    raw, tensors = json.loads((folder / "config.json").read_text()), safetensors_file.read(folder)
    tensors.pop("model.layers.0.mlp.up_proj.weight_scale")
    with pytest.raises(ModelError, match=r"0\.mlp\.up_proj\.weight_scale' is missing"):
        hf_config.packed_from(raw, tensors)
    with pytest.raises(ModelError, match="no 'compressor' section"):
        hf_config.packed_from({"quantization_config": {}}, tensors)
    with pytest.raises(ModelError, match="not of format"):
        hf_config.packed_from({**raw, "compressor": {"format": 99}}, tensors)
    raw["compressor"]["modules"][0]["kind"] = "magic"
    with pytest.raises(ModelError, match="unknown kind 'magic'"):
        hf_config.packed_from(raw, tensors)


def test_expressible_gives_reasons() -> None:
    assert hf_config.expressible(Packed("fp8_linear", {}, {"padding": 0})) is None
    assert "padded by 8" in str(hf_config.expressible(Packed("fp8_linear", {}, {"padding": 8})))
    assert "input_offset" in str(hf_config.expressible(Packed("int_linear", {"input_offset": torch.zeros(4)}, {})))
    for kind in ("int_embedding", "fp4_embedding"):
        assert hf_config.expressible(Packed(kind, {}, {})) == "a quantized embedding is not loaded by transformers"


ROPE = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("llama", ROPE, {"rope_theta": 5e5}),
        ("llama", {**LLAMA3, "rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": LLAMA3}),
        ("phi", {**ROPE, "partial_rotary_factor": 0.5}, {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
        (
            "gemma3_text",
            {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_theta": 5e5, "rope_local_base_freq": 1e4},
        ),
        (
            "gpt_neox",
            {**ROPE, "partial_rotary_factor": 0.25},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "rotary_emb_base": 5e5, "rotary_pct": 0.25},
        ),
    ],
)
def test_rotary_settings_of_transformers_5_are_written_for_4_too(
    tmp_path: Path, model_type: str, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    raw = {"model_type": model_type, "max_position_embeddings": 128, "rope_parameters": rope}
    added = hf_config._rope_for_transformers_4(raw)
    assert added == expected
    (tmp_path / "config.json").write_text(json.dumps(raw | added))
    found = AutoConfig.from_pretrained(tmp_path).to_dict()
    if found.get("rope_theta") is None or "rope_theta" in (found.get("rope_parameters") or {}):
        main = found["rope_parameters"].get("full_attention", found["rope_parameters"])
        assert main["rope_theta"] == expected["rope_theta"]
    else:
        assert {k: found[k] for k in expected} == expected
