"""Tokenizers by source, with the class that was saved taken with a pinch of salt.

A folder may name a tokenizer class that does not fit its tokenizer.json (see gguf_file.tokenizer_of); the versions of
transformers then disagree, silently. tokenizer.json is the reference: where the class splits text differently, the file
is read as PreTrainedTokenizerFast, which takes it literally.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.errors import ModelError
from compressor.gguf_file import tokenizer_of
from compressor.source import Place, find

PROBE = "Hello  world, it's 12345 naïve\n\n\tcafé — 日本語 don't x=y_1;  END"


def load_tokenizer(source: str | Path | None) -> Any:
    """The tokenizer of a folder, hub id, .gguf file or demo name. Raises ModelError when it is missing or damaged."""
    name, place = find(source)
    if not place.has_tokenizer:
        raise ModelError(f"{name}: no tokenizer.json or other tokenizer is there; copy the original model's into it.")
    return tokenizer_at(name, place)


def tokenizer_at(name: str, place: Place) -> Any:
    """As `load_tokenizer`, for a place that has one."""
    from transformers import AutoTokenizer

    try:
        if place.header is not None and (ours := tokenizer_of(place.header)) is not None:
            return ours
        folder, options = place.arguments()
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if place.gguf:
            return _literal(tokenizer, tokenizer.backend_tokenizer)
        file = place.folder / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            backend = Tokenizer.from_file(str(file))
            if _ids(backend) != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
                return _literal(tokenizer, backend)
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"{name}: the tokenizer cannot be read ({first}); download its files again.") from None


def _ids(backend: Any) -> list[int]:
    return backend.encode(PROBE, add_special_tokens=False).ids


def _literal(tokenizer: Any, backend: Any) -> Any:
    """`backend` as it is, with the special tokens and settings of `tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    literal = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )
    literal.chat_template = tokenizer.chat_template
    return literal
