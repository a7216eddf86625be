"""Running a module of ours in a process of its own, and the most memory a process ever held."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def run_module(module: str, *arguments: str) -> str | None:
    """`python -m module arguments...`, waited for: None when it went well, else why not, in one line.

    What it prints is held back. An interrupt ends it as well.
    """
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.returncode == 0:
        return None
    if run.returncode < 0:
        return f"ended by {signal.Signals(-run.returncode).name}"
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {run.returncode}"


def peak_bytes() -> int | None:
    """Most memory this process ever held; None where the system does not count it.

    Linux: VmHWM, which starts anew with the program. ru_maxrss does not: a small program that a large one starts
    inherits the large one's figure.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
