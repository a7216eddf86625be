"""Builds the library of fused CPU ops: `python kernels/ort/build.py TARGET [FLAG...]`; setup.py does the same.

Each instruction set is one file with its own flags; what runs is chosen by the processor. Needs g++ or clang++ on Linux
or macOS. Left out: Windows, and vector code for anything but x86 (such processors run isa_portable.cc).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
NAME = "libcompressor_ops" + {"darwin": ".dylib"}.get(sys.platform, ".so")
# No contraction of a*b+c and no reordering: the rounding of inputs has the same bits in every file.
FLAGS = ("-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
         "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized").split()  # fmt: skip
ISA_FLAGS = {
    "isa_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
}


class NotBuilt(Exception):
    """One sentence: why there is no library."""


def sources() -> list[Path]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sorted(path for path in FOLDER.glob("*.cc") if x86 or path.name not in ISA_FLAGS)


def build(target: Path, extra: list[str] | None = None) -> None:
    """Compile and link into `target`. Raises NotBuilt."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or sys.platform == "win32":
        raise NotBuilt("no C++ compiler was found; install g++ or clang++ and install compressor again.")
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: Path) -> str:
            out = str(Path(scratch) / f"{source.stem}.o")
            _run([compiler, *FLAGS, *ISA_FLAGS.get(source.name, []), *(extra or []), "-c", str(source), "-o", out])
            return out

        objects = list(pool.map(compiled, sources()))
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([compiler, "-shared", *(extra or []), *objects, "-o", str(target), "-pthread"])


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        line = next((text for text in run.stderr.splitlines() if "error" in text), f"exit code {run.returncode}")
        raise NotBuilt(f"{command[0]} failed: {line.strip()}")


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), sys.argv[2:])
    except NotBuilt as reason:
        sys.exit(f"error: {reason}")
