"""The library of fused CPU ops beside a model: what `compress ops` says and does.

onnxruntime-genai loads a custom-op library only from the model's folder or the working directory, and a folder that
names one does not load without it. So a folder names none until it is asked to (`place`), and `remove` undoes that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compressor.errors import ModelError
from compressor.folder import read_manifest, sha256, write_manifest
from compressor.kernels import native

CONFIG = "genai_config.json"
KEY = "custom_ops_library"


def place(folder: str | Path) -> Path:
    """Copy the library into a folder and name it in its genai_config.json. Raises ModelError, CompressorError.

    The manifest learns the new hashes, so that the folder still verifies.
    """
    folder, source = Path(folder), native.path()
    config = _config(folder)
    target = folder / source.name
    partial = folder / f".{source.name}.partial"
    shutil.copyfile(source, partial)
    partial.replace(target)  # never over a file that a running session may have mapped
    config["model"]["decoder"]["session_options"][KEY] = source.name
    _rewrite(folder, config, target)
    return target


def remove(folder: str | Path) -> None:
    """Undo `place`: the folder runs through its function bodies again. Raises ModelError."""
    folder = Path(folder)
    config = _config(folder)
    name = config["model"]["decoder"]["session_options"].pop(KEY, native.NAME)
    (folder / name).unlink(missing_ok=True)
    _rewrite(folder, config, folder / name)


def _config(folder: Path) -> dict[str, Any]:
    read_manifest(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}: onnxruntime-genai runs language models exported to ONNX only.")
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return content


def _rewrite(folder: Path, config: dict[str, Any], library: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    manifest = read_manifest(folder)
    manifest["files"][CONFIG] = sha256(folder / CONFIG)
    if library.is_file():
        manifest["files"][library.name] = sha256(library)
    else:
        manifest["files"].pop(library.name, None)
    write_manifest(folder, manifest)
