"""The header of a GGUF file, read once and checked against the file's length, and the tokenizer that it holds.

Tensors are left to transformers. The header is read here because a truncated or damaged file should be told apart
in a tenth of a second with one sentence, and because transformers' own reading of the tokenizer differs between its
versions (see `tokenizer_of`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compressor.errors import ModelError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
LONGEST = 1 << 28  # of one string or array: what no real header comes near
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that text never spells
GPT2_SPLITTING = {"gpt-2", "smollm", "default"}  # tokenizer.ggml.pre values read with GPT-2's splitting pattern


@dataclass(frozen=True)
class Header:
    """Metadata by key, and the names of the tensors."""

    metadata: dict[str, Any]
    tensors: tuple[str, ...]


def read_header(path: Path) -> Header:
    """Read and check a GGUF file's header. Raises ModelError when it is not GGUF, truncated or damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{path}: not a GGUF file, it does not start with 'GGUF'; download it again.")
        try:
            return _parse(path, file, size)
        except (struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError) as error:
            raise ModelError(f"{path}: truncated or damaged GGUF header ({error}); download it again.") from None


def _parse(path: Path, file: BinaryIO, size: int) -> Header:
    version = _scalar(file, "<I")
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version} is not supported; allowed: 2, 3.")
    tensor_count, pair_count = _scalar(file, "<Q"), _scalar(file, "<Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = _string(file)
        metadata[key] = _value(file, _scalar(file, "<I"))
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(tensor_count):
        name = _string(file)
        shape = [_scalar(file, "<Q") for _ in range(_scalar(file, "<I"))]
        kind, offset = _scalar(file, "<I"), _scalar(file, "<Q")
        spans[name] = (offset, _bytes_of(name, shape, kind))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-file.tell() // alignment) * alignment
    if not spans:
        raise ModelError(f"{path}: this GGUF file holds no tensors.")
    end = start + max(offset + length for offset, length in spans.values())
    if end > size:
        raise ModelError(f"{path}: truncated GGUF file, it needs {end} bytes and has {size}; download it again.")
    return Header(metadata, tuple(spans))


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, "<Q")
    data = file.read(length) if length < LONGEST else b""
    if len(data) != length:
        raise ValueError("a string runs past the end")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _scalar(file, SCALARS[kind])
    item, count = _scalar(file, "<I"), _scalar(file, "<Q")
    if count > LONGEST:
        raise ValueError("an array runs past the end")
    if item in (STRING, ARRAY):
        return [_value(file, item) for _ in range(count)]
    code = SCALARS[item]
    return list(struct.unpack(f"<{count}{code[1]}", file.read(count * struct.calcsize(code))))


def _bytes_of(name: str, shape: list[int], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    weights = 1
    for extent in shape:
        weights *= extent
    if weights % block:
        raise ValueError(f"{name} has {weights} weights, no multiple of its block of {block}")
    return weights // block * block_bytes


def tokenizer_of(header: Header) -> Any | None:
    """The file's byte-level BPE as a PreTrainedTokenizerFast, or None when it holds another kind of tokenizer.

    transformers 4.57 reads these tokens as a LlamaTokenizer, and such a tokenizer once saved is read wrongly by
    transformers 5 and onnxruntime-genai (perplexity 105 instead of 26 on SmolLM2); the class here is the one that
    every reader takes literally. The ids are those of transformers 4.57, whose published figures for such files they
    are: for llama files the first token of a text is BOS, whatever `add_bos_token` says. Special tokens are the ones
    that the file names (4.57 takes BOS for EOS), and decoding inverts encoding exactly.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    get: Callable[..., Any] = header.metadata.get
    architecture = get("general.architecture")
    if get("tokenizer.ggml.model") != "gpt2" or get("tokenizer.ggml.pre", "default") not in GPT2_SPLITTING:
        return None
    tokens: list[str] = get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    kinds = get("tokenizer.ggml.token_type", [])
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()

    ids = {role: get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    special = {role: tokens[i] for role, i in ids.items() if i is not None}
    if architecture == "llama" and "bos_token" in special:
        bos, i = special["bos_token"], ids["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, i)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=get(f"{architecture}.context_length", int(1e30)),
        **special,
    )
    tokenizer.chat_template = get("tokenizer.chat_template")
    return tokenizer


_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
