"""The parts of a model by name: all that the program knows about architectures.

No table of families. The repeated blocks are the outermost ModuleList of modules that hold linears; everything else
is found by what a module is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.fewer_experts import RULE, FewerExperts

# A weight that nobody compresses is worth an error from this size on: a share of 1e-5 keeps what can hide in a deep
# model below a percent, and nothing under 4096 weights matters in a small one.
LARGE_ELEMENTS, LARGE_SHARE = 4096, 1e-5
# Linears outside the blocks (a pooler, an embedding projection) are kept as long as together they are this small a
# share of all weights.
OUTSIDE_SHARE = 0.10


Kind = type[nn.Module] | tuple[type[nn.Module], ...]


def blocks(model: nn.Module, kind: Kind = nn.Linear) -> list[tuple[str, nn.Module]]:
    """(name, module) of the repeated blocks in order. Raises ModelError when there is not exactly one list of them.

    kind: what at least one module of a block is; a stored model need not have an nn.Linear any more.
    """
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            if any(isinstance(m, kind) for m in module.modules()):
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
    table = model.get_input_embeddings()
    return _name_of(model, table if isinstance(table, nn.Embedding) else None, "token embedding")


def head_name(model: Any) -> str | None:
    """Module name of the output head, None for encoders."""
    head = model.get_output_embeddings()
    return None if head is None else _name_of(model, head, "output head")


def is_tied(model: Any) -> bool:
    """Whether head and token embedding are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie(model: Any) -> None:
    """Give the head of a tied pair a parameter of its own, with the same values, and say so in the config."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def _name_of(model: nn.Module, wanted: nn.Module | None, what: str) -> str:
    for name, module in model.named_modules():
        if wanted is not None and module is wanted:
            return name
    raise ModelError(f"{type(model).__name__}: its {what} cannot be found; this architecture is not supported.")


def exempt(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the rule by which it may stay uncompressed, in module order. The rules, first match wins:

    table      a weight of any nn.Embedding, and the output head: `embedding:` and `lm_head:` of the recipe decide
               about the token tables; position and type embeddings are read one row a token and are kept
    router     scores of experts: a 2-D weight with as many rows as there are experts, or one, beside the experts
    rule       how many of them a token keeps (fewer_experts.py)
    vector     fewer than two dimensions larger than one: norms, biases, depthwise kernels of width one
    conv       a weight of nn.Conv1d/2d/3d
    small      below max(4096, 1e-5 of all) elements
    outside    a linear outside the blocks, as long as these together hold at most 10 % of all weights
    """
    total = sum(p.numel() for p in model.parameters())
    large = max(LARGE_ELEMENTS, LARGE_SHARE * total)
    head, routers, rules = head_name(model), _routers(model), _rules(model)
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
        elif name.startswith(rules):
            reasons[name] = "rule"
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

    Experts held as one parameter [E, N, K] that experts.py does not know end up here.
    """
    decided = {*accounted, *exempt(model)}
    return [(name, tuple(p.shape)) for name, p in model.named_parameters() if name not in decided]


def experts_of(model: nn.Module, kind: Kind = nn.Linear) -> list[tuple[str, str, list[str]]]:
    """Of each layer of experts: the name of the module that holds them, that of their container, and their routers.

    A module holds E experts when a child is a ModuleList of E modules with linears, or owns parameters [E, ., .]. Of
    what else that module holds, 2-D weights with E rows, or with one (a shared expert's gate), are routers.
    """
    inside: dict[str, nn.Module] = {}
    for block, owner in blocks(model, kind):
        inside |= {f"{block}.{name}": module for name, module in owner.named_modules() if name}
    found, rules = [], _rules(model)
    for name, child in inside.items():
        if not (count := _experts(child, kind)):
            continue
        parent_name = name.rpartition(".")[0]
        routers = [
            full
            for rest, p in model.get_submodule(parent_name).named_parameters()
            if not (full := f"{parent_name}.{rest}").startswith((f"{name}.", *rules))
            and p.dim() == 2
            and p.shape[0] in (count, 1)
        ]
        found.append((parent_name, name, routers))
    return found


def _rules(model: nn.Module) -> tuple[str, ...]:
    """What the names of parameters begin with that say how many experts a token keeps."""
    return tuple(f"{name}.{RULE}." for name, m in model.named_modules() if isinstance(m, FewerExperts))


def _routers(model: nn.Module) -> set[str]:
    """Weights that score experts."""
    return {router for _, _, routers in experts_of(model) for router in routers}


def _experts(module: nn.Module, kind: Kind) -> int:
    """How many experts the module is a container of, 0 when it is none."""
    if isinstance(module, nn.ModuleList):
        each = all(any(isinstance(m, kind) for m in expert.modules()) for expert in module)
        return len(module) if each and len(module) > 1 else 0
    fused = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and min(p.shape) > 1]
    return fused[0].shape[0] if len({p.shape[0] for p in fused}) == 1 else 0
