"""Low rank on a GPU: transient memory and latency of an encoder, its feed-forward and its attention, beside the dense
ones, naive SVD, and FlashSVD's own kernels where a path to them is given.

    .venv/bin/python bench/flashsvd.py --flashsvd FlashSVD/src/legacy/FlashSVD-V1/benchmark/encoder_kernel
    .venv/bin/python bench/flashsvd.py --device cpu --rows 4 --model minilm --repeats 3

Random weights in the shapes of BERT base and all-MiniLM-L6: neither memory nor time depends on values. Low-rank linears
have the ranks of `svd: {keep: 0.5, form: plain}`. FlashSVD gets the same ranks in the feed-forward and the output
projection; its attention takes factors a head, of rank --head-rank (32 of 64 keep 0.54 of the weights, 16 of 32 0.54).

transient MiB   most memory above what lay there before the call (inputs, weights): torch.cuda.max_memory_allocated; on
                a CPU the sizes of all live tensors that torch operators made, those inside a fused kernel not seen
ms              median of --repeats; eager, and as a CUDA graph, which has no launch overhead
error           relative, of the result to that of the same factors in float32
Appends a JSON line a row to bench/results/flashsvd.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.kernels import lowrank_ffn, native
from compressor.lean import lean
from compressor.lowrank import LowRankLinear
from compressor.methods.svd import SVD
from compressor.model import linears

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "flashsvd.jsonl"
SHAPES = {  # hidden, feed-forward, heads, layers
    "bert-base": (768, 3072, 12, 12),
    "minilm": (384, 1536, 12, 6),
}
FULL_RANK_TOKENS = (1, 31, 33, 127, 513)
Run = Callable[[], Any]


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.seen | given:
                storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
                self.seen.add(storage.data_ptr())
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage.data_ptr(), size)
        return result

    def gone(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.now -= size


@torch.no_grad()
def transient(run: Run, cuda: bool) -> int:
    """Bytes. Called once before, so that what libraries keep for themselves is there already."""
    run()
    if not cuda:
        with Live() as live:
            run()
        return live.most
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def latency_ms(run: Run, cuda: bool, repeats: int) -> float:
    if not cuda:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def captured(run: Run) -> Run:
    """`run` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Table:
    """Rows of one comparison; the first is the measure of the others."""

    def __init__(self, title: str, cuda: bool, repeats: int, common: dict[str, Any]):
        self.cuda, self.repeats, self.common = cuda, repeats, {**common, "table": title}
        self.first: dict[str, float] | None = None
        print(f"\n### {title}\n")
        print("| variant | transient MiB | of dense | eager ms | of dense | graph ms | of dense | error |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")

    def row(self, name: str, run: Run, expected: Tensor | None) -> None:
        try:
            with torch.no_grad():
                y = run()
            found = {"mib": transient(run, self.cuda) / 2**20, "eager_ms": latency_ms(run, self.cuda, self.repeats)}
            found["graph_ms"] = latency_ms(captured(run), True, self.repeats) if self.cuda else float("nan")
        except Exception as error:  # a peer that does not run is a row of the table
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | | | | |", flush=True)
            return
        self.first = self.first or found
        wrong = float("nan") if expected is None else float((y.float() - expected).norm() / expected.norm())
        of = {f"{k}_of_dense": round(v / self.first[k], 3) for k, v in found.items()}
        digits = {"mib": 1, "eager_ms": 3, "graph_ms": 3}
        cells = [f"{found[k]:.{n}f} | {of[f'{k}_of_dense']:.2f}" for k, n in digits.items()]
        print(f"| {name} | {' | '.join(cells)} | {wrong:.4f} |", flush=True)
        rounded = {k: round(v, 4) for k, v in found.items()}
        line = {**self.common, "variant": name, **rounded, **of, "error": round(wrong, 5)}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def encoder_of(shape: tuple[int, int, int, int], length: int) -> Any:
    hidden, wide, heads, layers = shape
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads,
        num_hidden_layers=layers, max_position_embeddings=max(512, length),
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def in_low_rank(model: nn.Module, keep: float) -> nn.Module:
    """A copy with random factors of the ranks that the method gives, of the size of BERT's weights."""
    model = copy.deepcopy(model)
    SVD(keep=keep, form="plain").outline(model, list(linears(model)))
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            for part in (module.down, module.up):
                std = (0.02 * module.in_features**0.5) ** 0.5 * part.in_features**-0.5
                part.weight = nn.Parameter(torch.randn(part.weight.shape) * std, False)
                part.bias = None if part.bias is None else nn.Parameter(torch.zeros(part.bias.shape), False)
    return model


# --- FlashSVD's kernels, from the folder that the user names ----------------------------------------------------------


class PeerAttention(nn.Module):
    """Its attention in the place of BertSelfAttention: factors a head, [H, d, R] and [H, R, E]."""

    def __init__(self, kernel: Any, like: Any, rank: int):
        super().__init__()
        self.kernel, self.heads = kernel, like.num_attention_heads
        hidden, size = like.query.in_features, like.query.out_features // self.heads
        for name in "qkv":
            self.register_buffer(f"u{name}", torch.randn(hidden, self.heads * rank) * hidden**-0.5)
            self.register_buffer(f"v{name}", torch.randn(1, self.heads, rank, size) * rank**-0.5)
            self.register_buffer(f"b{name}", torch.zeros(1, self.heads, size))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
        rows, length, _ = hidden_states.shape
        given = []
        for name in "qkv":
            p = (hidden_states @ self.get_buffer(f"u{name}")).view(rows, length, self.heads, -1).transpose(1, 2)
            v, b = (self.get_buffer(f"{n}{name}").expand(rows, *[-1] * (2 if n == "b" else 3)) for n in "vb")
            given += [p, v, b]
        if attention_mask is None:
            mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=hidden_states.device)
        else:
            mask = attention_mask[:, :, :1] == 0
        return self.kernel(*given, mask).transpose(1, 2).reshape(rows, length, -1), None


class PeerFFN(nn.Module):
    """Its feed-forward in the place of the last linear; [in, out] matrices as its kernels take them."""

    def __init__(self, kernel: Any, first: LowRankLinear, last: LowRankLinear):
        super().__init__()
        self.kernel = kernel
        parts = {"u1": first.down.weight, "v1": first.up.weight, "u2": last.down.weight, "v2": last.up.weight}
        for name, value in parts.items():
            self.register_buffer(name, value.detach().t().contiguous())
        self.register_buffer("b1", first.up.bias)
        self.register_buffer("b2", last.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x @ self.u1, self.v1, self.u2, self.v2, self.b1, self.b2)


def peer_kernels(folder: str | None) -> dict[str, Any]:
    if folder is None:
        return {}
    sys.path.insert(0, folder)
    from flashsvdattn import flash_svd_attention  # type: ignore[import-not-found]
    from flashsvdffn import flashsvd_ffn  # type: ignore[import-not-found]
    from flashsvdffnv1 import flashsvd_ffn_v1  # type: ignore[import-not-found]

    return {"attention": flash_svd_attention, "v1": flashsvd_ffn_v1, "v2": flashsvd_ffn}


def with_peer(model: Any, kernels: dict[str, Any], ffn: str, head_rank: int) -> Any:
    """The model with FlashSVD's attention and feed-forward in every layer."""
    model = copy.deepcopy(model)
    for layer in model.encoder.layer:
        layer.attention.self = PeerAttention(kernels["attention"], layer.attention.self, head_rank).to(model.dtype)
        layer.output.dense = PeerFFN(kernels[ffn], layer.intermediate.dense, layer.output.dense)
        layer.intermediate = nn.Identity()
    return model.to(model.device)


# --- the comparisons --------------------------------------------------------------------------------------------------


def encoders(name: str, a: argparse.Namespace, kernels: dict[str, Any], common: dict[str, Any]) -> None:
    dense = encoder_of(SHAPES[name], a.length)
    factored = in_low_rank(dense, a.keep)
    heads, hidden = SHAPES[name][2], SHAPES[name][0]
    x = torch.randn(a.rows, a.length, hidden, generator=torch.Generator().manual_seed(1)).to(a.device, a.dtype)
    mask = None
    if a.padding:
        lengths = torch.randint(a.length // 2, a.length + 1, (a.rows, 1), generator=torch.Generator().manual_seed(2))
        unseen = torch.arange(a.length) >= lengths
        mask = torch.zeros(unseen.shape).masked_fill(unseen, torch.finfo(a.dtype).min)[:, None, None]
        mask = mask.expand(-1, 1, a.length, -1).to(a.device, a.dtype)
    table = Table(f"encoder {name}", a.cuda, a.repeats, common)

    def run(model: Any) -> Run:
        model = model.to(a.device, a.dtype)
        return lambda: model.encoder(x, attention_mask=mask)[0]

    wide = None if mask is None else mask.float()
    exact = copy.deepcopy(factored).to(a.device).encoder(x.float(), attention_mask=wide)[0]
    table.row("dense", run(dense), None)
    for tokens in a.tokens:
        leaned = lean(copy.deepcopy(dense).cpu().float(), row_tokens=tokens, dense=True)
        table.row(f"dense, lean, {tokens} tokens", run(leaned), None)
    table.row("naive SVD", run(copy.deepcopy(factored)), exact)
    for tokens in a.tokens:
        table.row(f"ours, {tokens} tokens", run(lean(copy.deepcopy(factored).cpu(), row_tokens=tokens)), exact)
    table.row("ours", run(lean(copy.deepcopy(factored).cpu())), exact)
    for ffn in ("v1", "v2") if kernels else ():
        rank = a.head_rank * hidden // heads // 64
        half = copy.deepcopy(factored).to(a.device, a.dtype)
        table.row(f"FlashSVD {ffn}, rank {rank} a head", run(with_peer(half, kernels, ffn, rank)), None)


def feed_forwards(name: str, a: argparse.Namespace, kernels: dict[str, Any], common: dict[str, Any]) -> None:
    model = encoder_of(SHAPES[name], a.length)
    factored = in_low_rank(model, a.keep).to(a.device, a.dtype)
    layer: Any = model.to(a.device, a.dtype).encoder.layer[0]
    low: Any = factored.encoder.layer[0]  # type: ignore[union-attr]
    x = torch.randn(a.rows, a.length, SHAPES[name][0], generator=torch.Generator().manual_seed(1)).to(a.device, a.dtype)
    first, last = low.intermediate.dense, low.output.dense
    weights = [(m.down.weight, m.up.weight, m.up.bias) for m in (first, last)]
    exact = first.float()(x.float())
    exact = last.float()(F.gelu(exact))
    first.to(a.dtype), last.to(a.dtype)
    weights = [(m.down.weight, m.up.weight, m.up.bias) for m in (first, last)]
    one, two = layer.intermediate.dense, layer.output.dense
    dense = [(m.weight, None, m.bias) for m in (one, two)]
    wide = SHAPES[name][1] * x.element_size()
    table = Table(f"feed-forward {name}", a.cuda, a.repeats, common)
    table.row("dense", lambda: two(F.gelu(one(x))), None)
    for mib in a.hidden_mib:
        step = max(128, (int(mib * 2**20) // wide) // 128 * 128)
        table.row(
            f"dense, {step} tokens", lambda s=step: lowrank_ffn.chunked(x, dense[0], None, dense[1], "gelu", s), None
        )
    table.row("naive SVD", lambda: last(F.gelu(first(x))), exact)
    for mib in a.hidden_mib:
        step = max(128, (int(mib * 2**20) // wide) // 128 * 128)
        table.row(
            f"ours, {step} tokens",
            lambda s=step: lowrank_ffn.chunked(x, weights[0], None, weights[1], "gelu", s), exact,
        )  # fmt: skip
    table.row("ours", lambda: lowrank_ffn.chunked(x, weights[0], None, weights[1], "gelu"), exact)
    if not a.cuda and native.built():
        flat = [t for f in (weights[0], (None, None, None), weights[1]) for t in f]
        table.row("ours, gelu, fused kernel", lambda: lowrank_ffn.lowrank_ffn(x, *flat, "gelu"), exact)
    for kind in ("v1", "v2") if kernels else ():
        peer = PeerFFN(kernels[kind], first, last)
        table.row(f"FlashSVD {kind}", lambda peer=peer: peer(x), exact)


def attentions(name: str, a: argparse.Namespace, kernels: dict[str, Any], common: dict[str, Any]) -> None:
    """From hidden states to what the output projection gives, without the norm."""
    model = encoder_of(SHAPES[name], a.length)
    factored = in_low_rank(model, a.keep)
    leaned = lean(copy.deepcopy(factored), row_tokens=a.rows * a.length)
    x = torch.randn(a.rows, a.length, SHAPES[name][0], generator=torch.Generator().manual_seed(1)).to(a.device, a.dtype)
    table = Table(f"attention {name}", a.cuda, a.repeats, common)

    def run(model: Any) -> Run:
        module = model.to(a.device, a.dtype).encoder.layer[0].attention
        return lambda: module.output.dense(module.self(x)[0])

    whole: Any = copy.deepcopy(factored).to(a.device)
    single = whole.encoder.layer[0].attention
    exact = single.output.dense(single.self(x.float())[0])
    table.row("dense", run(model), None)
    table.row("naive SVD", run(factored), exact)
    table.row("ours", run(leaned), exact)
    if kernels:
        heads, hidden = SHAPES[name][2], SHAPES[name][0]
        rank = a.head_rank * hidden // heads // 64
        peer = PeerAttention(kernels["attention"], model.encoder.layer[0].attention.self, rank).to(a.device, a.dtype)
        out = single.output.dense.to(a.dtype)
        table.row(f"FlashSVD, rank {rank} a head", lambda: out(peer(x)[0]), None)


def full_rank(a: argparse.Namespace) -> None:
    """Factors of full rank, and the dense feed-forward, in the dtype that is measured, against the dense in float32."""
    print("\n### relative error to dense in float32\n\n| tokens | full rank | dense |\n|---:|---:|---:|")
    layer = encoder_of(SHAPES["bert-base"], 512).encoder.layer[0].to(a.device)
    factors = []
    for linear in (layer.intermediate.dense, layer.output.dense):
        u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
        factors.append((*(t.to(a.dtype) for t in (s.sqrt()[:, None] * v, u * s.sqrt())), linear.bias.to(a.dtype)))
    half = copy.deepcopy(layer).to(a.dtype)
    for tokens in FULL_RANK_TOKENS:
        x = torch.randn(tokens, 768, device=a.device, dtype=a.dtype)
        expected = layer.output.dense(F.gelu(layer.intermediate.dense(x.float())))
        found = (
            lowrank_ffn.chunked(x, factors[0], None, factors[1], "gelu", 256),
            half.output.dense(F.gelu(half.intermediate.dense(x))),
        )
        errors = [f"{float((y.float() - expected).norm() / expected.norm()):.5f}" for y in found]
        print(f"| {tokens} | {' | '.join(errors)} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flashsvd", help="folder with FlashSVD's flashsvdattn.py, flashsvdffnv1.py, flashsvdffn.py")
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--head-rank", type=int, default=32, help="of a head of 64, for FlashSVD's attention")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="that go through a block together")
    parser.add_argument("--hidden-mib", type=float, nargs="+", default=[24], help="of hidden activations")
    parser.add_argument("--padding", action="store_true", help="texts of half to full length, padded on the right")
    parser.add_argument("--repeats", type=int, default=21)
    a = parser.parse_args()
    a.cuda = a.device.startswith("cuda")
    a.dtype = torch.bfloat16 if a.cuda else torch.float32
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    kernels = peer_kernels(a.flashsvd)
    common = {
        "commit": git.stdout.strip(), "hardware": torch.cuda.get_device_name() if a.cuda else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__, "rows": a.rows, "length": a.length,
        "keep": a.keep, "padding": a.padding,
    }  # fmt: skip
    print(json.dumps(common))
    full_rank(a)
    for name in a.model:
        feed_forwards(name, a, kernels, common)
        attentions(name, a, kernels, common)
        encoders(name, a, kernels, common)


if __name__ == "__main__":
    main()
