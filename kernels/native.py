"""The library of fused CPU ops (kernels/ort): where it is, and its kernels for torch through ctypes.

It is built with the package where a C++ compiler is (setup.py); everything works without it, only slower.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError

FOLDER = Path(__file__).parent / "ort"
NAME = "libcompressor_ops" + (".dylib" if sys.platform == "darwin" else ".so")
MISSING = "was not built; install g++ or clang++, then: pip install --force-reinstall --no-deps compressor"


def path() -> Path:
    """The library's file. Raises CompressorError where it was not built."""
    file = FOLDER / NAME
    if not file.is_file():
        raise CompressorError(f"the library of fused CPU ops, {file}, {MISSING}; models run without it, only slower.")
    return file.resolve()


def register_ops(session_options: Any) -> None:
    """Let sessions made with these `onnxruntime.SessionOptions` run our nodes with the fused kernels.

    Raises CompressorError where the library is missing or this onnxruntime refuses it; sessions of options on which
    it was not registered run the nodes' function bodies.
    """
    file = path()
    try:
        session_options.register_custom_ops_library(str(file))
    except Exception as error:
        reason = str(error).rpartition(" : ")[2].strip().rstrip(".")
        raise CompressorError(
            f"onnxruntime refuses {file.name}: {reason}; models run without it through their function bodies."
        ) from error


@cache
def library() -> ctypes.CDLL:
    """Loaded once. Raises CompressorError where it is missing or cannot be loaded."""
    file = path()
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise CompressorError(f"{file} cannot be loaded ({error}); install compressor again.") from error
    loaded.compressor_isa.restype = ctypes.c_char_p
    loaded.compressor_create.restype = ctypes.c_void_p
    return loaded


def isa() -> str:
    """The instruction set that its kernels use on this processor: avx512vnni, avx2 or portable."""
    return str(library().compressor_isa().decode())
