"""The rows of bench/quality.py: each has a recipe that loads and is compared with another, in no circle."""

import importlib.util
from pathlib import Path

from compressor import Recipe

PATH = Path(__file__).resolve().parents[1] / "bench" / "quality.py"


def test_every_row_has_a_recipe_and_its_references_end():
    spec = importlib.util.spec_from_file_location("quality", PATH)
    assert spec is not None and spec.loader is not None
    quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quality)
    for name, (recipe, overrides, reference) in quality.ROWS.items():
        Recipe.load(recipe, overrides)
        seen = [name]
        while reference is not None:
            assert reference not in seen, f"{name} is compared with {reference} in a circle"
            seen.append(reference)
            reference = quality.ROWS[reference][2]
