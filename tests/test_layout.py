"""The folders at the root are part of the package without becoming packages of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["kernels", "exporters", "recipes"])
def test_linked_folders_are_relative_links_without_init(name):
    link = ROOT / "compressor" / name
    assert link.is_symlink() and str(link.readlink()) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()


def test_an_installed_package_named_kernels_is_not_shadowed(tmp_path):
    """Run from the root, `import kernels` must find Hugging Face's package and not our folder."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("owner = 'hugging face'\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.owner)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "hugging face"


def test_importing_the_package_costs_no_torch():
    program = "import sys, compressor, compressor.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
