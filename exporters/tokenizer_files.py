"""The tokenizer's files, written so that every reader splits text alike.

tokenizer.json says everything about a fast tokenizer; readers disagree only through the class that the file
tokenizer_config.json names. transformers 5 rebuilds some classes (a LlamaTokenizer) by its own rules, version 4 doesn't
know version 5's names, onnxruntime-genai has a list of its own. `PreTrainedTokenizerFast` is the class that all of them
know and take literally, so that is what is written, with the few settings that a class would have implied. Vocabulary
copies (vocab.json, tokenizer.model) are left out: nobody reads them beside tokenizer.json. A tokenizer without a fast
backend is written as transformers writes it.

A tokenizer of bytes whose decoder also has SentencePiece's steps, as converters write it, loses them where they have
nothing to do: onnxruntime-genai takes a decoder that replaces "▁" for SentencePiece and then splits text in that way
(onnxruntime-extensions, LoadSpmModelParams in bpe_kernels.cc).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import VerificationError

if TYPE_CHECKING:
    from compressor.artifact import Artifact

CLASS = "PreTrainedTokenizerFast"
# Runs of spaces, line ends, contractions, digits, punctuation, accents, scripts without spaces, emoji. Every runtime is
# held to it; decomposed accents are apart, because onnxruntime-genai does no Unicode normalisation.
PROBE = (
    "Hello  world, it's 12345 naïve\n\n\tcafé — 日本語 Привет مرحبا 🙂 don't x=y_1;"
    "  def f(a):\r\n    return 3.14   END "
)
DECOMPOSED = "cafe\u0301 A\u030angstro\u0308m"
_TURNS = (("user", "Hi there"), ("assistant", "Yes?"), ("user", "Bye"))
_CHAT = [{"role": role, "content": content} for role, content in _TURNS]


def export(artifact: Artifact, folder: Path) -> list[Path]:
    """Write the tokenizer, if there is one, and read it back. Raises VerificationError when it is another then."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = artifact.tokenizer
    if tokenizer is None:
        return []
    fast = getattr(tokenizer, "backend_tokenizer", None) is not None
    if fast:
        files = _write_fast(tokenizer, folder, text_only=artifact.kind == "causal-lm")
    else:
        files = [Path(f) for f in tokenizer.save_pretrained(folder)]
    written = AutoTokenizer.from_pretrained(folder)
    if fast and type(written) is not PreTrainedTokenizerFast:
        # transformers 5 forces its own class on some model types (qwen2); whether that class splits alike is for
        # verification to say, here it is whether the files are right.
        written = PreTrainedTokenizerFast.from_pretrained(folder)
    if found := differences(tokenizer, written):
        raise VerificationError(
            f"the tokenizer does not survive writing: read back, {found[0]}; pass the tokenizer that "
            f"AutoTokenizer.from_pretrained gives for the original model."
        )
    return sorted({f for f in files if f.is_file()})


def same_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """What the folder's tokenizer, as transformers reads it, does differently from `tokenizer`; empty when nothing."""
    from transformers import AutoTokenizer

    return differences(tokenizer, AutoTokenizer.from_pretrained(folder))


def differences(tokenizer: Any, other: Any) -> list[str]:
    """What `other` does differently from `tokenizer`, one phrase each: ids with and without special tokens, decoding,
    special tokens by role and inside text, a pair of texts, and the chat template."""
    special = sorted(set(tokenizer.all_special_tokens))
    texts = {
        "text": PROBE,
        "text with decomposed accents": DECOMPOSED,
        "text with special tokens": "a".join(["", *special, ""]),
        "empty text": "",
    }
    found = []
    for what, text in texts.items():
        for add in (True, False):
            ours = tokenizer(text, add_special_tokens=add)["input_ids"]
            theirs = other(text, add_special_tokens=add)["input_ids"]
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
                found.append(f"{what} gives other ids from token {at} on (add_special_tokens={add})")
    ids = tokenizer(PROBE)["input_ids"]
    for skip in (True, False):
        if tokenizer.decode(ids, skip_special_tokens=skip) != other.decode(ids, skip_special_tokens=skip):
            found.append(f"decoding gives another text (skip_special_tokens={skip})")
    if tokenizer("one", "two")["input_ids"] != other("one", "two")["input_ids"]:
        found.append("a pair of texts gives other ids")
    for role in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"):
        ours, theirs = getattr(tokenizer, f"{role}_token"), getattr(other, f"{role}_token")
        if ours != theirs or getattr(tokenizer, f"{role}_token_id") != getattr(other, f"{role}_token_id"):
            found.append(f"{role}_token is {theirs} instead of {ours}")
    if set(tokenizer.all_special_tokens) != set(other.all_special_tokens):
        found.append("the set of special tokens is another")
    if _chat(tokenizer) != _chat(other):
        found.append("the chat template renders another text")
    return found


def _write_fast(tokenizer: Any, folder: Path, text_only: bool) -> list[Path]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call of the tokenizer; whoever tokenizes next sets its own.
    backend["truncation"] = backend["padding"] = None
    backend["decoder"] = _decoder(backend)
    special: dict[str, Any] = {r: t for r, t in tokenizer.special_tokens_map.items() if isinstance(t, str)}
    if extra := [t for t in tokenizer.all_special_tokens if t not in special.values()]:
        special["additional_special_tokens"] = extra
    inputs = tokenizer.model_input_names
    if text_only:  # generate() refuses inputs that the model does not take
        inputs = [name for name in inputs if name != "token_type_ids"]
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in backend["added_tokens"]}
    config = {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "model_input_names": list(inputs),
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "tokenizer_class": CLASS,
        "truncation_side": tokenizer.truncation_side,
        **special,
    }
    files = [_json(folder / "tokenizer.json", backend, None), _json(folder / "special_tokens_map.json", special, 2)]
    template = tokenizer.chat_template
    if isinstance(template, str):
        files.append(folder / "chat_template.jinja")
        files[-1].write_text(template, encoding="utf-8", newline="")
    elif template:
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    return [*files, _json(folder / "tokenizer_config.json", config, 2)]


def _decoder(backend: dict[str, Any]) -> dict[str, Any] | None:
    """The decoder of a tokenizer.json; only its ByteLevel where the steps before it find nothing to change."""
    from tokenizers.pre_tokenizers import ByteLevel

    decoder, vocabulary = backend["decoder"], backend["model"].get("vocab")
    steps = (decoder or {}).get("decoders") or [{"type": None}]
    if steps[-1]["type"] != "ByteLevel" or not isinstance(vocabulary, dict):
        return decoder
    tokens = {*vocabulary, *(token["content"] for token in backend["added_tokens"])}
    letters = {*ByteLevel.alphabet()}
    if not letters.issuperset("".join(tokens)):  # a joined text that is not all bytes stays as it is, a token may not
        return decoder
    idle: dict[str, Callable[[Any], bool]] = {
        "Fuse": lambda step: True,  # ByteLevel joins tokens by itself
        "ByteFallback": lambda step: not any(re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) for token in tokens),
        "Replace": lambda step: not letters.issuperset(step["pattern"].get("String", "")),
    }
    return steps[-1] if all(idle.get(step["type"], lambda _: False)(step) for step in steps[:-1]) else decoder


def _chat(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, for instance on roles they do not know
        return f"{type(error).__name__}: {error}"


def _json(path: Path, content: Any, indent: int | None) -> Path:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    return path
