"""Text for calibration and evaluation, and the token windows cut from it.

One text, tokenized once, cut into consecutive windows: nothing is shuffled, so the same text gives the same windows
everywhere. Left out: chat templates, mixing of several sources, weighting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^:\s]+))?")
HUB_CHARACTERS = 8_000_000  # about 2 M tokens; a hub dataset can be larger than the disk
SHIPPED_PROSE = "Python's own documentation (better: pass text like your real data with --data)"
BETWEEN = "\n\n"  # between two rows of a table


def text_of(source: str | Path | None) -> tuple[str, str]:
    """The text behind `source`, and one line that says what it is.

    None: prose that every Python ships. A file: `.jsonl` and `.parquet` are tables with a `text` column (a `.jsonl`
    row may hold chat `messages` instead), all else is UTF-8 text. Otherwise a hub dataset, `org/name[/config][:split]`.
    Raises DataError when there is no such text, when it cannot be decoded, and when it is empty.
    """
    if source is None:
        text, description = _shipped_prose(), SHIPPED_PROSE
    elif (path := Path(source)).exists():
        text, description = _file_text(path), str(source)
    elif (hub := HUB_ID.fullmatch(str(source))) and path.suffix not in {".txt", ".md", ".jsonl", ".parquet"}:
        text, description = _hub_text(hub["name"], hub["config"], hub["split"] or "train"), f"hub dataset {source}"
    else:
        raise DataError(
            f"{source}: no such file; pass a text, .jsonl or .parquet file, "
            "or a hub dataset as org/name[/config][:split]."
        )
    if not text.strip():
        raise DataError(f"{source}: the text is empty; pass a file with some prose in it.")
    return text, description


def windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """The first `count` consecutive windows of `length` tokens, int64 [S, length] with 1 <= S <= count.

    The whole text is tokenized once, with the tokenizer's default special tokens. S < count when the text ends earlier:
    the caller sees it in the shape. Raises DataError when the text does not fill even one window.
    """
    tokens: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    found = min(count, len(tokens) // length)
    if found < 1:
        raise DataError(
            f"the text is too short: {len(tokens)} tokens found, {length} needed for one window "
            f"({count * length} for {count}); pass a longer text or shorter windows."
        )
    return torch.tensor(tokens[: found * length], dtype=torch.int64).view(found, length)


def _shipped_prose() -> str:
    from pydoc_data.topics import topics

    return BETWEEN.join(topics[name] for name in sorted(topics))


def _file_text(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; pass one text, .jsonl or .parquet file.")
    if path.suffix == ".parquet":
        return _parquet_text(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if b"\0" in raw[:65536] or raw.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: is a binary file; pass plain text, .jsonl or .parquet.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: is not UTF-8 text; save it as UTF-8.") from error
    return _jsonl_text(path, text) if path.suffix == ".jsonl" else text


def _jsonl_text(path: Path, lines: str) -> str:
    rows = []
    for number, line in enumerate(lines.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_row_text(f"{path} line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number}: is not valid JSON ({error.msg}).") from error
    return BETWEEN.join(rows)


def _row_text(where: str, row: object) -> str:
    """`text` as it is, chat `messages` as their contents in order."""
    match row:
        case {"text": str(text)}:
            return text
        case {"messages": [*messages]} if all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        ):
            return BETWEEN.join(message["content"] for message in messages)
        case dict():
            raise DataError(
                f"{where}: no field 'text' and no chat 'messages' with text contents; "
                f"found: {', '.join(map(str, row)) or 'nothing'}; rename the one to use to 'text'."
            )
    raise DataError(f"{where}: holds a {type(row).__name__}, not an object with a field 'text'.")


def _parquet_text(path: Path) -> str:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow; run: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                found = ", ".join(columns) or "nothing"
                raise DataError(f"{path}: no column 'text'; found: {found}; rename the one to use to 'text'.")
            return _joined(str(path), file.read(columns=["text"]).column("text").to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({_first_line(error)}).") from error


def _hub_text(name: str, config: str | None, split: str) -> str:
    """The first HUB_CHARACTERS of column `text`, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: no such file, and hub datasets need `datasets`; run: pip install datasets") from error
    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
        texts, size = [], 0
        for row in rows:
            if "text" not in row:
                raise DataError(
                    f"{name}: no column 'text'; found: {', '.join(row)}; save the one to use as a text file."
                )
            texts.append(row["text"])
            size += len(str(row["text"]))
            if size >= HUB_CHARACTERS:
                break
    except DataError:
        raise
    except Exception as error:  # the library raises a zoo: offline, unknown id, gated, unknown config or split
        raise DataError(
            f"{name}: no such file, and not loadable from the hub ({type(error).__name__}: {_first_line(error)}); "
            "check the id, config and split, or pass a local file."
        ) from error
    return _joined(name, texts)


def _joined(where: str, rows: Iterable[object]) -> str:
    """Rows in order; null rows are left out."""
    texts = [row for row in rows if row is not None]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{where}: column 'text' holds {type(text).__name__} values, not text.")
    return BETWEEN.join(texts)  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200].rstrip(".")
