"""What a config says of a model whose shapes a step has changed: the field is found by trying, not by its name.

What no field says is left to `structure.between`: our loader rebuilds it, stock transformers cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from compressor.structure import between


def say_width(model: nn.Module, names: Collection[str], before: int, after: int) -> str | None:
    """Set the field of the config that holds the width of all linears `names`, from `before` to `after`; its name, or
    None, and nothing is changed, where there is none."""
    config: Any = model.config
    fields = [n for n, value in vars(config).items() if type(value) is int and value == before]
    return next((name for name in fields if say(model, names, **{name: after})), None)


def say(model: nn.Module, names: Collection[str], **fields: Any) -> bool:
    """Set fields of the config if a model of that config then has the linears `names` in the shapes of `model`."""
    config: Any = copy.deepcopy(model.config)
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        stock = stock_of(model, config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError):  # a width that this field does not allow
        return False
    if set(between(stock, model)) & set(names):
        return False
    for name, value in fields.items():
        setattr(model.config, name, value)
    return True


def stock_of(model: nn.Module, config: Any) -> nn.Module:
    """What `config` describes, of the class of `model`, without values."""
    from accelerate import init_empty_weights

    from compressor.model import linearize

    with init_empty_weights(include_buffers=False):
        stock: nn.Module = type(model)(config)
        linearize(stock)
    return stock
