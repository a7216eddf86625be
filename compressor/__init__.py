"""Compress a language model with a short recipe into one folder that inference runtimes load.

from compressor import Recipe, compress, load

artifact = compress("path/to/model", "w4a4")
artifact.save("out")
model = load("out").model()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.artifact import Artifact
    from compressor.folder import load
    from compressor.kernels.native import register_ops
    from compressor.pipeline import compress
    from compressor.recipe import Recipe
    from compressor.transformers_loader import register_transformers

__all__ = ["Artifact", "Recipe", "compress", "load", "register_ops", "register_transformers"]

_HOME = {
    "Artifact": "compressor.artifact",
    "Recipe": "compressor.recipe",
    "compress": "compressor.pipeline",
    "load": "compressor.folder",
    "register_ops": "compressor.kernels.native",
    "register_transformers": "compressor.transformers_loader",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds that `compress --help` should not cost."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
