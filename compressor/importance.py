"""How much each channel of a feed-forward layer matters: the scores that pruning ranks, inside one block only.

Channel j has the activation a_j, a column of down W_d [N, K], and a row in each producer, W_g and W_u [K, H].

    out_energy   ‖W_d,j‖₂ · RMS(a_j)                    the RMS of the term that goes
    obs          when it goes, if each time those go that the others can best make up for (repair.eliminate)
    flap         Var(a_j) · ‖W_d,j‖²                    WIFV of FLAP: the mean is made up for by a bias
    wanda_sp     mean_i |W_d,ij| · RMS(a_j)
    cfsp_rel     RMS(a_j) · Σ_i [R(|W_d| RMS(a)) + R(|W_g|ᵀ) + R(|W_u|ᵀ)]_ij with R(M)_ij = M_ij / Σ_j M_ij
    cfsp_code    RMS(a_j)                               what the released code of CFSP computes: its columns are divided
                                                        by their own sums, so that the weights cancel
    magnitude    Σ |W| of the channel's column and rows
    random
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from compressor.repair import eliminate

Score = Literal["out_energy", "obs", "flap", "wanda_sp", "cfsp_rel", "cfsp_code", "magnitude", "random"]
SCORES: tuple[Score, ...] = get_args(Score)
ROUNDS = 96  # in which all channels would go


@dataclass(frozen=True)
class Channels:
    """What scores are made of. down [N, K]; gram [K, K], mean of a aᵀ; mean [K] of a; producers (weight [R, H], the
    channel of each row [R]); least: how many channels stay in any case, among which obs does not choose."""

    down: Tensor
    gram: Tensor
    mean: Tensor
    producers: tuple[tuple[Tensor, Tensor], ...] = ()
    least: int = 1


def scores(kind: Score, of: Channels, generator: torch.Generator) -> Tensor:
    """[K] float32 on the CPU, 0 or more; larger is more important."""
    return SCORE[kind](of, generator).float().cpu()


def unit_energies(weight: Tensor, gram: Tensor, columns: Tensor, units: int) -> Tensor:
    """[units] mean square of each unit's own term in y = W a: weight [N, K], gram [K, K], columns [K] their unit."""
    energies = []
    for unit in range(units):
        own = (columns == unit).nonzero()[:, 0]  # indices on the CPU suit tensors of any device
        part = weight[:, own].double()
        energies.append(((part @ gram[own][:, own].to(part)) * part).sum())
    return torch.stack(energies).cpu()


def _rms(of: Channels) -> Tensor:
    return of.gram.diagonal().double().clamp_min(0).sqrt()


def _down(of: Channels) -> Tensor:
    return of.down.detach().double()


def _out_energy(of: Channels, _: torch.Generator) -> Tensor:
    return _down(of).norm(dim=0) * _rms(of)


def _obs(of: Channels, _: torch.Generator) -> Tensor:
    count = of.down.shape[1]
    order, _costs = eliminate(of.down, of.gram, at_once=max(1, count // ROUNDS), least=max(1, of.least))
    place = torch.full((count,), count)
    place[order] = torch.arange(len(order))
    return place


def _flap(of: Channels, _: torch.Generator) -> Tensor:
    variance = (of.gram.diagonal().double() - of.mean.double().square()).clamp_min(0)
    return variance * _down(of).square().sum(0)


def _wanda_sp(of: Channels, _: torch.Generator) -> Tensor:
    return _down(of).abs().mean(0) * _rms(of)


def _cfsp_rel(of: Channels, _: torch.Generator) -> Tensor:
    total = _share(_down(of).abs() * _rms(of)).sum(0)
    for weight, channel in of.producers:
        total.index_add_(0, channel.to(total.device), _share(weight.detach().double().abs().T).sum(0))
    return _rms(of) * total


def _cfsp_code(of: Channels, _: torch.Generator) -> Tensor:
    return _rms(of)


def _magnitude(of: Channels, _: torch.Generator) -> Tensor:
    total = _down(of).abs().sum(0)
    for weight, channel in of.producers:
        total.index_add_(0, channel.to(total.device), weight.detach().double().abs().sum(1))
    return total


def _random(of: Channels, generator: torch.Generator) -> Tensor:
    return torch.rand(of.down.shape[1], generator=generator)


def _share(m: Tensor) -> Tensor:
    """Each row of m [., K] over its sum."""
    return m / m.sum(1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)


SCORE: Mapping[Score, Callable[[Channels, torch.Generator], Tensor]] = {
    "out_energy": _out_energy,
    "obs": _obs,
    "flap": _flap,
    "wanda_sp": _wanda_sp,
    "cfsp_rel": _cfsp_rel,
    "cfsp_code": _cfsp_code,
    "magnitude": _magnitude,
    "random": _random,
}
