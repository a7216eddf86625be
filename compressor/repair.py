"""Which input channels of a linear can go, and what the others then do in their place.

y = W a with W [N, K] and H = mean of a aᵀ [K, K]; S are the channels that stay. The error of a stored W' [N, |S|] is
E‖W a − W' a_S‖² = tr((W − W'E) H (W − W'E)ᵀ), E the rows S of the identity, and it is least for

    W' = W H_{:S} H_SS⁻¹                                   `least_squares`

`eliminate` takes channels away one after another (or some at a time), each time those whose absence, everything that
stays having made up for it, costs least: ‖W_j‖² / [H⁻¹]_jj, OBS for a whole column (Hassibi & Stork 1993; for
structures, Kurtic et al. 2023, "ZipLM"). Both are closed forms of one Gram matrix: no gradient, no second look at the
text.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean of H's diagonal, added to it: calibration text is finite


def damped(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """H + λ I in float64, λ = ridge times the mean of the diagonal; I alone where H is zero."""
    h = gram.double()
    mean = h.diagonal().mean()
    return h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (ridge * mean if mean > 0 else 1.0)


def least_squares(weight: Tensor, gram: Tensor, keep: Tensor, ridge: float = RIDGE) -> Tensor:
    """W' [N, M] for the channels keep [M], float32: least squares, drawn towards W[:, keep] by the ridge."""
    h = damped(gram, ridge).to(weight.device)
    keep = keep.to(weight.device)
    return torch.linalg.solve(h[keep][:, keep], h[keep] @ weight.detach().double().T).T.float()


def mean_bias(weight: Tensor, mean: Tensor, keep: Tensor) -> Tensor:
    """Σ over the channels that go of W_j E[a_j], [N]: added to the bias, the mean of y is kept (FLAP)."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[keep] = False
    gone = gone.to(weight.device)
    return (weight.detach().double()[:, gone] @ mean.double().to(weight.device)[gone]).float()


def eliminate(
    weight: Tensor, gram: Tensor, importance: Tensor | None = None, at_once: int = 8, least: int = 1
) -> tuple[Tensor, Tensor]:
    """(order [K − least] of channels by when they go, cost [K − least + 1] of removing the first 0, 1, … of them).

    importance   [N], the weight of an error in each output; 1 where None
    at_once      channels that go before H⁻¹ and W are brought up to date; costs are exact at its multiples and
                 interpolated between them
    least        channels that are never looked at
    """
    w = weight.detach().double()
    inverse = torch.linalg.inv(damped(gram).to(w.device))
    scale = torch.ones(len(w), dtype=w.dtype) if importance is None else importance.double()
    scale = scale.to(w.device)[:, None]
    left = torch.arange(w.shape[1], device=w.device)
    order: list[Tensor] = [left[:0]]
    costs = [0.0]
    while len(left) > least:
        score = (w.square() * scale).sum(0) / inverse.diagonal()
        go = score.argsort(stable=True)[: min(at_once, len(left) - least)]
        stay = torch.ones(len(left), dtype=torch.bool, device=w.device)
        stay[go] = False
        spread = torch.linalg.solve(inverse[go][:, go], inverse[go])  # [M, K]: what the rest takes over
        rise = (torch.linalg.solve(inverse[go][:, go], w[:, go].T).T * w[:, go] * scale).sum().item()
        costs += [costs[-1] + rise * (i + 1) / len(go) for i in range(len(go))]
        order.append(left[go])
        w = (w - w[:, go] @ spread)[:, stay]
        inverse = (inverse - inverse[:, go] @ spread)[stay][:, stay]
        left = left[stay]
    return torch.cat(order).cpu(), torch.tensor(costs, dtype=torch.float64)
