"""Loading a model: a folder, hub id, GGUF file or demo becomes an fp32 transformers model, or one clear sentence.

Where files come from and whether they are whole is source.py, tokenizers are tokenizer.py, the names of a model's
parts are parts.py and can be imported from here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import ModelError, NumericsError
from compressor.experts import unfuse
from compressor.parts import blocks, embedding_name, exempt, head_name, is_tied, linears, unaccounted, untie
from compressor.source import Place, check, find
from compressor.tokenizer import load_tokenizer, tokenizer_at

__all__ = [
    "Loaded", "as_loaded", "blocks", "embedding_name", "exempt", "head_name", "is_tied", "linears", "load_model",
    "load_tokenizer", "skeleton", "twin", "unaccounted", "untie",
]  # fmt: skip

CAUSAL, ENCODER = "causal-lm", "encoder"


@dataclass(frozen=True)
class Loaded:
    """An original model: fp32, eval mode, GPT-2's Conv1D turned into nn.Linear of the same name."""

    model: nn.Module
    tokenizer: Any | None
    source: str
    kind: str  # "causal-lm" | "encoder"


def load_model(source: str | Path | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Load a folder, hub id, .gguf file or demo name; None is the first demo. A folder may lack a tokenizer.

    Raises ModelError for what is not a complete, uncompressed model, NumericsError for NaN or Inf in a weight.
    """
    name, place = find(source)
    check(place)
    with _quiet():
        model, kind = _read(name, place)
        tokenizer = tokenizer_at(name, place) if place.has_tokenizer else None
    linearize(model)
    _require_finite(model)
    return Loaded(model.to(device).eval(), tokenizer, name, kind)


def as_loaded(model: nn.Module, tokenizer: Any | None = None) -> Loaded:
    """A model that is in memory already. It stays as it is: what comes back is a copy that shares its fp32 weights.

    Raises ModelError when it is not a causal language model or bare encoder of transformers, NumericsError as above.
    """
    kind = _kind_of(model)
    _require_finite(model)
    # An fp32 copy of another dtype needs memory of its own: .float() works in place.
    shared = all(t.dtype == torch.float32 or not t.is_floating_point() for t in model.parameters())
    # nn.Module's own: transformers' refuses models that were loaded from a quantized file, such as GGUF.
    copied = nn.Module.float(twin(model) if shared else copy.deepcopy(model)).eval()
    linearize(copied)
    source = getattr(model, "name_or_path", "") or type(model).__name__
    return Loaded(copied, tokenizer, source, kind)


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor: replacing a parameter or a module leaves the original alone."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def skeleton(config: Any, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a config with parameters on the meta device and computed buffers in place; Conv1D as in `Loaded`."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _auto_class(kind).from_config(config, dtype=dtype)
        _drop_pooler(model)
        linearize(model)
    return model.eval()


def _read(name: str, place: Place) -> tuple[nn.Module, str]:
    from transformers import AutoConfig

    where, options = place.arguments()
    try:
        config = AutoConfig.from_pretrained(where, **options)
        kind = _kind(config)
        model, info = _auto_class(kind).from_pretrained(
            where, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    except Exception as error:  # for bad input transformers raises nearly every built-in exception
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"{name}: transformers cannot load this model ({' '.join(lines[:2])[:300]}).") from None
    missing = set(info["missing_keys"])
    if missing and all(".pooler." in f".{key}" for key in missing):
        model.config.add_pooling_layer = False  # trained without one; transformers would make one up
        _drop_pooler(model)
        missing = set()
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights are not in the file, such as {min(missing)}; the file is incomplete or "
            f"belongs to another config.json; download it again."
        )
    if info["mismatched_keys"] or info.get("error_msgs"):
        first = next(iter([*info["mismatched_keys"], *info.get("error_msgs", [])]))
        raise ModelError(f"{name}: weights do not fit config.json ({first}); both must come from the same model.")
    if not model.config.architectures:  # a GGUF file names none, and readers of what we write need it
        model.config.architectures = [type(model).__name__]
    return model, kind


def _kind(config: Any) -> str:
    """From the architecture that the config names, else from what its model type is known for. Raises ModelError."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not config.architectures:
        return CAUSAL if config.model_type in causal and config.model_type not in masked else ENCODER

    def among(*tables: dict[str, Any]) -> bool:
        known = (names for table in tables for names in table.values())
        return any(config.architectures[0] in ([n] if isinstance(n, str) else n) for n in known)

    if among(causal):
        return CAUSAL
    if among(auto.MODEL_MAPPING_NAMES, masked, auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES):  # without the training head
        return ENCODER
    raise ModelError(_unsupported(config.architectures[0]))


def _kind_of(model: nn.Module) -> str:
    """Of a model in memory, whose class must be the one that its config is rebuilt as. Raises ModelError."""
    from transformers import AutoModel, AutoModelForCausalLM

    config: Any = type(getattr(model, "config", None))
    for kind, auto in ((CAUSAL, AutoModelForCausalLM), (ENCODER, AutoModel)):
        classes: Any = auto._model_mapping.get(config, ())
        if isinstance(model, classes):
            return kind
    raise ModelError(_unsupported(type(model).__name__))


def _unsupported(architecture: str) -> str:
    return (
        f"{architecture} is not supported; give a causal language model (…ForCausalLM) or a bare encoder (…Model) of "
        f"transformers."
    )


def _auto_class(kind: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if kind == CAUSAL else AutoModel


def _drop_pooler(model: Any) -> None:
    if getattr(model.config, "add_pooling_layer", True) is False and hasattr(model, "pooler"):
        model.pooler = None


def linearize(model: nn.Module) -> None:
    """Replace transformers' Conv1D (weight [K, N]) by nn.Linear (weight [N, K]) under the same name, and experts that
    are one parameter by linears. Raises ModelError for experts that are not gated ones."""
    from transformers.pytorch_utils import Conv1D

    unfuse(model)

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(1, 1, device="meta")
            linear.in_features, linear.out_features = module.weight.shape
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), module.weight.requires_grad)
            linear.bias = module.bias
            model.set_submodule(name, linear)


def _require_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        # The sum is one pass and catches NaN and Inf; the exact test only settles an overflow of the sum itself.
        if not p.is_meta and not p.detach().sum().isfinite() and not (finite := p.detach().isfinite()).all():
            bad = finite.numel() - int(finite.sum())
            raise NumericsError(f"{name}: {bad} of {finite.numel()} weights are NaN or Inf; the model file is damaged.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' progress bars and hints: what matters is raised, and only the command line prints."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loading
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bar = getattr(gguf_loading, "tqdm", None)  # the one bar that has no switch
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_loading.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        gguf_loading.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
