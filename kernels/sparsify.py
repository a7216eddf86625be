"""compressor::sparsify — x where it is large, else 0: what a linear that skips small inputs reads.

Contract, all on one device:
    x           [..., S, K]   any float dtype; y has the same shape and dtype
    threshold   [K]           float32, >= 0: x_j stays where |x_j| > threshold_j; infinite: channel j is always 0
    tokens      "decode": rows of one token (S = 1) lose their small values, longer ones stay as they are
                "all": so do all tokens but the first of a longer row, whose values are like no other token's
                "none": nothing is lost
`reference` is the specification.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = ("decode", "all", "none")


def reference(x: Tensor, threshold: Tensor, tokens: str) -> Tensor:
    length = x.shape[-2] if x.dim() > 1 else 1
    if tokens == "none" or (tokens == "decode" and length > 1):
        return x.clone()
    keep = x.abs() > threshold.to(x.dtype)
    if length > 1:
        keep[..., 0, :] = True
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


sparsify = torch.library.custom_op("compressor::sparsify", reference, mutates_args=())


@sparsify.register_fake
def _(x, threshold, tokens):
    return torch.empty_like(x)
