"""Folders that stock transformers has no words for, in `AutoModel….from_pretrained`, where a process asks for it.

    compressor.register_transformers()
    model = AutoModelForCausalLM.from_pretrained("out", dtype=torch.bfloat16)

Such a folder names a compressed-tensors scheme that does not exist, so that every other reader refuses it instead of
running on random weights (exporters/hf_config.py). Registered, that refusal is what we recognize: a quantizer of ours
builds the model as `compressor.load` does. Folders that stock transformers can load go the way they always do.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from compressor.errors import ModelError

METHOD = "compressor"


def register_transformers() -> None:
    """Let transformers 4 load every folder of ours in this process. Raises ModelError under another version."""
    from transformers.quantizers import auto

    if not (version := metadata.version("transformers")).startswith("4."):
        raise ModelError(f"transformers {version} has other hooks for loading than 4; use compressor.load(…).model().")
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        _register(auto)


def _register(auto: Any) -> None:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from compressor.exporters.hf_config import REFUSAL

    stock = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]

    @auto.register_quantization_config(METHOD)
    class Config(QuantizationConfigMixin):
        def __init__(self) -> None:
            self.quant_method: Any = METHOD

    class Recognizing(stock):  # type: ignore[misc,valid-type]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
            ours = any(name.startswith(REFUSAL) for name in config_dict.get("config_groups") or ())
            return Config() if ours else stock.from_dict(config_dict, **options)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = Recognizing

    @auto.register_quantizer(METHOD)
    class Quantizer(HfQuantizer):
        """Puts the modules of the folder, weights and all, in the places of the empty ones."""

        requires_calibration = True  # nothing is quantized here: the folder is

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            built = _built(model)
            for name, child in built.named_children():
                setattr(model, name, child)
            if not isinstance(model.get_input_embeddings(), nn.Embedding):
                model.config.tie_word_embeddings = False  # a packed table has no weight to share

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            """Nothing is left to do."""

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return True  # every tensor is in place already

        def create_quantized_param(self, *_: Any, **__: Any) -> None:
            """The file's tensors are those that `_built` read."""

        def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
            return []  # an alias is in the model and not in the file

        def update_unexpected_keys(self, model: Any, unexpected_keys: list[str]) -> list[str]:
            return []

        def is_serializable(self, safe_serialization: Any = None) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False


def _built(model: Any) -> nn.Module:
    """The model of the folder or hub id that `model`'s config came from, in the dtype of `model`."""
    from huggingface_hub import snapshot_download

    from compressor.folder import load

    name = model.config.name_or_path
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
    return load(folder).model(model.dtype)
