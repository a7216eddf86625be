"""Tokens near a tie: how often a mixture sends one to other experts when its arithmetic rounds more (docs/verify.md).

    python bench/near_ties.py FOLDER [FOLDER ...] --text test.txt [--windows 4]

FOLDER is what compress wrote, or an original. Everything is held against float32 in torch: the same model in bf16, and
the folder's graph in stock onnxruntime where it has QMoE. A choice is one token in one layer. Printed for each: how far
the routers' inputs and the logits are off at most, of the largest value, in the part of each window before its first
other choice; how many choices are others; how far apart the last expert that is chosen and the next one are in float32
(logits of the router, median), there and everywhere; and how far logits are off on all tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.data import text_of, windows
from compressor.exporters.onnx_graph import expert_nodes
from compressor.folder import is_artifact, load
from compressor.mixtures import mixtures
from compressor.model import load_model
from compressor.runtimes import OnnxSession, expose, read_graph
from compressor.tokenizer import load_tokenizer

# ids [1, L] -> (logits [L, V], the routers' inputs by layer [L, H], who is chosen by layer, bool [L, E])
Run = Callable[[Tensor], tuple[Tensor, list[Tensor], list[Tensor]]]


def of_torch(model: nn.Module) -> Run:
    views = list(mixtures(model).values())
    seen: dict[str, Tensor] = {}
    for view in views:
        view.module.register_forward_hook(lambda _, x, __, name=view.name: seen.update({name: x[0][0]}))

    @torch.inference_mode()
    def run(ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        inputs = [seen[view.name] for view in views]
        return logits, [x.float() for x in inputs], [v.weights(x) != 0 for v, x in zip(views, inputs, strict=True)]

    return run


def of_graph(folder: Path) -> Run:
    graph = read_graph(folder)
    nodes = expert_nodes(graph)
    expose(graph, [name for own in nodes.values() for name in own[:2]])
    session = OnnxSession(folder, graph)

    def run(ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        found = {name: torch.from_numpy(value) for name, value in session.run(ids).items()}
        inputs = [found[x] for x, _, _ in nodes.values()]
        return found["logits"][0], inputs, [found[w] != 0 for _, w, _ in nodes.values()]

    return run


def compare(name: str, run: Run, base: Run, routers: list[Tensor], text: Tensor) -> None:
    """One row."""
    apart: list[float] = []
    usual: list[float] = []
    inputs, everywhere, before, choices = 0.0, 0.0, 0.0, 0
    for ids in text:
        (found, xs, ours), (expected, ys, theirs) = run(ids[None]), base(ids[None])
        error = (found - expected).abs().amax(-1) / expected.abs().max()
        other = torch.stack([(a != b).any(-1) for a, b in zip(ours, theirs, strict=True)])  # [layers, L]
        first = int(other.any(0).int().argmax()) if other.any() else len(ids)
        for x, y, router, moved, chosen in zip(xs, ys, routers, other, theirs, strict=True):
            inputs = max(inputs, ((x - y)[:first].abs().max() / y.abs().max()).item() if first else 0.0)
            scores = y @ router.T
            last = scores.masked_fill(~chosen, torch.inf).amin(-1)
            gap = last - scores.masked_fill(chosen, -torch.inf).amax(-1)
            apart += gap[moved].tolist()
            usual += gap.tolist()
        choices += other.numel()
        everywhere = max(everywhere, error.max().item())
        before = max(before, error[:first].max().item() if first else 0.0)
    there, general = (f"{torch.tensor(gaps).median():.1e}" if gaps else "" for gaps in (apart, usual))
    counts = f"{len(apart)} of {choices}"
    print(f"| {name} | {inputs:.1e} | {before:.1e} | {counts} | {there} | {general} | {everywhere:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    asked = parser.parse_args()
    print("| | routers' inputs | logits | other choices | scores apart | everywhere | logits of all tokens |")
    print("|---|---|---|---|---|---|---|")
    for folder in asked.folders:
        ours = load(folder) if is_artifact(folder) else None
        exact, narrow = (
            ours.model(dtype, dense=True) if ours else load_model(folder).model.to(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        text = windows(load_tokenizer(folder), text_of(asked.text)[0], asked.windows, 512)
        base, routers = of_torch(exact), [view.weight for view in mixtures(exact).values()]
        with torch.inference_mode():
            compare(f"{folder.name}, bf16", of_torch(narrow), base, routers, text)
            if ours and any(n.op_type == "QMoE" for n in read_graph(folder).graph.node):
                compare(f"{folder.name}, QMoE", of_graph(folder), base, routers, text)


if __name__ == "__main__":
    main()
