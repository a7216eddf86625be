"""model.safetensors and the small files beside it: the part of a folder that transformers reads.

Written here rather than by the safetensors package for three reasons: global scales that several layers share are one
tensor in memory, which the package refuses; the ONNX graph maps the same bytes, so the order is chosen for alignment;
and tensors go to the file one at a time, without a second copy of the model in memory.

Layout: u64 length of the header, the header (JSON, padded with spaces), then the tensors without gaps. The first byte
of data and every tensor of a multiple of 64 bytes is aligned to 64; the others follow, aligned to their element size.
Experts come first, one after the other (expert_layout.py).
Everything is little endian. Sharding is left out.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor import expert_layout
from compressor.errors import ModelError
from compressor.expert_layout import FILLER, size_of
from compressor.model import skeleton

if TYPE_CHECKING:
    from compressor.artifact import Artifact

FILE = "model.safetensors"
ALIGNMENT = 64
LONGEST_HEADER = 100_000_000  # what the safetensors package accepts

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}

Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, offset in the file, bytes


def export(artifact: Artifact, folder: Path) -> list[Path]:
    """Write weights, config.json, generation_config.json and tokenizer into `folder`; returns the files.

    Raises VerificationError when the tokenizer, read back, gives other tokens.
    """
    from compressor.exporters import hf_config, tokenizer_files

    model = skeleton(artifact.config, artifact.kind)
    rank = {name: number for number, (name, _) in enumerate(model.named_modules())}
    known = expert_layout.containers(model)
    write(folder / FILE, artifact.tensors(), rank, known)
    artifact.record.pop("expert_index", None)
    if found := expert_layout.index(header(folder / FILE), known):
        artifact.record["expert_index"] = found
    return [folder / FILE, *hf_config.export(artifact, folder), *tokenizer_files.export(artifact, folder)]


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    rank: Mapping[str, int] = MappingProxyType({}),
    containers: Collection[str] = (),
) -> None:
    """One safetensors file; the bytes depend on names, ranks and values only. Tensors may share storage.

    The same tensors of sister modules lie side by side, in the order of the modules' `rank`, so that one initializer
    can be the weight of q, k and v, or of the first factors of all three (onnx_sites.py). The experts of `containers`
    begin at multiples of 4096 bytes each.
    """
    assert sys.byteorder == "little", "the file format is little endian"

    def place(name: str) -> tuple[Any, ...]:
        module, _, leaf = name.rpartition(".")
        aligned = size_of(tensors[name]) % ALIGNMENT == 0
        owner, _, factor = module.rpartition(".")
        if module not in rank and owner in rank:  # of low rank: what the model's own module has become
            module, leaf = owner, f"{factor}.{leaf}"
        sisters = (module.rpartition(".")[0], leaf, rank.get(module, 0))
        return (not aligned, -tensors[name].element_size(), *sisters, name)

    experts = _experts(tensors, rank, containers)
    order = [*experts, *sorted((n for n in tensors if n not in experts), key=place)]
    everything = {**tensors, **experts}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor, end = everything[name], offset + size_of(everything[name])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % (expert_layout.BOUNDARY if experts else ALIGNMENT))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            if everything[name].numel():
                file.write(everything[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _experts(tensors: Mapping[str, Tensor], rank: Mapping[str, int], containers: Collection[str]) -> dict[str, Tensor]:
    """The tensors of all experts in file order, with what fills each up to the next boundary."""
    owned: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if of := expert_layout.owner(name, containers):
            owned.setdefault(of, {})[name.removeprefix(f"{of[0]}.{of[1]}.")] = tensor
    modules: dict[tuple[str, int], list[str]] = {}
    for name in sorted(rank, key=rank.__getitem__):
        if of := expert_layout.owner(f"{name}.{FILLER}", containers):
            modules.setdefault(of, []).append(name.removeprefix(f"{of[0]}.{of[1]}."))
    found: dict[str, Tensor] = {}
    for (container, number), own in sorted(owned.items()):
        prefix = f"{container}.{number}."
        placed = expert_layout.slots(own, modules.get((container, number), ()))
        found |= {prefix + slot.name: own[slot.name] for slot in placed}
        length = placed[-1].offset + placed[-1].length
        if missing := expert_layout.padded(length) - length:
            found[prefix + FILLER] = torch.zeros(missing, dtype=torch.uint8)
    return found


def header(path: Path) -> dict[str, Entry]:
    """{name: (dtype, shape, offset, length)}, offset in bytes from the start of the file, in file order; no fillers.

    Raises ModelError when the file is missing, truncated or inconsistent; tensor data is not read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError(f"its header of {length} bytes does not fit")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {name: _entry(name, entry, 8 + length) for name, entry in entries.items()}
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; write the folder again or download it completely.") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}); write or download it again.") from None
    found = dict(sorted(found.items(), key=lambda item: (item[1][2], item[1][3])))
    end = 8 + length
    for name, (_, _, offset, count) in found.items():
        if offset != end:
            raise ModelError(
                f"{path}: tensor {name} starts at byte {offset}, expected {end}; write or download it again."
            )
        end += count
    if end != size:
        what = "is truncated" if end > size else "has bytes after its last tensor"
        raise ModelError(
            f"{path} {what}: its header asks for {end} bytes, the file has {size}; write or download it again."
        )
    return {name: entry for name, entry in found.items() if name.rpartition(".")[2] != FILLER}


def _entry(name: str, entry: Any, start: int) -> Entry:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in TORCH:
        raise ValueError(f"tensor {name} has dtype {dtype}, known are {', '.join(TORCH)}")
    if any(not isinstance(n, int) or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a shape or an offset that is no count")
    if end - begin != prod(shape) * TORCH[dtype].itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} has {end - begin} bytes")
    return dtype, shape, start + begin, end - begin


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weight file by name, mapped from disk and not copied. Raises ModelError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / FILE
    entries = header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}); write or download it again.") from None
    return {name: tensors[name] for name in entries}


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes. Raises ModelError."""
    path = Path(folder) / FILE
    entries, found = header(path), {}
    with path.open("rb") as file:
        for name, (_, _, offset, length) in entries.items():
            file.seek(offset)
            found[name] = hashlib.sha256(file.read(length)).hexdigest()
    return found
