"""Every error a user can cause, one sentence each; the command line prints the sentence and exits non-zero.

    CompressorError            exit code
    ├── RecipeError                2   unknown recipe, method, option or value; malformed YAML; bad flag
    ├── ModelError                 3   not a model, missing or damaged weight file, unsupported structure
    ├── DataError                  4   text missing, empty or too short
    ├── NumericsError              5   NaN or Inf in weights or activations
    ├── OutputError                6   folder exists, disk full, not writable
    └── VerificationError          7   what was written is not what was measured

A message says where, what was found, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressorError(Exception):
    exit_code = 1


class RecipeError(CompressorError):
    exit_code = 2


class ModelError(CompressorError):
    exit_code = 3


class DataError(CompressorError):
    exit_code = 4


class NumericsError(CompressorError):
    exit_code = 5


class OutputError(CompressorError):
    exit_code = 6


class VerificationError(CompressorError):
    exit_code = 7


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an unknown-name message: the nearest match, if any, then everything that is allowed."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{match[0]}'? " if match else ""
    return f"{hint}Allowed: {', '.join(names)}."
