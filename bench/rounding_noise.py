"""How far a model with rounded activations is from itself: float32 against float64 sums in its linears.

    .venv/bin/python bench/rounding_noise.py OUT --text wikitext2/test.txt

The measurement behind docs/verify.md.
"""

from __future__ import annotations

import argparse

from compressor import load
from compressor.data import text_of, windows
from compressor.evaluate import torch_runner
from compressor.layers import QuantLinear
from compressor.verify_runtimes import jumps, smooth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", required=True)
    arguments = parser.parse_args()
    artifact = load(arguments.folder)
    ids = windows(artifact.tokenizer, text_of(arguments.text)[0], 1, 512)
    for rounding in (False, True) if jumps(artifact) else (False,):
        single, double = artifact.model(dense=True), artifact.model(dense=True)
        for module in double.modules():
            if isinstance(module, QuantLinear) and module.dense is not None:
                module.dense = module.dense.double()
        if not rounding:
            single, double = smooth(single), smooth(double)
        a, b = torch_runner(single)(ids), torch_runner(double)(ids)
        agree = (a.argmax(-1) == b.argmax(-1)).float().mean()
        print(
            f"activations {'rounded' if rounding else 'as they are'}: "
            f"max |difference| / max |logit| {(a - b).abs().max() / a.abs().max():.1e}, same argmax {agree:.1%}"
        )


if __name__ == "__main__":
    main()
