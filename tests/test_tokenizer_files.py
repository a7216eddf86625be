"""Tokenizer files: what is written, that it reads back alike, and that a wrong class or a changed file is noticed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compressor.errors import VerificationError
from compressor.exporters.tokenizer_files import DECOMPOSED, PROBE, differences, export, same_tokens

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [PROBE, DECOMPOSED, "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9"] * 4


def byte_level() -> Any:
    """GPT-2 and Qwen style: bytes, a splitting pattern, NFC, control tokens in use by a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = TEMPLATE
    return made


def converted(*more: str) -> Any:
    """Bytes with the decoder that transformers gives a vocabulary from a .gguf file; more: tokens."""
    backend = byte_level().backend_tokenizer
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_tokens([*more])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|endoftext|>")


def sentence_piece() -> Any:
    """Llama 2 style: spaces become ▁, unknown characters bytes, BOS in front."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXT[:1] * 9, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    content = json.loads(backend.to_str())
    content["pre_tokenizer"], content["added_tokens"] = None, []
    backend = Tokenizer.from_str(json.dumps(content))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    """BERT style: lower case, CLS and SEP, token types for pairs."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, model_input_names=names, **roles)


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "converted": converted,
    "sentence piece": sentence_piece,
    "word piece": word_piece,
}


def written(tokenizer: Any, folder: Path, kind: str = "causal-lm") -> list[str]:
    return [f.name for f in export(SimpleNamespace(tokenizer=tokenizer, kind=kind), folder)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_survive(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    files = written(tokenizer, tmp_path)
    assert same_tokens(tmp_path, tokenizer) == []
    assert set(files) - {"chat_template.jinja"} == {
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_bytes_lose_the_steps_of_sentence_piece_that_change_nothing(tmp_path: Path) -> None:
    """onnxruntime-genai takes a decoder that replaces "▁" for SentencePiece, and splits text in that way."""
    written(converted(), tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "ByteLevel"
    for token in ("<0x0A>", "▁a", "a b"):  # a byte for ByteFallback, a space for Replace, nothing for ByteLevel
        tokenizer = converted(token)
        written(tokenizer, tmp_path)
        decoder = json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]
        assert [step["type"] for step in decoder["decoders"]] == ["ByteFallback", "Fuse", "Replace", "ByteLevel"]
        assert same_tokens(tmp_path, tokenizer) == []


def test_moe_28m_in_onnxruntime_genai(tmp_path: Path, shared_path: Callable[..., Path]) -> None:
    from compressor.model import load_tokenizer

    genai = pytest.importorskip("onnxruntime_genai")
    tokenizer = load_tokenizer(shared_path("models", "moe-28m"))
    written(tokenizer, tmp_path)
    _smallest_genai_model(tmp_path, len(tokenizer))
    reader = genai.Tokenizer(genai.Model(str(tmp_path)))
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    assert reader.encode(PROBE).tolist() == ids and reader.decode(reader.encode(PROBE)) == PROBE
    assert tokenizer.decode(ids) == AutoTokenizer.from_pretrained(tmp_path).decode(ids)


def test_writing_twice_gives_the_same_bytes_whatever_was_called_between(tmp_path: Path) -> None:
    tokenizer = byte_level()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    files = written(tokenizer, tmp_path / "one")
    tokenizer("text", truncation=True, max_length=2)
    assert written(tokenizer, tmp_path / "two") == files
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_only_a_language_model_loses_token_types(tmp_path: Path) -> None:
    tokenizer = word_piece()
    written(tokenizer, tmp_path, "encoder")
    pair = AutoTokenizer.from_pretrained(tmp_path)("one", "two")
    assert pair["token_type_ids"] == tokenizer("one", "two")["token_type_ids"] and 1 in pair["token_type_ids"]
    written(tokenizer, tmp_path, "causal-lm")
    assert set(AutoTokenizer.from_pretrained(tmp_path)("one")) == {"input_ids", "attention_mask"}


def test_named_chat_templates_survive(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    written(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_no_tokenizer_writes_nothing(tmp_path: Path) -> None:
    assert written(None, tmp_path) == [] and not list(tmp_path.iterdir())


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "text": ("tokenizer.json", lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+")),
    "decomposed": ("tokenizer.json", lambda c: c.update(normalizer=None)),
    "decoding": ("tokenizer.json", lambda c: c.update(decoder={"type": "Fuse"})),
    "eos_token": ("tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")),
    "special tokens": ("tokenizer.json", lambda c: c["added_tokens"].pop()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_noticed(tmp_path: Path, what: str) -> None:
    tokenizer = byte_level()
    written(tokenizer, tmp_path)
    name, change = CHANGES[what]
    content = json.loads((tmp_path / name).read_text())
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    if what == "special tokens":  # both files name them
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"].pop(max(config["added_tokens_decoder"], key=int))
        config["eos_token"] = None
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "special_tokens_map.json").unlink()
    found = same_tokens(tmp_path, tokenizer)
    assert any(what in phrase for phrase in found), found


def test_a_changed_chat_template_is_noticed(tmp_path: Path) -> None:
    tokenizer = byte_level()
    written(tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + "!")
    assert same_tokens(tmp_path, tokenizer) == ["the chat template renders another text"]


def test_a_tokenizer_that_its_files_cannot_say_is_an_error(tmp_path: Path) -> None:
    class Changed(PreTrainedTokenizerFast):
        def __call__(self, text: str, *args: Any, **options: Any) -> Any:
            return super().__call__(text.upper(), *args, **options)

    base = byte_level()
    tokenizer = Changed(tokenizer_object=copy.deepcopy(base.backend_tokenizer), eos_token="<|im_end|>")
    with pytest.raises(VerificationError, match="gives other ids from token 0 on"):
        written(tokenizer, tmp_path)


@pytest.fixture
def demo() -> Any:
    from compressor.errors import ModelError
    from compressor.model import load_tokenizer

    try:
        return load_tokenizer(None)
    except ModelError as error:
        pytest.skip(str(error))


def test_demo_tokenizer(demo: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    files = written(demo, tmp_path)
    assert same_tokens(tmp_path, demo) == []
    assert sum((tmp_path / f).stat().st_size for f in files) < 4_000_000  # no second copy of the vocabulary
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("Hello  world\n42", add_special_tokens=False)["input_ids"] == [19556, 216, 905, 198, 36, 34]
    assert read.decode(read(PROBE, add_special_tokens=False)["input_ids"]) == PROBE


def test_naming_a_class_that_readers_rebuild_is_noticed(demo: Any, tmp_path: Path) -> None:
    """What transformers writes for a byte-level GGUF tokenizer; version 5 rebuilds that class by its own rules."""
    import transformers

    if transformers.__version__.startswith("4."):
        pytest.skip("version 4 reads tokenizer.json whatever the class")
    written(demo, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    assert same_tokens(tmp_path, demo)


def test_onnxruntime_genai_reads_the_same_tokens(demo: Any, tmp_path: Path) -> None:
    """On the smallest folder that it accepts as a model: one table, no attention."""
    genai = pytest.importorskip("onnxruntime_genai")
    import numpy as np

    for tokenizer, name in ((demo, "demo"), (byte_level(), "byte level")):
        folder = tmp_path / name
        folder.mkdir()
        written(tokenizer, folder)
        _smallest_genai_model(folder, len(tokenizer))
        model = genai.Model(str(folder))
        reader = genai.Tokenizer(model)
        special = "a".join(["", *sorted(set(tokenizer.all_special_tokens)), ""])
        for text in (PROBE, special):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert reader.encode(text).tolist() == ids
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        assert reader.decode(np.array(ids, dtype=np.int32)) == tokenizer.decode(ids)
        chat = [{"role": "user", "content": "Hi"}]
        ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert reader.apply_chat_template(json.dumps(chat), add_generation_prompt=True) == ours


def _smallest_genai_model(folder: Path, vocabulary: int) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    past, present = ["b", 1, "p", 4], ["b", 1, "t", 4]
    caches = ("key", "value")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["heads"]),
        *(helper.make_node("Concat", [f"past_key_values.0.{c}", "heads"], [f"present.0.{c}"], axis=2) for c in caches),
    ]
    graph = helper.make_graph(
        nodes,
        "smallest",
        [value("input_ids", TensorProto.INT64, ["b", "s"]), value("attention_mask", TensorProto.INT64, ["b", "t"])]
        + [value(f"past_key_values.0.{c}", TensorProto.FLOAT, past) for c in caches],
        [value("logits", TensorProto.FLOAT, ["b", "s", vocabulary])]
        + [value(f"present.0.{c}", TensorProto.FLOAT, present) for c in caches],
        [
            numpy_helper.from_array(np.zeros((vocabulary, 4), np.float32), "table"),
            numpy_helper.from_array(np.zeros((4, vocabulary), np.float32), "head"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    sizes = {
        "head_size": 4,
        "hidden_size": 4,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
    }
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outputs = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "inputs": inputs,
        "outputs": outputs,
    }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "context_length": 64, "vocab_size": vocabulary}
    config = {"model": {"type": "llama", **tokens, "decoder": decoder | sizes}, "search": {"max_length": 64}}
    (folder / "genai_config.json").write_text(json.dumps(config))


def test_differences_is_silent_on_equal_tokenizers() -> None:
    assert differences(byte_level(), byte_level()) == []
