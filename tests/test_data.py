"""Text sources and token windows, and the sentence each wrong one gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor.data import HUB_ID, text_of, windows
from compressor.errors import DataError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(source: object) -> str:
    with pytest.raises(DataError) as raised:
        text_of(source)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_shipped_prose_is_long_and_always_the_same():
    text, description = text_of(None)
    assert len(text) > 100_000 and "import" in text
    assert text == text_of(None)[0]
    assert "--data" in description and "\n" not in description


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "noending"])
def test_plain_text(name):
    Path(name).write_bytes("\ufeffGrüße\r\nline".encode())  # a byte order mark is not text
    assert text_of(name) == ("Grüße\r\nline", name)
    assert text_of(Path(name))[0] == "Grüße\r\nline"


def test_jsonl():
    rows = [
        {"text": "one", "id": 1},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]},
        {"text": "with \u2028 inside"},
    ]
    Path("a.jsonl").write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )
    assert text_of("a.jsonl")[0] == "one\n\ntwo\n\nthree\n\nwith \u2028 inside"


@pytest.mark.parametrize(
    ("line", "start"),
    [
        (
            '{"prompt": "a", "completion": "b"}',
            "a.jsonl line 2: no field 'text' and no chat 'messages' with text contents; found: prompt",
        ),
        ('{"text": 3}', "a.jsonl line 2: no field 'text'"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "a.jsonl line 2: no field 'text'"),
        ("{}", "a.jsonl line 2: no field 'text' and no chat 'messages' with text contents; found: nothing"),
        ("[1]", "a.jsonl line 2: holds a list"),
        ("{oops", "a.jsonl line 2: is not valid JSON"),
    ],
)
def test_jsonl_errors(line, start):
    Path("a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert error_of("a.jsonl").startswith(start)


def test_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), "a.parquet")
    assert text_of("a.parquet") == ("one\n\ntwo", "a.parquet")
    parquet.write_table(pyarrow.table({"body": ["one"], "n": [1]}), "b.parquet")
    assert error_of("b.parquet").startswith("b.parquet: no column 'text'; found: body, n;")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), "c.parquet")
    assert error_of("c.parquet") == "c.parquet: column 'text' holds int values, not text."
    Path("d.parquet").write_bytes(Path("a.parquet").read_bytes()[:-20])
    assert error_of("d.parquet").startswith("d.parquet: is not a readable Parquet file (")
    Path("e.parquet").write_bytes(b"")
    assert error_of("e.parquet").startswith("e.parquet: is not a readable Parquet file (")


def test_wrong_files():
    assert error_of("missing.txt").startswith("missing.txt: no such file; pass a text, .jsonl")
    assert error_of("org/missing.jsonl").startswith("org/missing.jsonl: no such file; pass")
    Path("folder").mkdir()
    assert error_of("folder").startswith("folder: is a folder")
    Path("a.bin").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert error_of("a.bin").startswith("a.bin: is a binary file")
    Path("a.gz").write_bytes(b"\x1f\x8b\x08abc")
    assert error_of("a.gz").startswith("a.gz: is a binary file")
    Path("latin.txt").write_bytes("one\ntwo\nGrüße".encode("latin-1"))
    assert error_of("latin.txt").startswith("latin.txt line 3: is not UTF-8 text")


@pytest.mark.parametrize("content", ["", "  \n\t\n"])
def test_empty_text(content):
    Path("a.txt").write_text(content)
    assert error_of("a.txt").startswith("a.txt: the text is empty")
    Path("a.jsonl").write_text(content)
    assert error_of("a.jsonl").startswith("a.jsonl: the text is empty")


# -- hub datasets, with a stand-in for the library: tests do not use the network


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def use(rows):
        def load_dataset(name, config, *, split, streaming):
            calls.append((name, config, split, streaming))
            if isinstance(rows, Exception):
                raise rows
            return rows

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return use


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/na.me/some-v1:validation", ("org/na.me", "some-v1", "validation")),
        ("org/name:train[:10%]", None),
    ],
)
def test_hub_names(source, asked, hub):
    calls = hub([{"text": "one"}, {"text": None}, {"text": "two"}])
    if asked is None:
        assert HUB_ID.fullmatch(source) is None
        return
    assert text_of(source) == ("one\n\ntwo", f"hub dataset {source}")
    assert calls == [(*asked, True)]


def test_hub_stops_reading(hub, monkeypatch):
    monkeypatch.setattr("compressor.data.HUB_CHARACTERS", 10)

    def endless():
        while True:
            yield {"text": "four"}

    hub(endless())
    assert text_of("org/name")[0].split() == ["four"] * 3


def test_hub_errors(hub):
    hub(ConnectionError("no route\nto host"))
    assert error_of("org/name") == (
        "org/name: no such file, and not loadable from the hub (ConnectionError: no route); "
        "check the id, config and split, or pass a local file."
    )
    hub([{"body": "x", "id": 1}])
    assert error_of("org/name").startswith("org/name: no column 'text'; found: body, id;")
    hub([])
    assert error_of("org/name").startswith("org/name: the text is empty")
    hub([{"text": 5}])
    assert "holds int values" in error_of("org/name")


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("org/name").endswith("run: pip install datasets")


# -- windows


class Characters:
    """One token a character after a start token: the count of tokens is known."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        self.options = options
        return {"input_ids": [1, *map(ord, text)]}


def test_windows_are_consecutive_and_first():
    cut = windows(Characters(), "abcdefghijk", 2, 4)
    assert cut.dtype == torch.int64
    assert cut.tolist() == [[1, *map(ord, "abc")], list(map(ord, "defg"))]


def test_fewer_windows_than_asked_are_seen_in_the_shape():
    assert windows(Characters(), "abcdefghijk", 100, 4).shape == (3, 4)
    assert windows(Characters(), "abc", 100, 4).shape == (1, 4)


def test_too_short():
    with pytest.raises(DataError) as raised:
        windows(Characters(), "ab", 8, 4)
    assert str(raised.value) == (
        "the text is too short: 3 tokens found, 4 needed for one window (32 for 8); "
        "pass a longer text or shorter windows."
    )


def test_special_tokens_are_the_tokenizers_own_choice(recwarn):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "[UNK]": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    processors = tokenizers.processors
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=4)
    assert windows(tokenizer, "a a b a", 2, 3).tolist() == [[0, 2, 2], [3, 2, 1]]
    assert not recwarn.list  # longer than model_max_length is the normal case here
