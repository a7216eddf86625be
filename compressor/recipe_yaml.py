"""Finding and reading recipe files: plain data, plus where in which file every value was written.

PyYAML's node graph is walked here instead of its loader, because the loader forgets line numbers and lets a repeated
key win silently. What the values mean is `recipe.py`'s business. Left out: YAML merge keys, `extends` does that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import RecipeError, nearest

SHIPPED = Path(__file__).parent / "recipes"
Keys = tuple[str | int, ...]  # ("steps", 1, "quantize", "group_size")


@dataclass(frozen=True)
class Document:
    """`data` as YAML has it; `origins` says where a value was written, such as `w4a4.yaml line 7`."""

    data: dict[str, Any]
    origins: dict[Keys, str]

    def origin(self, keys: Keys) -> str:
        """Where the value was written, or the nearest thing around it."""
        while keys not in self.origins and keys:
            keys = keys[:-1]
        return self.origins.get(keys, "recipe")

    def put(self, keys: Keys, value: object, origin: str) -> Document:
        """A copy with one value set; mappings on the way are created."""
        made = [keys[:i] for i in range(1, len(keys)) if not isinstance(_get(self.data, keys[:i]), dict | list)]
        kept = {k: o for k, o in self.origins.items() if k[: len(keys)] != keys}
        return Document(_put(self.data, keys, value), kept | dict.fromkeys([*made, keys], origin))


def shipped() -> dict[str, str]:
    """Names of the shipped recipes, each with the comment its file opens with."""
    found = {}
    for path in sorted(SHIPPED.glob("[!_]*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


def read(name: str) -> Document:
    """The recipe file of that path or shipped name, with everything it extends merged in. Raises RecipeError."""
    return _read(name, Path(), "", ())


def extended(document: Document, folder: Path = Path(), chain: tuple[Path, ...] = ()) -> Document:
    """The document on top of the one its `extends` names: mappings merge, everything else replaces."""
    if "extends" not in document.data:
        return document
    where = f"{document.origin(('extends',))}: "
    data = {key: value for key, value in document.data.items() if key != "extends"}
    base = document.data["extends"]
    if not isinstance(base, str):
        raise RecipeError(f"{where}extends is {base!r}; allowed: the path or name of one recipe.")
    return _merged(_read(base, folder, where, chain), Document(data, document.origins))


def read_value(text: str, origin: str) -> Any:
    """One YAML value, as written after `--set name=`."""
    try:
        return _parse(text, origin)[0]
    except _Malformed as error:
        raise RecipeError(f"{origin}: the value is not valid YAML: {error}.") from error


def _read(name: str, folder: Path, where: str, chain: tuple[Path, ...]) -> Document:
    path = _find(name, folder, where, chain)
    shown = path.name if path.parent == SHIPPED else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: is not UTF-8 text, so not a recipe.") from error
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read ({error.strerror}).") from error
    try:
        data, lines = _parse(text, shown)
    except _Malformed as error:
        line = f" line {error.line}" if error.line else ""
        raise RecipeError(f"{shown}{line}: is not valid YAML: {error}.") from error
    if data is None:
        raise RecipeError(f"{shown}: is empty; a recipe has at least `steps:`.")
    if not isinstance(data, dict):
        raise RecipeError(f"{shown}: holds a {type(data).__name__}; a recipe is a mapping that has at least `steps:`.")
    origins = {keys: f"{shown} line {line}" for keys, line in lines.items()} | {(): shown}
    return extended(Document(data, origins), path.parent, (*chain, path.resolve()))


def _find(name: str, folder: Path, where: str, chain: tuple[Path, ...]) -> Path:
    """Next to the extending file, else shipped. Files of the chain are passed over, so `w4a4.yaml` may extend w4a4."""
    options = [folder / name, folder / f"{name}.yaml", SHIPPED / name, SHIPPED / f"{name}.yaml"]
    there = [path for path in options if name and path.is_file()]
    for path in there:
        if path.resolve() not in chain:
            return path
    if there:
        circle = " -> ".join(path.name for path in (*chain[chain.index(there[0].resolve()) :], there[0]))
        raise RecipeError(f"{where}recipes extend each other in a circle: {circle}.")
    known = nearest(Path(name).name.removesuffix(".yaml"), shipped())
    raise RecipeError(f"{where}no recipe '{name}': there is no such file, and it is not a shipped recipe; {known}")


def _merged(below: Document, above: Document) -> Document:
    def merge(under: Document, over: dict[str, Any], at: Keys) -> Document:
        for key, value in over.items():
            keys = (*at, key)
            if isinstance(value, dict) and isinstance(_get(under.data, keys), dict):
                under = merge(under, value, keys)
            else:
                under = under.put(keys, value, above.origin(keys))
                nested = {k: o for k, o in above.origins.items() if k[: len(keys)] == keys}
                under = Document(under.data, under.origins | nested)
        return under

    return merge(below, above.data, ())


def _get(data: Any, keys: Keys) -> Any:
    for key in keys:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _put(data: Any, keys: Keys, value: object) -> Any:
    if not keys:
        return value
    first, *rest = keys
    if isinstance(data, list) and isinstance(first, int):
        return [*data[:first], _put(data[first], tuple(rest), value), *data[first + 1 :]]
    inner = data if isinstance(data, dict) else {}
    return {**inner, first: _put(inner.get(first), tuple(rest), value)}


class _Malformed(Exception):
    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _parse(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """The value and the line of every key and item in it."""
    lines: dict[Keys, int] = {}

    def walk(node: yaml.Node, keys: Keys) -> Any:
        lines.setdefault(keys, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [walk(item, (*keys, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or not key_node.tag.endswith(":str"):
                raise _Malformed(f"the key {key!r} is not a plain word" if key else "a key is not a plain word", line)
            if key in mapping:
                raise _Malformed(f"the key '{key}' is there twice, first on line {lines[(*keys, key)]}", line)
            lines[(*keys, key)] = line
            mapping[key] = walk(value_node, (*keys, key))
        return mapping

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else walk(node, ())), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise _Malformed(f"{error.problem or error.context}{hint}", mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise _Malformed(str(error).partition("\n")[0]) from error
    except RecursionError as error:
        raise _Malformed("an alias contains itself") from error
    except ValueError as error:
        raise _Malformed(str(error)) from error
