"""CETT: thresholds that cost every layer the same share of its output, as large as perplexity allows. See
docs/r_sparse.md; what CETT and PPL-p % are is compressor/cett.py.

Meant for what reads the neurons of feed-forward layers, `targets: ["*.down_proj"]`. The first half of the calibration
windows gives the thresholds, the second says what they cost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from compressor import cett
from compressor.calibrate import calibrate
from compressor.errors import ModelError
from compressor.layers import hadamard_of
from compressor.model import linears
from compressor.prunable import to_bf16
from compressor.run import Run
from compressor.sparse import SparseLinear
from compressor.sparsity import Activations


@dataclass(frozen=True)
class CETT:
    """`ppl`: per cent that perplexity may rise; or `cett`, the share of its output that a layer loses, and no search.

    tokens: as of r_sparse.
    """

    ppl: float | None = 1.0
    cett: float | None = None
    tokens: Literal["decode", "all"] = "decode"

    def __post_init__(self) -> None:
        if (self.ppl is None) == (self.cett is None):
            raise ValueError("either ppl or cett must be a number, and the other null")
        if self.ppl is not None and not self.ppl > 0:
            raise ValueError(f"ppl {self.ppl:g} must be above 0 per cent; 1 is usual")
        if self.cett is not None and not 0 <= self.cett <= 1:
            raise ValueError(f"cett {self.cett:g} is not a share; give a number from 0 to 1")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """SparseLinears in place of all."""
        for name, layer in linears(model).items():
            if name in names:
                n, k = layer.weight.shape
                sparse = SparseLinear.shaped(n, k, self.tokens, bias=layer.bias is not None)
                model.set_submodule(name, sparse)

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Raises DataError where there are too few windows, ModelError for a rotated input."""
        ordered = [name for name in linears(model) if name in names]
        for name in ordered:
            if hadamard_of(model.get_submodule(name)):
                raise ModelError(f"{name}: its input is rotated, and the threshold is not; put rotate after cett.")
        to_bf16(model, ordered)
        fit, judge = cett.halves(run.windows)
        seen = calibrate(model, fit, {Activations}, ordered, run.progress, run.device, run.dtype)
        found = cett.curves(model, ordered, seen, run.progress, run.device)
        best = None
        if self.ppl is not None:
            best = cett.search(model, found, judge, self.ppl, run.progress, run.device)
        chosen = best.cett if best is not None else self.cett
        assert chosen is not None
        for name in ordered:
            layer = linears(model)[name]
            threshold = found[name].threshold(chosen).to(layer.weight.device)
            model.set_submodule(name, SparseLinear(layer, threshold, self.tokens))
        report: dict[str, Any] = {"cett": round(chosen, 5), "dip": max(one.dip for one in found.values())}
        if best is not None:
            mean = sum(best.left_out.values()) / len(best.left_out)
            report |= {"ppl_ratio": best.ratio, "left_out": best.left_out}
            report["summary"] = f"{mean:.1%} of inputs left out at CETT {chosen:.3f}, perplexity x {best.ratio:.4f}"
        return report
