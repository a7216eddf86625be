"""config.json: the model's own config, how its weights are stored in the compressed-tensors dialect, and the rest.

    quantization_config   what transformers, vLLM and other readers of the dialect follow
    compressor            kind and attributes of every compressed module, from which we rebuild them

Where a module cannot be said in the dialect, `quantization_config` is one that every reader refuses with the reason:
an unknown `quant_method` would only be a warning, and the model would run on random weights. Readers of other model
classes than the one exported are left out. docs/transformers.md says what loads where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.layers import LAYERS, Packed
from compressor.model import skeleton
from compressor.parts import experts_of
from compressor.structure import Structure, as_json, from_json

if TYPE_CHECKING:
    from compressor.artifact import Artifact

SECTION = "compressor"
SECTION_FORMAT, RESHAPED = 1, 2  # the second has modules of other shapes than the config's

# What transformers_loader.py recognizes: groups that other readers refuse, that they run uncorrected, and those of a
# folder whose experts transformers 5 cannot merge, or whose inputs it does not round.
REFUSAL, CORRECTED, MERGED = "none; open this folder with compressor.load, because ", "corrected", "experts"
# transformers 5 stops at a way of running experts that it does not know, transformers 4 and vLLM look at none.
EXPERTS_KEY, EXPERTS_REFUSAL = "experts_implementation", "none; call compressor.register_transformers() first, because "
# The formats that transformers 5 decodes when it merges experts. Of NVFP4 it leaves out the global scales, in silence.
MERGEABLE = ("pack-quantized", "float-quantized", "mxfp4-pack-quantized")

E4M3, E8M0 = "torch.float8_e4m3fn", "torch.uint8"
# A runtime rounds block scales to `scale_dtype` only when it is named.
_FP4 = {
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": E8M0},
}
_ACTIVATIONS = {
    "nvfp4": _FP4["nvfp4"] | {"dynamic": "local"},  # block scales on the fly, one stored global scale
    "mxfp4": _FP4["mxfp4"] | {"dynamic": True},
    "int8": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    "int6": {"num_bits": 6, "type": "int", "strategy": "token", "dynamic": True},
    "int8_static": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},  # stored `input_scale`
    "int6_static": {"num_bits": 6, "type": "int", "strategy": "tensor", "dynamic": False},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}


def export(artifact: Artifact, folder: Path) -> list[Path]:
    """Write config.json and, for a model that has one, generation_config.json."""
    files = [_write(folder / "config.json", config_of(artifact))]
    if artifact.generation_config is not None:
        text = artifact.generation_config.to_json_string(use_diff=True)
        files.append(_write(folder / "generation_config.json", json.loads(text)))
    return files


def config_of(artifact: Artifact) -> dict[str, Any]:
    """The content of config.json."""
    plain = skeleton(artifact.config, artifact.kind)
    config = json.loads(artifact.config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "dtype", "torch_dtype", "quantization_config", EXPERTS_KEY, SECTION):
        config.pop(name, None)
    config |= _rope_for_transformers_4(config)
    config["architectures"] = config.get("architectures") or [type(plain).__name__]
    config["dtype"] = "bfloat16"
    if reason := _reason(artifact, plain):
        config["quantization_config"] = _refusal(reason)
    elif artifact.packed:
        unmergeable = _unmergeable(artifact.packed, plain)
        named = MERGED if unmergeable or _unrounded(artifact.packed, plain) else "group"
        config["quantization_config"] = _dialect(artifact.packed, plain, named)
        if unmergeable:
            config[EXPERTS_KEY] = f"{EXPERTS_REFUSAL}{unmergeable}"
    return config | {SECTION: _section(artifact)}


def loads_in(artifact: Artifact) -> dict[str, str]:
    """{"transformers": "yes", or what its user should know instead}, and of "transformers 5" where that differs."""
    plain = skeleton(artifact.config, artifact.kind)
    if reason := _reason(artifact, plain):
        return {"transformers": f"no: {reason}"}
    said = {"transformers": "yes"}
    if any("correction_down" in p.tensors for p in artifact.packed.values()):
        said["transformers"] = "without its low-rank correction, or with lora/adapter on lora/base"
    elif any(p.attributes.get("four_over_six") for p in artifact.packed.values()):
        said["transformers"] = "with activations rounded by abs-max instead of four-over-six"
    if reason := _unmergeable(artifact.packed, plain):
        said["transformers 5"] = f"no: {reason}; call compressor.register_transformers() first"
    elif _unrounded(artifact.packed, plain):
        said["transformers 5"] = "with inputs of experts that are not rounded"
    return said


def without_refusal(config: Any) -> Any:
    """The transformers config of a folder, changed in place: transformers 5 builds its model."""
    vars(config).pop(EXPERTS_KEY, None)  # transformers 4 keeps the entry as it is
    if f"_{EXPERTS_KEY}_internal" in vars(config):
        vars(config)[f"_{EXPERTS_KEY}_internal"] = None
    return config


def expressible(packed: Packed) -> str | None:
    """None, or why the compressed-tensors dialect has no words for this module."""
    if packed.kind in ("int_embedding", "fp4_embedding"):
        return "a quantized embedding is not loaded by transformers"
    if packed.kind not in ("fp4_linear", "int_linear", "fp8_linear"):
        return f"no format of the dialect stores a {packed.kind}"
    if packed.attributes.get("padding"):
        return f"its input is padded by {packed.attributes['padding']}, which the dialect cannot say"
    if block := packed.attributes.get("hadamard"):
        return f"its input is rotated in blocks of {block} (hadamard), which only our own ops compute"
    if packed.attributes.get("bits") == 1:
        return "its codes of one bit are -1 and +1, and the dialect's are -1 and 0"
    if packed.attributes.get("activations") == "int8_block":
        return "its input has an INT8 scale a block (int8_block), which only our own ops compute"
    if "input_offset" in packed.tensors:
        return "its input is shifted channel by channel (input_offset), which the dialect cannot say"
    return None


def packed_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Packed]:
    """The compressed modules of a folder, by module name.

    config   the JSON of config.json;  tensors   every stored tensor by name, aliases included
    Raises ModelError when the section is missing or damaged, or a tensor is absent.
    """
    if SECTION not in config:
        raise ModelError(f"config.json has no '{SECTION}' section, so the folder was not written by compressor.")
    section = config[SECTION]
    if not isinstance(section, dict) or section.get("format") not in (SECTION_FORMAT, RESHAPED):
        raise ModelError(
            f"config.json: the '{SECTION}' section is not of format {SECTION_FORMAT} or {RESHAPED}; use the version "
            f"that wrote it."
        )
    found = {}
    try:
        for group in section["modules"]:
            if group["kind"] not in LAYERS:
                raise ModelError(f"config.json: unknown kind '{group['kind']}'; known: {', '.join(LAYERS)}.")
            for name in group["names"]:
                own = {leaf: tensors[f"{name}.{leaf}"] for leaf in group["tensors"]}
                found[name] = Packed(group["kind"], own, dict(group["attributes"]))
    except KeyError as error:
        raise ModelError(
            f"config.json and the weight file do not belong together: {error} is missing; write the folder again."
        ) from None
    return dict(sorted(found.items()))


def structure_from(config: Mapping[str, Any]) -> Structure:
    """The modules of a folder that have other shapes than its config says, by name. config as for `packed_from`."""
    return from_json(config[SECTION].get("structure", []))


def decompressed(folder: Path, artifact: Artifact) -> Iterator[tuple[str, Tensor]]:
    """(module name, weight) as compressed-tensors' own decompressor gives them for this folder, at full precision.

    None of a model that nothing packed (pruned in bf16): its config is a plain one.
    """
    if not artifact.packed:
        return
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from compressor.exporters.safetensors_file import read

    tensors = read(folder)
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = list(QuantizationConfig.model_validate(raw).config_groups.values())
    for name, packed in artifact.packed.items():
        scheme = next(g for g in groups if name in g.targets or g.targets == ["Linear"])
        stored = {leaf: tensors[f"{name}.{leaf}"] for leaf in packed.tensors}
        if packed.kind != "fp4_linear":  # the result has the dtype of the scale, which a float32 load makes float32
            stored["weight_scale"] = stored["weight_scale"].float()
        yield name, BaseCompressor.get_value_from_registry(scheme.format).decompress(stored, scheme)["weight"]


def _reason(artifact: Artifact, plain: nn.Module) -> str | None:
    """Why stock transformers cannot load this model, or None. plain: as `skeleton` gives it."""
    from transformers.pytorch_utils import Conv1D

    stock = _stock_model(artifact)
    for name, shaped in artifact.structure.items():
        return f"{name} is a {shaped}, which the config of {type(stock).__name__} cannot say"
    for name, packed in artifact.packed.items():
        if why := expressible(packed):
            return f"{name}: {why}"
    if transposed := next((n for n, m in stock.named_modules() if isinstance(m, Conv1D)), None):
        return f"{transposed} is a Conv1D, which the dialect does not cover; it is stored as a linear"
    modules = dict(plain.named_modules())
    biased = {n.removesuffix(".bias") for n in artifact.tensors() if n.endswith(".bias")}
    if extra := next(
        (n for n in sorted(biased) if isinstance(m := modules.get(n), nn.Linear) and m.bias is None), None
    ):
        return f"{extra} has a bias, and that of {type(stock).__name__} has none"
    known = _weight_names(stock)
    if other := next((n for n in [*(f"{p}.weight" for p in artifact.packed), *artifact.kept] if not known(n)), None):
        return f"{other} is no tensor of {type(stock).__name__}, which holds it in another form"
    return None


def _unmergeable(packed: Mapping[str, Packed], plain: nn.Module) -> str | None:
    """Why stock transformers 5 cannot merge the experts of this model, or None.

    It decodes all experts of a model by one group, the first, also those that are not compressed.
    """
    names = _experts(plain) if packed else []
    schemes: dict[str, str] = {}
    for name in names:
        schemes.setdefault(json.dumps(_scheme(packed[name]) if name in packed else None), name)
    if len(schemes) > 1:
        first, second, *_ = schemes.values()
        return f"transformers 5 merges experts that all have one format, and those of {first} and {second} differ"
    if names and names[0] not in packed:
        return "transformers 5 merges experts as if they were compressed, and these are not"
    if names and (found := _scheme(packed[names[0]])["format"]) not in MERGEABLE:
        return f"transformers 5 cannot merge experts in the format {found}"
    return None


def _unrounded(packed: Mapping[str, Packed], plain: nn.Module) -> bool:
    """Whether inputs of experts are rounded, which those that transformers 5 has merged are not."""
    return any(packed[n].attributes["activations"] != "none" for n in _experts(plain) if n in packed)


def _experts(plain: nn.Module) -> list[str]:
    """The linears of all experts, in module order."""
    inside = tuple(f"{container}." for _, container, _ in experts_of(plain))
    return [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]


def _weight_names(stock: Any) -> Callable[[str], bool]:
    """Whether a checkpoint of the stock model has a tensor of this name: transformers 5 merges some when loading."""
    held = stock.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4
        return held.__contains__
    rules = get_model_conversion_mapping(stock)
    renamings = [r for r in rules if not isinstance(r, WeightConverter)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters, stock.base_model_prefix, held)[0] in held


def _stock_model(artifact: Artifact) -> nn.Module:
    """The model that transformers builds from the config, on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if artifact.kind == "encoder" else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        return auto.from_config(type(artifact.config).from_dict(artifact.config.to_dict()))


def _dialect(packed: Mapping[str, Packed], plain: nn.Module, named: str) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    experts = set(_experts(plain))
    for name in sorted(packed, key=lambda n: (n not in experts, n)):  # transformers 5 decodes experts by the first
        scheme = _scheme(packed[name])
        groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})["targets"].append(name)
    ignore = sorted(n for n, m in plain.named_modules() if n not in packed and _has_matrix(m))
    if len(groups) == 1 and len(ignore) <= len(packed):
        next(iter(groups.values()))["targets"] = ["Linear"]
    formats = {g["format"] for g in groups.values()}
    named = CORRECTED if any("correction_down" in p.tensors for p in packed.values()) else named
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"{named}_{i}": g for i, g in enumerate(groups.values())},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _has_matrix(module: nn.Module) -> bool:
    """Whether it is a linear in some version: routers are not in transformers 5."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _scheme(packed: Packed) -> dict[str, Any]:
    a = packed.attributes
    if packed.kind == "fp4_linear":
        weights, file_format = _FP4[a["format"]], f"{a['format']}-pack-quantized"
    elif packed.kind == "fp8_linear":
        weights, file_format = {"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"
    else:
        group = {"strategy": "group", "group_size": a["group_size"]} if a["group_size"] else {"strategy": "channel"}
        weights = {"num_bits": a["bits"], "type": "int", **group}
        file_format = "int-quantized" if "weight" in packed.tensors else "pack-quantized"
    rule = a["activations"]
    return {
        "weights": weights | {"symmetric": True, "dynamic": False},
        "input_activations": None if rule == "none" else _ACTIVATIONS[rule] | {"symmetric": True},
        "output_activations": None,
        "format": file_format,
    }


def _refusal(reason: str) -> dict[str, Any]:
    """A config that readers cannot follow: the group's name is looked up as a preset and ends up in their error."""
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "dense",
        "config_groups": {f"{REFUSAL}{reason}": ["Linear"]},
        "ignore": [],
    }


def _section(artifact: Artifact) -> dict[str, Any]:
    modules: dict[str, dict[str, Any]] = {}
    for name in sorted(artifact.packed):
        packed = artifact.packed[name]
        group = {"kind": packed.kind, "attributes": packed.attributes, "tensors": sorted(packed.tensors)}
        modules.setdefault(json.dumps(group, sort_keys=True), {**group, "names": []})["names"].append(name)
    section = {"format": SECTION_FORMAT, "modules": list(modules.values()), "tied": dict(sorted(artifact.tied.items()))}
    if artifact.structure:
        section |= {"format": RESHAPED, "structure": as_json(artifact.structure)}
    return section


def _rope_for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 moved rotary settings into `rope_parameters`; version 4 ignores that key and takes its defaults
    in silence, so they are written under their old names as well, which version 5 reads alike."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    main = rope.get("full_attention", rope)
    if not isinstance(main, dict) or "rope_theta" not in main:
        return {}
    theta, share = main["rope_theta"], main.get("partial_rotary_factor")
    old: dict[str, Any] = {"rope_theta": theta}
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if share is not None:
        old["partial_rotary_factor"] = share
    if config.get("model_type") == "gpt_neox":
        old |= {"rotary_emb_base": theta} | ({"rotary_pct": share} if share is not None else {})
    if main.get("rope_type", "default") != "default":
        old["rope_scaling"] = {k: v for k, v in main.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return old


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
