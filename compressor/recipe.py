"""YAML -> Recipe: frozen, validated once, and printed back with its defaults filled in.

    model: smollm2-135m-instruct
    extends: base.yaml            # a path relative to this file, or a shipped recipe
    steps:
      - quantize: {weights: nvfp4, activations: nvfp4, ignore: ["*.down_proj"]}

A step's options are its method's frozen dataclass, so a method defines them in one place. An error is one sentence that
names where the value was written: file and line, or the `--set` that gave it. Reading files is `recipe_yaml.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from compressor.errors import RecipeError, nearest
from compressor.recipe_yaml import Document, Keys, extended, read, read_value

# FORMAT, FORMAT-row or FORMAT-gSIZE; tables.py says what each stores.
TableFormat = Literal["keep", "bf16", "int8-row", "int8", "int4", "int4-g64", "int4-g128", "nvfp4", "mxfp4"]
TableChoice = Literal[TableFormat, "auto"]  # auto: the format that the budget of the recipe's mixed_bits step allows
Globs = Annotated[list[str], Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Frozen):
    """Which text is run through the model to measure it: `windows` windows of `length` tokens.

    `dtype` is what its matrix products are computed in; auto takes bfloat16 where the processor has it, else float32.
    """

    data: str | None = None  # None: prose that every Python ships
    windows: Annotated[int, Field(ge=1)] = 32
    length: Annotated[int, Field(ge=2)] = 512
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class ExpertPlan(_Frozen):
    """What the manifest tells runtimes of a mixture of experts, measured on the compressed model (docs/moe.md).

    windows     how many of the calibration text, of its length; the last tenth is held out, to try the plan on
    pin_bytes   what experts that always stay in memory may take; None: a quarter of all experts
    tolerance   how much more perplexity another number of experts a token may cost
    """

    windows: Annotated[int, Field(ge=2)] = 128
    pin_bytes: Annotated[int, Field(ge=0)] | None = None
    tolerance: Annotated[float, Field(ge=0)] = 0.05


class Step(_Frozen):
    """A method and the modules it is for: fnmatch globs on the names of linears inside the model's blocks."""

    method: str
    targets: Globs = ["*"]
    ignore: list[str] = []
    options: Any  # the method's frozen dataclass


class Recipe(_Frozen):
    """What to do to a model. `runtime` names whose activation rounding is aimed at, `graph` which operators the ONNX
    graph is made of: those of ONNX, or fewer nodes with onnxruntime's own beside them (docs/onnx.md). `experts`: packed
    experts of a layer as one op of ours, of any widths, or as onnxruntime's own QMoE, of 2, 4 and 8 bits (docs/moe.md).
    """

    model: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    runtime: Literal["transformers", "compressor"] = "transformers"
    calibration: Calibration = Calibration()
    embedding: TableChoice = "bf16"
    lm_head: TableChoice = "bf16"
    head_activations: Literal["none", "int8_block"] = "none"  # of a head in FP4
    exports: Annotated[list[Literal["safetensors", "onnx", "lora"]], Field(min_length=1)] = ["safetensors", "onnx"]
    graph: Literal["portable", "ort"] = "portable"
    experts: Literal["mixed", "qmoe"] = "mixed"
    lean: bool = True  # linears of low rank run without activations of full width
    expert_plan: ExpertPlan | None = None
    steps: Annotated[list[Step], Field(min_length=1)]

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe at a path, else the shipped recipe of that name, with or without `.yaml`.

        An override is `seed=1`, `calibration.windows=8`, `quantize.group_size=64` (every step of that method) or
        `2.group_size=64` (step number 2); its value is YAML. Raises RecipeError.
        """
        return _validated(_overridden(read(str(name_or_path)), overrides))

    @classmethod
    def from_dict(cls, data: Mapping[str, object], overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a mapping shaped like the YAML; `extends` is from the current folder. Raises RecipeError."""
        plain = json.loads(json.dumps(data, default=str))
        return _validated(_overridden(extended(Document(plain, {(): "recipe"})), overrides))

    def to_yaml(self) -> str:
        """The recipe with its defaults filled in; loading it gives an equal Recipe."""
        data = self.model_dump(exclude={"steps"})
        data["steps"] = [
            {step.method: {"targets": step.targets, "ignore": step.ignore, **asdict(step.options)}}
            for step in self.steps
        ]
        return yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True)


PARTS: dict[str, type[BaseModel]] = {"calibration": Calibration, "expert_plan": ExpertPlan}


def shares_a_budget(step: Step) -> bool:
    """Whether the step's method gives each layer a format so that all together meet a budget: mixed_bits."""
    return hasattr(step.options, "place_all")


# Options that change what activations are rounded to, in a way that only our own ops carry out.
OWN_RUNTIME_ONLY = ("four_over_six", "symmetrize", "inputs", "hadamard")
OWN_RULE = "int8_block"


def _overridden(document: Document, overrides: Sequence[str]) -> Document:
    for text in overrides:
        origin = f"--set {text}"
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise RecipeError(f"{origin}: allowed is name=value, like quantize.group_size=64 or calibration.windows=8.")
        for keys in _addressed(document, name.split("."), origin):
            document = document.put(keys, read_value(value, origin), origin)
    return document


def _addressed(document: Document, parts: list[str], origin: str) -> list[Keys]:
    """The places that `seed`, `calibration.windows`, `quantize.group_size` or `2.group_size` stands for."""
    head, *option = parts
    if head in Recipe.model_fields or not option:
        return [tuple(parts)]
    found = document.data.get("steps")
    entries = found if isinstance(found, list) else []
    methods = [next(iter(step)) if isinstance(step, dict) and step else "" for step in entries]
    steps: list[Keys] = [
        ("steps", i, method, *option) for i, method in enumerate(methods) if head in (method, str(i + 1))
    ]
    if not steps:
        names = {*Recipe.model_fields, *filter(None, methods), *(str(i + 1) for i in range(len(methods)))}
        raise RecipeError(f"{origin}: the recipe has no '{head}'; {nearest(head, names)}")
    return steps


def _validated(document: Document) -> Recipe:
    from compressor.methods import METHODS  # methods import this module's neighbours, and torch

    data = dict(document.data)
    if isinstance(data.get("steps"), list):
        data["steps"] = [_shaped(document, i, step, METHODS) for i, step in enumerate(data["steps"])]
    recipe: Recipe = _checked(Recipe, data, document, ())
    steps: list[Step] = []
    for i, step in enumerate(recipe.steps):
        keys: Keys = ("steps", i, step.method)
        options = _checked(METHODS[step.method], step.options, document, keys)
        own = [(n, n) for n in OWN_RUNTIME_ONLY if getattr(options, n, False) not in (False, "auto")]
        if getattr(options, "activations", "") == OWN_RULE:
            own.append(("activations", OWN_RULE))
        for name, what in own:
            _require_own_runtime(recipe, what, _place(document, (*keys, name)))
        wrong_widths = {*getattr(options, "choices", ())} - {2, 4, 8} if step.method == "pmq" else set()
        if recipe.experts == "qmoe" and wrong_widths:
            wrong = f"stock QMoE has no kernel for {min(wrong_widths)} bits; take choices of 2, 4, 8, or mixed."
            raise RecipeError(f"{_place(document, (*keys, 'choices'))}: {wrong}")
        if step.method == "fp4" and any(getattr(s.options, "inputs", 0) for s in steps):
            wrong = "fp4 does not store inputs that an earlier step rotates; use quantize, or rotate values."
            raise RecipeError(f"{_place(document, keys)}: {wrong}")
        steps.append(step.model_copy(update={"options": options}))
    budgets = [step for step in steps if shares_a_budget(step)]
    for name in ("embedding", "lm_head"):
        if getattr(recipe, name) == "auto" and len(budgets) != 1:
            found = f"{len(budgets)} mixed_bits steps" if budgets else "no mixed_bits step"
            wrong = f"{name} is 'auto', which is a share of a mixed_bits step's budget, and the recipe has {found}; "
            raise RecipeError(f"{document.origin((name,))}: {wrong}give it one, or {name} a format of its own.")
    if (rule := recipe.head_activations) != "none" and recipe.lm_head not in ("nvfp4", "mxfp4"):
        wrong = f"head_activations '{rule}' go with lm_head nvfp4 or mxfp4, and it is '{recipe.lm_head}'"
        raise RecipeError(f"{document.origin(('head_activations',))}: {wrong}; change one of them.")
    if rule == OWN_RULE:
        _require_own_runtime(recipe, rule, document.origin(("head_activations",)))
    return recipe.model_copy(update={"steps": steps})


def _require_own_runtime(recipe: Recipe, what: str, where: str) -> None:
    if recipe.runtime != "compressor":
        raise RecipeError(
            f"{where}: {what} is not what {recipe.runtime} computes; set runtime: compressor, or drop it."
        )


def _shaped(document: Document, number: int, step: object, methods: Mapping[str, type]) -> dict[str, object]:
    """{method: {targets, ignore, options...}} as the fields of Step."""
    where = f"{document.origin(('steps', number))}, step {number + 1}"
    method, body = next(iter(step.items())) if isinstance(step, dict) and len(step) == 1 else ("", step)
    if not method or not isinstance(body, dict | None):
        allowed = "allowed: one method with its options, like `quantize: {weights: int4}`"
        raise RecipeError(f"{where}: is {_shown(step)}; {allowed}.")
    if method not in methods:
        raise RecipeError(f"{where}: unknown method '{method}'; {nearest(method, methods)}")
    options = dict(body or {})
    common = {name: options.pop(name) for name in ("targets", "ignore") if name in options}
    known = [field.name for field in fields(methods[method])]
    for name in options:
        if name not in known:
            place = _place(document, ("steps", number, method, name))
            raise RecipeError(f"{place}: unknown option '{name}'; {nearest(name, [*known, 'targets', 'ignore'])}")
    return {"method": method, **common, "options": options}


def _checked(schema: type, data: object, document: Document, keys: Keys) -> Any:
    """`data` as an instance of `schema`, strictly: "8" is not a number. Raises RecipeError for one thing."""
    try:
        # Through JSON, because only there does strictness accept a list for a tuple and a mapping for a dataclass.
        return TypeAdapter(schema).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        # An unknown key first: a typo explains a missing one.
        wrong = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path: Keys = wrong["loc"]
    if path[:1] == ("steps",) and len(path) > 2:  # Step has fields where YAML has a method's mapping
        step = document.data["steps"][path[1]]
        path = (*path[:2], *step, *path[2:])
    path = (*keys, *path)
    message = str(wrong.get("ctx", {}).get("error", ""))
    if message and isinstance(data, dict):  # a combination of options: point at the first that the message names
        path = (*path, *[name for name in data if name in message][:1])
    raise RecipeError(
        f"{_place(document, path)}: {message.removesuffix('.') + '.' if message else _sentence(path, wrong)}"
    )


def _place(document: Document, keys: Keys) -> str:
    step = f", step {int(keys[1]) + 1} ({keys[2]})" if keys[:1] == ("steps",) and len(keys) > 2 else ""
    return document.origin(keys) + step


KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "too_short": "at least one item",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}


def _sentence(keys: Keys, wrong: Any) -> str:
    """What is wrong and what is allowed, from one of pydantic's errors."""
    words = [key for key in keys if isinstance(key, str)]
    name = ".".join(words[2:] if words[0] == "steps" and len(words) > 2 else words)
    kind, context, got = wrong["type"], wrong.get("ctx", {}), wrong["input"]
    if kind == "extra_forbidden":
        inside = next((part for name, part in PARTS.items() if name in keys[:-1]), None)
        known = inside.model_fields if inside else {**Recipe.model_fields, "extends": None}
        return f"unknown option '{keys[-1]}'; {nearest(str(keys[-1]), known)}"
    if kind == "missing":
        return f"'{words[-1]}' is missing; add it."
    if kind == "literal_error":
        allowed = re.findall(r"[^\s',]+", context["expected"].replace(" or ", " "))  # quoted names, bare numbers
        return f"{name} is {_shown(got)}; {nearest(str(got), allowed)}"
    allowed_kind = KINDS[kind].format(**context) if kind in KINDS else wrong["msg"].replace("Input should be ", "")
    return f"{name} is {_shown(got)}; allowed: {allowed_kind}."


def _shown(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
