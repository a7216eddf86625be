"""What routers find in one carved feed-forward layer: the share of h² that the chosen channels have, and what is lost.

    .venv/bin/python bench/moeify.py --data wikitext2/valid.txt --layers 4 12 20

Groups of channels are those of the step `moeify`; every row chooses as many experts of the same groups:

    random       any
    static       for all tokens those that add most on average
    one channel  as CMoE does: of each expert the channel nearest to its mean column says how much it adds
    fitted       the step's: least squares of log energy on the layer's input
    best         those that add most, which takes the whole layer to know

The original's inputs, the last of the windows not in the fit. h is what a channel adds to the layer's output.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from compressor.blockwise import base_of, forward
from compressor.carving import Carving, Fit, carve, energies, markers
from compressor.data import text_of, windows
from compressor.model import blocks, load_model

TEST_WINDOWS = 4


def nearest(together: Tensor, carving: Carving) -> Tensor:
    """[E] of each expert the channel whose column of A is nearest to the mean of its columns."""
    often = together.diagonal()
    far = [often[e] - 2 * together[e][:, e].mean(1) for e in carving.experts]  # D, less what all have
    return torch.stack([e[d.argmin()] for e, d in zip(carving.experts, far, strict=True)])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--data", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[12])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--splits", nargs="+", default=["16/2/10", "16/4/8", "16/8/4"], help="experts/shared/top_k")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    seen = windows(loaded.tokenizer, text_of(arguments.data)[0], arguments.windows + TEST_WINDOWS, 512)
    print("| layer | experts | router | energy | error |\n|---|---|---|---|---|")
    for number in arguments.layers:
        ffn = blocks(loaded.model)[number][1].mlp
        inputs: list[Tensor] = []
        handle = ffn.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0][0]))
        for window in seen:
            forward(base_of(loaded.model), window)
        handle.remove()
        down = ffn.down_proj.weight
        norm = down.norm(dim=0)
        x, test = torch.cat(inputs[:-TEST_WINDOWS]), torch.cat(inputs[-TEST_WINDOWS:])
        inside, told = (ffn.act_fn(ffn.gate_proj(t)) * ffn.up_proj(t) for t in (test, x))
        size, size_told = inside.abs() * norm, told.abs() * norm
        acts = markers(size_told, size.shape[1] // 48)
        together = acts.T @ acts
        for split in arguments.splits:
            experts, shared, top_k = map(int, split.split("/"))
            carving = carve(together, experts, shared)
            fit = Fit(x.shape[1], len(carving.experts))
            fit.add(x, energies(size_told, carving))
            weight, bias = fit.value()
            best = energies(size, carving)
            generator = torch.Generator().manual_seed(0)
            scores = {
                "random": torch.rand(best.shape, generator=generator),
                "static": energies(size_told, carving).mean(0).expand_as(best),
                "one channel": size[:, nearest(together, carving)],
                "fitted": test @ weight.T + bias,
                "best": best,
            }
            for name, score in scores.items():
                kept = torch.zeros_like(size)
                kept[:, carving.shared] = 1
                for chosen in score.topk(top_k, dim=1).indices.T:
                    kept.scatter_(1, carving.experts[chosen], 1.0)
                energy = ((size * kept).square().sum() / size.square().sum()).item()
                lost, whole = ((inside * gone) @ down.T for gone in (1 - kept, torch.ones_like(kept)))
                error = (lost.square().sum() / whole.square().sum()).item()
                print(f"| {number} | {split} | {name} | {energy:.3f} | {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
