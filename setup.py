"""Builds the library of fused CPU ops along with the package; everything else is in pyproject.toml.

Without a compiler the package is complete but for that library, and one line says so.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "kernels/ort"
spec = importlib.util.spec_from_file_location("build_ops", Path(__file__).parent / SOURCES / "build.py")
ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)


class BuildOps(build_ext):
    """A plain shared library with a C interface, not a Python extension: its own name and its own build."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], ops.NAME))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        try:
            ops.build(target)
        except ops.NotBuilt as reason:
            print(f"compressor: the library of fused CPU ops was not built: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """An editable install: beside the sources, where there is something to copy."""
        for built in Path(self.build_lib).rglob(ops.NAME):
            Path(SOURCES, ops.NAME).unlink(missing_ok=True)  # never over a file that a process may have mapped
            shutil.copy(built, Path(SOURCES, ops.NAME))

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


class Wheel(bdist_wheel):
    """Any Python 3 of this platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "compressor.kernels.ort.ops",
            sources=sorted(str(p) for p in Path(SOURCES).glob("*.cc")),
            depends=sorted(str(p) for p in Path(SOURCES).glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildOps, "bdist_wheel": Wheel},
)
