"""Loading a model and naming its parts: all that the program knows about architectures.

No table of families. The repeated blocks are the outermost ModuleList of modules that hold linears; everything else
is found by what a module is. Reading files and their damage is source.py, tokenizers are tokenizer.py.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, NumericsError
from compressor.source import Place, check, find
from compressor.tokenizer import load_tokenizer, tokenizer_at

__all__ = [
    "Loaded", "as_loaded", "blocks", "embedding_name", "exempt", "head_name", "is_tied", "linears", "load_model",
    "load_tokenizer", "skeleton", "unaccounted",
]  # fmt: skip

CAUSAL, ENCODER = "causal-lm", "encoder"
# A weight that nobody compresses is worth an error from this size on: a share of 1e-5 keeps what can hide in a deep
# model below a percent, and nothing under 4096 weights matters in a small one.
LARGE_ELEMENTS, LARGE_SHARE = 4096, 1e-5
# Linears outside the blocks (a pooler, an embedding projection) are kept as long as together they are this small a share.
OUTSIDE_SHARE = 0.10


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
    _linearize(model)
    _require_finite(model)
    return Loaded(model.to(device).eval(), tokenizer, name, kind)


def as_loaded(model: nn.Module, tokenizer: Any | None = None) -> Loaded:
    """A model that is in memory already. It stays as it is: what comes back is a copy that shares its fp32 weights."""
    _require_finite(model)
    tensors = [*model.parameters(), *model.buffers()]
    # An fp32 copy of another dtype needs memory of its own: .float() works in place.
    shared = all(t.dtype == torch.float32 or not t.is_floating_point() for t in model.parameters())
    twin = copy.deepcopy(model, {id(t): t for t in tensors} if shared else {}).float().eval()
    _linearize(twin)
    source = getattr(model, "name_or_path", "") or type(model).__name__
    return Loaded(twin, tokenizer, source, CAUSAL if head_name(model) is not None else ENCODER)


def skeleton(config: Any, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a config with parameters on the meta device and computed buffers in place; Conv1D as in `Loaded`."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _auto_class(kind).from_config(config, dtype=dtype)
        _drop_pooler(model)
        _linearize(model)
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
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, ImportError for bad input
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"{name}: transformers cannot load this model ({' '.join(lines[:2])[:300]}).") from None
    missing = set(info["missing_keys"])
    if missing and all(".pooler." in f".{key}" for key in missing):
        model.config.add_pooling_layer = False  # such checkpoints were trained without one; transformers would make one up
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
    """From the architecture that the config names, else from what its model type is known for."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.architectures:
        known = {n for names in causal.values() for n in ([names] if isinstance(names, str) else names)}
        return CAUSAL if config.architectures[0] in known else ENCODER
    encoders = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return CAUSAL if config.model_type in causal and config.model_type not in encoders else ENCODER


def _auto_class(kind: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if kind == CAUSAL else AutoModel


def _drop_pooler(model: Any) -> None:
    if getattr(model.config, "add_pooling_layer", True) is False and hasattr(model, "pooler"):
        model.pooler = None


def _linearize(model: nn.Module) -> None:
    """Replace transformers' Conv1D (weight [K, N]) by nn.Linear (weight [N, K]) under the same name."""
    from transformers.pytorch_utils import Conv1D

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
    """Hold back transformers' progress bars and hints: what matters here is raised, and only the command line prints."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the repeated blocks in order. Raises ModelError when there is not exactly one list of them."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            if any(isinstance(m, nn.Linear) for m in module.modules()):
                lists.append(name)
    if len(lists) != 1:
        found = f"{len(lists)} ({', '.join(lists)})" if lists else "none"
        raise ModelError(
            f"{type(model).__name__}: one list of repeated blocks with linear layers is expected, found {found}; "
            f"decoder-only language models and encoders are supported."
        )
    return [(f"{lists[0]}.{i}", block) for i, block in model.get_submodule(lists[0]).named_children()]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears inside the blocks in module order, every expert's too; routers excluded (see `exempt`)."""
    inside = {
        f"{block}.{name}": module
        for block, owner in blocks(model)
        for name, module in owner.named_modules()
        if isinstance(module, nn.Linear)
    }
    routers = _routers(model)
    return {name: module for name, module in inside.items() if f"{name}.weight" not in routers}


def embedding_name(model: Any) -> str:
    """Module name of the token embedding. Raises ModelError."""
    return _name_of(model, model.get_input_embeddings(), "token embedding")


def head_name(model: Any) -> str | None:
    """Module name of the output head, None for encoders."""
    head = model.get_output_embeddings()
    return None if head is None else _name_of(model, head, "output head")


def is_tied(model: Any) -> bool:
    """Whether head and token embedding are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _name_of(model: nn.Module, wanted: nn.Module | None, what: str) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return name
    raise ModelError(f"{type(model).__name__}: its {what} cannot be found; this architecture is not supported.")


def exempt(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the rule by which it may stay uncompressed, in module order. The rules, first match wins:

    table      a weight of any nn.Embedding, and the output head: `embedding:` and `lm_head:` of the recipe decide
               about the token tables; position and type embeddings are read one row a token and are kept
    router     scores of experts: a 2-D weight with as many rows as there are experts, or one, beside the experts
    vector     fewer than two dimensions larger than one: norms, biases, depthwise kernels of width one
    conv       a weight of nn.Conv1d/2d/3d
    small      below max(4096, 1e-5 of all) elements
    outside    a linear outside the blocks, as long as these together hold at most 10 % of all weights
    """
    total = sum(p.numel() for p in model.parameters())
    large = max(LARGE_ELEMENTS, LARGE_SHARE * total)
    head, routers = head_name(model), _routers(model)
    prefixes = tuple(f"{name}." for name, _ in blocks(model))
    reasons: dict[str, str] = {}
    outside: list[str] = []
    for name, p in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(owner, nn.Embedding) or owner_name == head:
            reasons[name] = "table"
        elif name in routers:
            reasons[name] = "router"
        elif sum(extent > 1 for extent in p.shape) < 2:
            reasons[name] = "vector"
        elif isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            reasons[name] = "conv"
        elif p.numel() < large:
            reasons[name] = "small"
        elif isinstance(owner, nn.Linear) and leaf == "weight" and not name.startswith(prefixes):
            outside.append(name)
    if sum(model.get_parameter(name).numel() for name in outside) <= OUTSIDE_SHARE * total:
        reasons |= dict.fromkeys(outside, "outside")
    return reasons


def unaccounted(model: nn.Module, accounted: Collection[str]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of parameters that are neither in `accounted` (parameter names) nor exempt: what nobody decided on.

    The fused [E, N, K] experts of transformers 5 end up here.
    """
    decided = {*accounted, *exempt(model)}
    return [(name, tuple(p.shape)) for name, p in model.named_parameters() if name not in decided]


def _routers(model: nn.Module) -> set[str]:
    """Weights that score experts. A module holds E experts when a child is a ModuleList of E modules with linears or
    owns parameters [E, ., .]; of what else it holds, 2-D weights with E rows, or one (a shared expert's gate), are routers."""
    inside: dict[str, nn.Module] = {}
    for block, owner in blocks(model):
        inside |= {f"{block}.{name}": module for name, module in owner.named_modules() if name}
    found: set[str] = set()
    for name, child in inside.items():
        if not (count := _experts(child)):
            continue
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        for rest, p in parent.named_parameters():
            full = f"{parent_name}.{rest}"
            if p.dim() == 2 and not full.startswith(f"{name}.") and p.shape[0] in (count, 1):
                found.add(full)
    return found


def _experts(module: nn.Module) -> int:
    """How many experts the module is a container of, 0 when it is none."""
    if isinstance(module, nn.ModuleList):
        each = all(any(isinstance(m, nn.Linear) for m in expert.modules()) for expert in module)
        return len(module) if each and len(module) > 1 else 0
    fused: list[Tensor] = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and min(p.shape) > 1]
    return fused[0].shape[0] if fused and len({p.shape[0] for p in fused}) == 1 else 0
