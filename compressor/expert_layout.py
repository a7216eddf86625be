"""Expert-major order in a weight file: all tensors of one expert side by side, from where one read can begin.

A runtime that keeps experts on a disk reads one with one `pread`; the op MixedBitMoE reads a layer's from one range.
The bytes of an expert depend on the shapes of its tensors and the order of its modules alone, so experts of one width
look alike. safetensors allows no gaps: what fills an expert up to the next boundary is a tensor of its own, FILLER.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

BOUNDARY = 4096  # a page, and what files opened without a cache are read in
FILLER = "padding"  # uint8 zeros, `CONTAINER.E.padding`; no module has a tensor of this name
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Slot:
    """One tensor of an expert: its name inside the expert, and its bytes."""

    name: str
    offset: int
    length: int


def containers(model: nn.Module) -> set[str]:
    """The names of the modules whose numbered children are experts; none of a model without blocks."""
    from compressor.errors import ModelError
    from compressor.parts import experts_of

    try:
        return {container for _, container, _ in experts_of(model)}
    except ModelError:
        return set()


def owner(name: str, known: Collection[str]) -> tuple[str, int] | None:
    """(container, number) of the expert whose tensor this is."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        if parts[i].isdigit() and ".".join(parts[:i]) in known:
            return ".".join(parts[:i]), int(parts[i])
    return None


def slots(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> list[Slot]:
    """An expert's tensors, named as inside it, in the order of its bytes; modules: its modules' names in their order.

    Whole cache lines first, then the largest elements, so that each tensor is aligned to its elements.
    """
    rank = {name: number for number, name in enumerate(modules)}

    def place(name: str) -> tuple[Any, ...]:
        module, _, leaf = name.rpartition(".")
        size = tensors[name].element_size()
        return size_of(tensors[name]) % LINE != 0, -size, leaf, rank.get(module, 0), name

    found, offset = [], 0
    for name in sorted(tensors, key=place):
        length = size_of(tensors[name])
        found.append(Slot(name, offset, length))
        offset += length
    return found


def padded(length: int) -> int:
    """Bytes from the start of an expert to that of the next."""
    return -(-length // BOUNDARY) * BOUNDARY


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def index(entries: Mapping[str, tuple[Any, Any, int, int]], known: Collection[str]) -> dict[str, list[list[int]]]:
    """Container -> [offset in the file, bytes] of each expert, by number; entries: name -> (.., .., offset, length)."""
    spans: dict[str, dict[int, list[int]]] = {}
    for name, (_, _, offset, length) in entries.items():
        if (of := owner(name, known)) is None:
            continue
        span = spans.setdefault(of[0], {}).setdefault(of[1], [offset, offset])
        span[:] = min(span[0], offset), max(span[1], offset + length)
    return {
        container: [[begin, end - begin] for _, (begin, end) in sorted(own.items())]
        for container, own in sorted(spans.items())
    }
