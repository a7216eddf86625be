"""The weight file: bytes, alignment, agreement with the safetensors package, and damage told in one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import ModelError
from compressor.exporters.safetensors_file import ALIGNMENT, DTYPES, FILE, header, read, tensor_hashes, write


def sample() -> dict[str, Tensor]:
    """Every dtype, awkward sizes, an empty tensor, a scalar, a view and two tensors that share memory."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.tensor([512.0])
    tensors = {f"odd.{name}": (torch.rand(3, 7, generator=generator) * 100).to(dtype) for dtype, name in DTYPES.items()}
    return tensors | {
        "a.input_global_scale": shared,
        "b.input_global_scale": shared,
        "aligned.words": torch.arange(64, dtype=torch.int32).reshape(8, 8),
        "aligned.bytes": torch.arange(128, dtype=torch.uint8),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "ünïcode": torch.ones(2),
    }


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_written_values_come_back_here_and_in_the_package(tmp_path: Path) -> None:
    tensors = sample()
    write(tmp_path / FILE, tensors)
    for found in (read(tmp_path), load_file(tmp_path / FILE)):
        assert set(found) == set(tensors)
        assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_header_gives_the_place_of_every_tensor_in_the_file(tmp_path: Path) -> None:
    tensors = sample()
    write(tmp_path / FILE, tensors)
    raw = (tmp_path / FILE).read_bytes()
    entries = header(tmp_path / FILE)
    for name, (dtype, shape, offset, length) in entries.items():
        expected = tensors[name].contiguous()
        assert DTYPES[expected.dtype] == dtype and tuple(expected.shape) == shape
        assert raw[offset : offset + length] == expected.flatten().view(torch.uint8).numpy().tobytes()
        assert offset % expected.element_size() == 0
    assert all(entries[name][2] % ALIGNMENT == 0 for name in entries if entries[name][3] % ALIGNMENT == 0)
    assert max(o + n for _, _, o, n in entries.values()) == len(raw)


def test_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / FILE, {"m.weight": torch.tensor([[1, 255]], dtype=torch.uint8), "m.scale": torch.tensor([2.0])})
    raw = (tmp_path / FILE).read_bytes()
    text = (
        b'{"__metadata__":{"format":"pt"},"m.scale":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"m.weight":{"dtype":"U8","shape":[1,2],"data_offsets":[4,6]}}'
    )
    assert raw == struct.pack("<Q", 184) + text.ljust(184) + b"\x00\x00\x00\x40\x01\xff"


def test_bytes_do_not_depend_on_the_order_of_names(tmp_path: Path) -> None:
    tensors = sample()
    write(tmp_path / "one", tensors)
    write(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(5.0), "y": torch.arange(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / FILE)
    assert all(same(tensor, tensors[name]) for name, tensor in read(tmp_path).items())


def test_one_flipped_bit_changes_one_hash(tmp_path: Path) -> None:
    write(tmp_path / FILE, sample())
    before = tensor_hashes(tmp_path)
    raw = bytearray((tmp_path / FILE).read_bytes())
    raw[header(tmp_path / FILE)["aligned.bytes"][2] + 5] ^= 0x10
    (tmp_path / FILE).write_bytes(raw)
    after = tensor_hashes(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"aligned.bytes"}


def _with_header(entries: dict[str, object], data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


U8 = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
DAMAGED = {
    "empty file": b"",
    "half a length": b"\x10\0\0",
    "header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "not JSON": struct.pack("<Q", 8) + b"\xff\xfe\0\0garbage",
    "JSON of another kind": _with_header([1, 2]),  # type: ignore[arg-type]
    "truncated data": _with_header({"x": U8}, b"\0" * 7),
    "bytes after the end": _with_header({"x": U8}, b"\0" * 9),
    "unknown dtype": _with_header({"x": {**U8, "dtype": "F3"}}),
    "shape against bytes": _with_header({"x": {**U8, "shape": [9]}}),
    "negative shape": _with_header({"x": {**U8, "shape": [-2, -4]}}),
    "overlap": _with_header({"x": U8, "y": U8}),
    "gap": _with_header({"x": {**U8, "data_offsets": [4, 12]}}, b"\0" * 12),
    "no offsets": _with_header({"x": {"dtype": "U8", "shape": [8]}}),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, what: str) -> None:
    (tmp_path / FILE).write_bytes(DAMAGED[what])
    with pytest.raises(ModelError) as error:
        read(tmp_path)
    message = str(error.value)
    assert FILE in message and "\n" not in message and message.endswith("again.")


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is missing"):
        read(tmp_path)
