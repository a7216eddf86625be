"""Folders that stock transformers has no words for, in `AutoModel….from_pretrained`, where a process asks for it.

    compressor.register_transformers()
    model = AutoModelForCausalLM.from_pretrained("out", dtype=torch.bfloat16)

Such a folder names a compressed-tensors scheme that does not exist, so that every other reader refuses it instead of
running on random weights, or its groups say that layers are corrected, which other readers leave out, or that they hold
experts which transformers 5 merges wrongly or not at all (exporters/hf_config.py). Registered, that is what we
recognize: a quantizer of ours builds the model as `compressor.load` does. Folders that stock transformers can load go
the way they always do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

METHOD = "compressor"


def register_transformers() -> None:
    """Let transformers, 4 or 5, load every folder of ours in this process."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        _register(auto)


def _register(auto: Any) -> None:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from compressor.exporters.hf_config import CORRECTED, MERGED, REFUSAL, without_refusal

    stock = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]

    @auto.register_quantization_config(METHOD)
    class Config(QuantizationConfigMixin):
        def __init__(self) -> None:
            self.quant_method: Any = METHOD

    class Recognizing(stock):  # type: ignore[misc,valid-type]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
            marks = REFUSAL, CORRECTED, MERGED
            ours = any(name.startswith(marks) for name in config_dict.get("config_groups") or ())
            return Config() if ours else stock.from_dict(config_dict, **options)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = Recognizing

    @auto.register_quantizer(METHOD)
    class Quantizer(HfQuantizer):
        """Gives the model the modules of the folder, weights and all, when loading is over.

        Until then it has none, so that no version casts, ties or initializes a tensor of ours.
        """

        requires_calibration = True  # nothing is quantized here: the folder is

        def update_tp_plan(self, config: Any) -> Any:
            return without_refusal(config)  # the one call with the config from which the model is built

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            self.dtype, self.tied = model.dtype, model.config.tie_word_embeddings
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}  # what transformers 5 asks instead
            for name, _ in list(model.named_children()):
                setattr(model, name, nn.Module())
            self.ignored = model._keys_to_ignore_on_load_unexpected
            everything = {".*"} if isinstance(self.ignored, set) else [".*"]  # transformers 5 has a set, 4 a list
            model._keys_to_ignore_on_load_unexpected = everything

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            for name, part in _built(model.config.name_or_path, self.dtype).named_children():
                setattr(model, name, part)
            packed_table = not isinstance(model.get_input_embeddings(), nn.Embedding)  # it has no weight to share
            model.config.tie_word_embeddings = self.tied and not packed_table
            model._keys_to_ignore_on_load_unexpected = self.ignored

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return False

        def is_serializable(self, safe_serialization: Any = None) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False


def _built(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a folder or hub id of ours."""
    from huggingface_hub import snapshot_download

    from compressor.folder import load

    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
    return load(folder).model(dtype)
