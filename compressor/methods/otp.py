"""OTP: a small head in each layer learns how many of the chosen experts a token needs. See docs/moe.md.

    loss = KL(original ‖ model) + λ · share of experts kept

Huang et al. 2025, "MC#" (arXiv 2510.10962), of which only the abstract says how: Gumbel-softmax over "keep the first
j", everything else frozen. λ is not given but found: it rises while more than `keep` are kept and falls while fewer
are. New here: what is left out is stood in for by a vector for each expert, learned with the heads.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blockwise import forward, placed
from compressor.distillation import batches, distance, pace
from compressor.errors import NumericsError
from compressor.fewer_experts import Head
from compressor.methods.thinning import FEW, Layers, check_keep, hearing, kept, layers_of, run_through, thinned
from compressor.run import Run

ONE_IN = 4  # positions of a window whose logits a step looks at, others each time: logits cost most of it
HOT, COLD = 4.0, 0.5  # temperature of the choice, first and last
WARMUP = 0.05  # share of the steps
FIRST_WEIGHT, PULL = 0.05, 0.9  # λ at first, and how fast it follows
SURE = 3.0  # at first all experts are kept, by this much
HALF = 0.5  # gain at first: what is left out goes half to the experts kept, half to the vectors


@dataclass(frozen=True)
class OTP:
    """`keep`: the share of the router's choice that tokens keep on average, over all layers. `windows` of the
    calibration text are trained on, `batch` a step, `epochs` times. stand_in: with a vector for each expert."""

    keep: float = 0.8
    windows: int = 256
    epochs: int = 3
    batch: int = 4
    lr: float = 2e-3
    stand_in: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("windows", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if not self.lr > 0:
            raise ValueError(f"lr {self.lr:g} must be above 0; 2e-3 is usual")

    def outline(self, model: nn.Module, names: Collection[str]) -> None:
        """No linear changes. Raises ModelError for a model without layers of experts."""
        layers_of(model, names)

    def rewrite(self, model: nn.Module, names: Collection[str], run: Run) -> dict[str, Any]:
        """Train the heads, then shift them so that calibration text keeps the share asked for. Raises NumericsError."""
        windows = run.text(self.windows)
        losses: list[float] = []
        # What is trained is made where it is trained, so that it comes home afterwards.
        with placed(nn.ModuleList([run.original, model]), run.device):
            layers = thinned(model, layers_of(model, names), "head", self.keep, self.stand_in)
            generator = torch.Generator().manual_seed(self.seed)
            for layer in layers.values():
                _begin(layer.rule, generator, layer.get_parameter(layer.parts.router).device)
            if self.keep < 1:
                losses = self._train(model, layers, windows, run)
        if self.keep < 1:
            self._settle(model, layers, run)
        shares = kept(model, layers, run)
        mean = sum(shares.values()) / len(shares)
        part = max(1, len(losses) // 10)
        return {
            "summary": f"{mean:.1%} of {len(shares)} layers' experts kept",
            "kept": round(mean, 4),
            "steps": len(losses),
            "loss_first": round(sum(losses[:part]) / part, 5),
            "loss_last": round(sum(losses[-part:]) / part, 5),
            "layers": {name: {"kept": share} for name, share in shares.items()},
        }

    def _train(self, model: nn.Module, layers: Layers, windows: Tensor, run: Run) -> list[float]:
        """KL of every step."""
        order = batches(len(windows), self.batch, self.epochs, self.seed)
        parameters = [p for layer in layers.values() for p in layer.rule.parameters()]
        for p in parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        noise = torch.Generator(device=parameters[0].device).manual_seed(self.seed)
        chance = torch.Generator().manual_seed(self.seed)
        shares: list[Tensor] = []
        weight, losses = FIRST_WEIGHT, []
        run.progress.stage("otp", len(order))
        on = torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32)
        try:
            for number, batch in enumerate(order):
                done = number / len(order)
                optimizer.param_groups[0]["lr"] = self.lr * pace(done, WARMUP)
                for layer in layers.values():
                    layer.rule.sampled = _sampler(HOT * (COLD / HOT) ** done, noise, shares)
                shares.clear()
                text = windows[torch.tensor(batch)]
                length = text.shape[1]
                places = torch.randperm(length, generator=chance)[: -(-length // ONE_IN)].sort().values
                with torch.no_grad(), on:
                    wanted = forward(run.original, text, places)
                with on, torch.enable_grad():
                    kl = distance(forward(model, text, places), wanted)
                    share = torch.stack(shares).mean()
                    (kl + weight * share).backward()
                if not math.isfinite(loss := kl.item()):
                    raise NumericsError(f"otp: the loss is {loss} in step {number + 1}; use a smaller lr.")
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                goal = self.keep + (1 - self.keep) * max(0.0, 1 - 2 * done)
                weight = min(max(weight * math.exp(PULL * (share.item() - goal)), 1e-3), 5.0)
                losses.append(loss)
                run.progress.advance()
        finally:
            for layer in layers.values():
                layer.rule.sampled = None
            for p in parameters:
                p.requires_grad_(False)
        return losses

    @torch.no_grad()
    def _settle(self, model: nn.Module, layers: Layers, run: Run) -> None:
        """Add one number to all heads, times how many experts each output keeps, so that `keep` of them are kept."""
        heard: list[Tensor] = []

        def see(name: str, args: tuple[Tensor, ...], _: Tensor) -> None:
            heard.append(layers[name].rule.logits(*args).float().cpu())

        for _ in range(2):  # what a layer leaves out changes what those behind it see
            heard.clear()
            with hearing(layers, see):
                run_through(model, layers, run.windows[: 2 * FEW], run)
            shift = _shift(heard, self.keep)
            for layer in layers.values():
                bias = layer.rule.second_bias
                bias.data += shift * torch.arange(len(bias)).to(bias)


def _begin(rule: Head, generator: torch.Generator, device: torch.device) -> None:
    """Values of a head that keeps all experts, drawn on the CPU."""

    def drawn(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5

    values = {"view": drawn(rule.view), "first": drawn(rule.first), "first_bias": torch.zeros(rule.first_bias.shape)}
    values |= {"second": torch.zeros(rule.second.shape), "second_bias": torch.zeros(rule.second_bias.shape)}
    values["second_bias"][-1] = SURE
    if rule.table is not None:
        values |= {"table": torch.zeros(rule.table.shape), "gain": torch.full((1,), HALF)}
    for name, value in values.items():
        setattr(rule, name, nn.Parameter(value.to(device), False))


def _sampler(temperature: float, noise: torch.Generator, shares: list[Tensor]) -> Any:
    """z [T, K] -> m [T, K], 0 and 1 with the gradient of the softmax; adds the share kept to `shares`."""

    def sample(z: Tensor) -> Tensor:
        drawn = torch.rand(z.shape, generator=noise, device=z.device).clamp(1e-7, 1 - 1e-6)
        soft = ((z.float() - (-drawn.log()).log()) / temperature).softmax(-1)
        hard = torch.zeros_like(soft).scatter(1, soft.argmax(-1, keepdim=True), 1.0)
        y = hard + soft - soft.detach()
        after = y.flip(-1).cumsum(-1).flip(-1)  # Σ over j >= i
        m = torch.cat((torch.ones_like(after[:, :1]), after[:, 1:]), dim=-1)
        shares.append(m.mean())
        return m

    return sample


def _shift(heard: list[Tensor], keep: float) -> float:
    """s so that the argmax of z_j + s j, j = 0 … K − 1, is (keep K − 1) on average. heard: z [T, K] of each layer."""
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        shares = [((z + middle * torch.arange(z.shape[1])).argmax(-1) + 1.0).mean() / z.shape[1] for z in heard]
        low, high = (middle, high) if sum(shares) / len(shares) < keep else (low, middle)
    return (low + high) / 2
