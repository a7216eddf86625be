"""The checks of one runtime, run as `python -m compressor.verify_runtimes NAME FOLDER SCRATCH RESULT`.

`verify` starts one process per runtime so that each loads the folder from disk on its own. The torch process
runs first and leaves its reference outputs in SCRATCH for the others; RESULT is a JSON list of checks.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compressor.artifact import Artifact
from compressor.data import text_of, windows
from compressor.errors import CompressorError
from compressor.folder import load
from compressor.kernels import sparsify
from compressor.layers import QuantEmbedding, QuantLinear, QuantModule, build
from compressor.sparse import SparseActivation, SparseLinear
from compressor.verify import CACHES, FAILED, LIBRARY, OK, SKIPPED, Check, relative

if TYPE_CHECKING:
    from compressor.runtimes import OnnxSession

PROMPT_TOKENS = 48
GREEDY_TOKENS = 64
SHORT_GREEDY = 16
NODE_TOLERANCE = 1e-4  # one op, equal float32 input: only the order of sums differs
GRAPH_TOLERANCE = 1e-3  # whole model in float32
QMOE_TOLERANCE = 2e-2  # of a node and of logits, where a stock kernel rounds inputs to 8 bits (exporters/onnx_qmoe.py)
BF16_TOLERANCE = 3e-2  # whole model in bf16, theirs against ours: bf16 against float32 alone differs by more
NOISE_FACTOR = 3.0  # a correct runtime stays within a few times the model's own rounding noise


def prompt(artifact: Artifact) -> Tensor:
    """Token ids [1, PROMPT_TOKENS] of shipped prose."""
    return windows(artifact.tokenizer, text_of(None)[0], 1, PROMPT_TOKENS)


def padded_pair(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [2, L], mask [2, L]): the prompt [1, L], and its second half padded on the left, as `generate` pads."""
    half = ids.shape[1] // 2
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, :half] = 0
    return ids.expand(2, -1) * mask, mask


def jumps(artifact: Artifact) -> list[str]:
    """What makes the model's arithmetic jump, so that sums in another order may change a value much."""
    rounds = any(p.attributes.get("activations", "none") != "none" for p in artifact.packed.values())
    sparse = any(shaped.kind.startswith("sparse_") for shaped in artifact.structure.values())
    return ["activation rounding"] * rounds + ["sparsity"] * sparse


def smooth(model: torch.nn.Module) -> torch.nn.Module:
    """Switch quantization and sparsity of activations off in place: same weights, smooth arithmetic."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.attributes["activations"] = "none"
        if isinstance(module, SparseLinear | SparseActivation):
            module.tokens = "none"
    return model


@contextmanager
def routing(model: torch.nn.Module, wanted: bool) -> Iterator[dict[str, np.ndarray]]:
    """While this is open: container of experts -> the weight of each for each token of the last forward, [B, L, E];
    nothing where it is not wanted."""
    from compressor.mixtures import MoEView, mixtures

    found: dict[str, np.ndarray] = {}

    def listen(view: MoEView) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
            weights = view.weights(args[0].flatten(0, 1))
            found[view.container] = weights.view(*args[0].shape[:2], -1).numpy()

        return view.module.register_forward_hook(hook)

    hooks = [listen(view) for view in mixtures(model).values() if wanted]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(reference ‖ other) over positions of logits [1, L, V]; for hidden states, 1 - mean cosine."""
    a, b = torch.from_numpy(reference).double(), torch.from_numpy(other).double()
    if a.shape[-1] < 2:
        return 0.0
    p, q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _output(model: torch.nn.Module, ids: Tensor) -> np.ndarray:
    from compressor.evaluate import torch_runner

    return torch_runner(model)(ids).numpy()


def check_torch(folder: Path, scratch: Path) -> list[Check]:
    """compressor.load: leaves the reference of the other runtimes, and the model's own rounding noise."""
    from compressor.runtimes import positions_of, torch_greedy

    artifact = load(folder)
    ids = prompt(artifact)
    model = artifact.model(dense=True)
    reference: dict[str, Any] = {"deployed": _output(model, ids)}
    rows = [Check("torch", "load", OK, f"{len(artifact.packed)} compressed modules")]
    if not np.isfinite(reference["deployed"]).all():
        return [Check("torch", "logits", FAILED, "NaN or Inf")]
    noise = 0.0
    if jumps(artifact):
        exact = artifact.model(dense=True)
        for module in exact.modules():
            if isinstance(module, QuantLinear) and module.dense is not None:
                module.dense = module.dense.double()
        noise = divergence(reference["deployed"], _output(exact, ids))
        rows.append(Check("torch", "rounding noise", OK, f"KL {noise:.1e} between float32 and float64 sums"))
        model = smooth(model)
    rounded = artifact.recipe.experts == "qmoe"  # whose graph may have to be held to the routing found here
    with routing(model, rounded) as chosen:
        reference["smooth"] = _output(model, ids)
        reference |= {f"smooth {container}": weights for container, weights in chosen.items()}
    if artifact.kind == "causal-lm":
        with torch.inference_mode():
            first = model(input_ids=ids[:, :-1], use_cache=True)
            step = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        found = relative(step.logits[:, -1].float().numpy(), reference["smooth"][:, -1])
        rows.append(_within("torch", "cached decode", found, GRAPH_TOLERANCE))
        reference["greedy"] = np.array(torch_greedy(model, ids, GREEDY_TOKENS))
        pair, mask = padded_pair(ids)
        positions = {"position_ids": positions_of(mask)} if _takes_positions(model) else {}
        with torch.inference_mode(), routing(model, rounded) as both:
            reference["batch"] = model(input_ids=pair, attention_mask=mask, **positions).logits.numpy()
            reference |= {f"batch {container}": weights for container, weights in both.items()}
    np.savez(scratch / "reference.npz", noise=noise, ids=ids.numpy(), **reference)
    return rows


def _in_plain_torch(module: QuantModule, x: Tensor) -> Tensor:
    """What the module's reference says, whether or not its op has a fused kernel here."""
    module.hold_dense()
    if isinstance(module, QuantEmbedding):
        assert module.dense is not None
        return module.dense[x] * module.attributes["multiplier"]
    return module(x)


def check_library(folder: Path, scratch: Path) -> list[Check]:
    """The same file with the library of fused ops."""
    return check_onnxruntime(folder, scratch, LIBRARY)


def check_onnxruntime(folder: Path, scratch: Path, name: str = "onnxruntime") -> list[Check]:
    """Node by node on the node's own input, then the whole graph and its cache without activation rounding.

    Where stock kernels round the inputs of experts, a token that lies between two of them may go to another one than
    in torch and then has another value (docs/verify.md): the whole graph is held to the routing of torch.
    """
    from compressor.exporters.onnx_graph import compressed_nodes, expert_nodes, held_routing, smooth_graph
    from compressor.exporters.onnx_qmoe import rounds
    from compressor.runtimes import OnnxSession, expose, read_graph

    artifact = load(folder)
    reference = np.load(scratch / "reference.npz")
    ids = torch.from_numpy(reference["ids"])
    graph = read_graph(folder)
    nodes, experts = compressed_nodes(graph, artifact.packed), expert_nodes(graph)
    rounding = any(rounds(node) for node in graph.graph.node)
    allowed = QMOE_TOLERANCE if rounding else GRAPH_TOLERANCE
    inside = tuple(f"{container}." for container in experts)
    missing = sorted(name for name in {*artifact.packed} - {*nodes} if not name.startswith(inside))
    if missing:
        return [Check(name, "nodes", FAILED, f"no node for {', '.join(missing[:3])}")]
    given = {i.name for i in graph.graph.input}
    exposed = {name for found in nodes.values() for name in found[:2]} | {n for own in experts.values() for n in own}
    expose(graph, sorted(exposed - given))
    session = OnnxSession(folder, graph, name == LIBRARY)
    feeds = {"input_ids": ids.numpy()}
    outputs = {**feeds, **session.run(ids)}
    pair, mask = padded_pair(ids)
    alone = session.run(pair, mask=mask) if rounding else {}
    del session
    rows, worst, where = [], 0.0, ""
    sparse = {f"{n}.inner": m for n, m in artifact.model().named_modules() if isinstance(m, SparseLinear)}
    for module, (source, target, part) in nodes.items():
        x = torch.from_numpy(outputs[source])
        if module in sparse:  # a SparseLinear masks by itself; what is masked already stays as it is
            x = sparsify.reference(x, sparse[module].get_buffer("threshold"), sparse[module].tokens)
        with torch.inference_mode():
            expected = _in_plain_torch(build(artifact.packed[module]), x).numpy()
        error = relative(outputs[target][..., part].reshape(expected.shape), expected)
        if error > NODE_TOLERANCE:
            rows.append(Check(name, module, FAILED, f"differs by {error:.1e} from our op on the same input"))
        if error >= worst:
            worst, where = error, module
    if not rows:
        rows.append(Check(name, "nodes", OK, f"{len(nodes)} nodes, worst {worst:.1e} ({where})"))
    if experts:
        rows += _expert_nodes(name, artifact, experts, outputs, QMOE_TOLERANCE if rounding else NODE_TOLERANCE)
    noise = float(reference["noise"])
    if left_out := jumps(artifact):
        rows.append(_noise(name, reference["deployed"], outputs[_result(outputs)], noise))
    if "sparsity" in left_out:
        rows.append(_sparsity(name, folder, ids, artifact))
    without = smooth_graph(read_graph(folder)) if left_out else None
    values = {value: container for container, (_, value, _) in experts.items()} if rounding else {}
    if values:
        without = held_routing(without or read_graph(folder))
    smooth = OnnxSession(folder, without, name == LIBRARY)
    view = f" without {' or '.join(left_out)}" if left_out else ""
    view += " with torch's routing" if values else ""

    def held(of: str, part: slice) -> dict[str, np.ndarray]:
        """The routing of torch for part of the tokens; nothing for a graph that is not held to it."""
        own = {value: reference[f"{of} {container}"][:, part] for value, container in values.items()}
        return {value: weights.reshape(-1, weights.shape[-1]) for value, weights in own.items()}

    logits, _ = smooth.prefill(ids, more=held("smooth", slice(None)))
    rows.append(_within(name, f"prefill{view}", relative(logits.numpy(), reference["smooth"]), allowed))
    if artifact.kind == "causal-lm":
        half = ids.shape[1] // 2
        _, past = smooth.prefill(ids[:, :half], more=held("smooth", slice(half)))
        rest, _ = smooth.prefill(ids[:, half:], past, more=held("smooth", slice(half, None)))
        found = relative(rest.numpy(), reference["smooth"][:, half:])
        rows.append(_within(name, f"cached decode{view}", found, allowed))
        first, past = smooth.prefill(pair[:, :-1], mask=mask[:, :-1], more=held("batch", slice(-1)))
        last, _ = smooth.prefill(pair[:, -1:], past, mask, held("batch", slice(-1, None)))  # as a step of decoding
        found = relative(torch.cat((first, last), 1)[mask.bool()].numpy(), reference["batch"][mask.bool()])
        rows.append(_within(name, f"batch of two lengths{view}", found, allowed))
        if values:
            rows.append(_by_itself(name, reference, alone, values, mask.bool().numpy()))
        else:
            greedy = smooth.greedy(ids, GREEDY_TOKENS)
            rows.append(_tokens(name, f"greedy{view}", greedy, reference["greedy"].tolist()))
    return rows


def _by_itself(name: str, reference: Any, found: dict[str, Any], values: dict[str, str], real: np.ndarray) -> Check:
    """How far a graph that rounds is from torch where it chooses experts itself. Without a limit: its nodes and its
    routing are checked each on its own input, and one token more or less that goes elsewhere decides the figure.

    found: outputs of the padded pair; values: of the weights of the experts -> container; real [2, L]: not padding
    """
    own = [(found[value], reference[f"batch {container}"]) for value, container in values.items()]
    elsewhere = np.stack([((a.reshape(b.shape) != 0) != (b != 0)).any(-1) for a, b in own])[:, real]
    distance = divergence(reference["batch"][real][None], found["logits"][real][None])
    counts = f"{elsewhere.sum()} of {elsewhere.size} times a token went to other experts than in torch"
    return Check(name, "as deployed", OK, f"{counts}; KL {distance:.1e} to torch")


def _sparsity(name: str, folder: Path, ids: Tensor, artifact: Artifact) -> Check:
    """A step of decoding: every Sparsify gives bit for bit what our op gives for its input, every SparseLinear what
    its linear gives for that."""
    from compressor.runtimes import OnnxSession, expose, read_graph

    graph = read_graph(folder)
    nodes = [n for n in graph.graph.node if n.op_type in ("Sparsify", "SparseLinear")]
    expose(graph, [v for n in nodes for v in (n.input[0], n.output[0])])
    session = OnnxSession(folder, graph, name == LIBRARY)
    _, past = session.prefill(ids[:, :-1])
    outputs = session.run(ids[:, -1:], past)
    kinds = SparseLinear | SparseActivation
    modules = artifact.model(dense=True).named_modules()
    sparse: dict[str, Any] = {n: m for n, m in modules if isinstance(m, kinds)}
    thresholds = {n.input[1]: n.input[1].removesuffix(".threshold") for n in nodes}
    if set(thresholds.values()) != set(sparse):
        return Check(name, "sparsity", FAILED, f"{len(thresholds)} nodes for {len(sparse)} layers")
    read, total, worst = 0, 0, 0.0
    for node in nodes:
        module = sparse[thresholds[node.input[1]]]
        x, y = (torch.from_numpy(outputs[value]) for value in (node.input[0], node.output[0]))
        kept = sparsify.reference(x, module.get_buffer("threshold"), module.tokens)
        if node.op_type == "SparseLinear":
            with torch.inference_mode():
                expected = module.inner(kept)
            bias = getattr(module.inner, "bias", None)  # of a plain linear, which an Add behind the node has
            expected = expected if bias is None else expected - bias
            worst = max(worst, relative(y.numpy(), expected.numpy()))
        elif not torch.equal(y, kept):
            worst = float("inf")
        if worst > NODE_TOLERANCE:
            return Check(name, "sparsity", FAILED, f"{thresholds[node.input[1]]}: differs from our op by {worst:.1e}")
        width = getattr(module, "out_features", 1)  # weights that an input, or a neuron, stands for
        read, total = read + int((kept != 0).sum()) * width, total + x.numel() * width
    share = f"a decoded token read {read / total:.2f}"
    return Check(name, "sparsity", OK, f"{len(nodes)} nodes, worst {worst:.1e}; {share}")


def _expert_nodes(
    name: str, artifact: Artifact, nodes: dict[str, tuple[str, str, str]], outputs: dict[str, Any], allowed: float
) -> list[Check]:
    """Each layer's router against the layer in torch, and its experts against the specification of their op, on the
    graph's own inputs."""
    from compressor.kernels.mixed_bit_moe import PackedExperts, reference
    from compressor.mixtures import mixtures

    routers, worst = 0.0, 0.0
    for view in mixtures(artifact.model(lean=False)).values():
        if view.container not in nodes:
            continue
        packed = PackedExperts.of(view)
        assert isinstance(packed, PackedExperts), packed
        x, weights, y = (torch.from_numpy(outputs[n]) for n in nodes[view.container])
        routers = max(routers, relative(weights.numpy(), view.weights(x).numpy()))
        expected = reference(x, weights, packed.experts, **packed.attributes)
        worst = max(worst, relative(y.numpy(), expected.numpy()))

    def row(check: str, found: float, limit: float) -> Check:
        status = OK if found <= limit else FAILED
        return Check(name, check, status, f"layers: {len(nodes)}, worst {found:.1e}, allowed {limit:.0e}")

    return [row("routing", routers, NODE_TOLERANCE), row("experts", worst, allowed)]


def check_optimum(folder: Path, scratch: Path) -> list[Check]:
    """The folder in optimum's classes gives what the graph gives."""
    from transformers import AutoTokenizer

    from compressor.runtimes import OnnxSession

    artifact = load(folder)
    ids = prompt(artifact)
    session = OnnxSession(folder)
    rows = [_same_tokens("optimum", artifact, lambda t: AutoTokenizer.from_pretrained(folder)(t)["input_ids"])]
    if artifact.kind == "encoder":
        from optimum.onnxruntime import ORTModelForFeatureExtraction

        model = ORTModelForFeatureExtraction.from_pretrained(folder)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        found = relative(output.numpy(), session.prefill(ids)[0].numpy())
        return [*rows, _within("optimum", "hidden states", found, GRAPH_TOLERANCE)]
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder)
    for attribute, (found, right) in _caches(model, session).items():
        reason = f"set model.{attribute} = {right}; optimum takes {found} for {artifact.config.model_type}"
        rows.append(Check("optimum", CACHES, SKIPPED, reason))
        setattr(model, attribute, right)
    tokens = model.generate(ids, do_sample=False, max_new_tokens=SHORT_GREEDY, min_new_tokens=SHORT_GREEDY, num_beams=1)
    return [
        *rows,
        _tokens(
            "optimum",
            "greedy",
            *_until_end(artifact, tokens[0, ids.shape[1] :].tolist(), session.greedy(ids, SHORT_GREEDY)),
        ),
    ]


def _caches(model: Any, session: OnnxSession) -> dict[str, tuple[int, int]]:
    """Attribute of optimum's model -> (what it says, what the graph says), where they differ.

    optimum makes the empty caches of a first step by lists of model types, and knows no others (optimum-onnx 0.1,
    modeling_decoder.py).
    """
    if not session.past_names:
        return {}
    shape = session.inputs[session.past_names[0]].shape
    own = {"num_key_value_heads": shape[1], "embed_size_per_head": shape[3]}
    said = {name: getattr(model, name, right) for name, right in own.items()}
    return {name: (said[name], right) for name, right in own.items() if said[name] != right}


def check_genai(folder: Path, scratch: Path) -> list[Check]:
    """The folder in onnxruntime-genai: tokenizer, and greedy tokens without what jumps."""
    import onnxruntime_genai as genai

    from compressor.runtimes import OnnxSession

    name, artifact = "onnxruntime-genai", load(folder)
    ids = prompt(artifact)
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    rows = [_same_tokens(name, artifact, lambda t: tokenizer.encode(t).tolist(), special=False)]
    view = ""
    if left_out := jumps(artifact):  # two runtimes do not agree on such tokens, right as they are (docs/verify.md)
        folder, view = _smooth(folder, scratch / "genai"), f" without {' or '.join(left_out)}"
        model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(
        do_sample=False, max_length=ids.shape[1] + SHORT_GREEDY, min_length=ids.shape[1] + SHORT_GREEDY
    )
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0)[ids.shape[1] :].tolist()
    expected = OnnxSession(folder).greedy(ids, len(tokens))
    return [*rows, _tokens(name, f"greedy{view}", *_until_end(artifact, tokens, expected))]


def _smooth(folder: Path, made: Path) -> Path:
    """`made`: the folder with a graph without what jumps, over the same files where links are possible."""
    from compressor.exporters.onnx_graph import smooth_graph
    from compressor.runtimes import read_graph

    made.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "model.onnx":
            try:
                os.link(file.resolve(), made / file.name)
            except OSError:  # another file system
                shutil.copyfile(file, made / file.name)
    (made / "model.onnx").write_bytes(smooth_graph(read_graph(folder)).SerializeToString())
    return made


def check_transformers(folder: Path, scratch: Path) -> list[Check]:
    """AutoModel.from_pretrained through compressed-tensors: the same weights bit for bit, the same logits."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from compressor.exporters.hf_config import decompressed
    from compressor.mixtures import mixtures

    artifact = load(folder)
    reference = np.load(scratch / "reference.npz")
    ids = torch.from_numpy(reference["ids"])
    rows = [_same_tokens("transformers", artifact, lambda t: AutoTokenizer.from_pretrained(folder)(t)["input_ids"])]
    wrong = []
    for name, weight in decompressed(folder, artifact):
        ours = build(artifact.packed[name]).dequantize()
        if not torch.equal(weight.float(), ours):
            wrong.append(name)
    if artifact.packed:
        detail = f"{', '.join(wrong[:3])} differ" if wrong else f"{len(artifact.packed)} modules bit for bit"
        rows.append(Check("transformers", "decompressed weights", FAILED if wrong else OK, detail))
    # Mixtures in bf16 send tokens near a tie to other experts, whoever runs them (docs/verify.md), so float32 decides;
    # but compressed-tensors makes FP4 weights bf16 whatever is asked for, and rounding of activations is of that dtype.
    # transformers 5 rounds the weights of experts to bf16 when it merges them, and computes in float32.
    left_out = jumps(artifact)
    merged = metadata.version("transformers").startswith("5.") and bool(mixtures(artifact.model()))
    narrow = bool(left_out) or any(p.kind == "fp4_linear" for p in artifact.packed.values())
    dtype = torch.bfloat16 if narrow else torch.float32
    auto = AutoModel if artifact.kind == "encoder" else AutoModelForCausalLM
    found = _output(auto.from_pretrained(folder, dtype=dtype).eval(), ids)
    own = _output(artifact.model(dtype, dense=True), ids)
    if left_out:
        noise = max(float(reference["noise"]), divergence(reference["deployed"], own))
        rows.append(_noise("transformers", reference["deployed"], found, noise))
    else:
        check = "logits in bf16" if narrow else "logits"
        allowed = BF16_TOLERANCE if narrow or merged else GRAPH_TOLERANCE
        rows.append(_within("transformers", check, relative(found, own), allowed))
    return rows


def _within(runtime: str, check: str, found: float, allowed: float) -> Check:
    return Check(
        runtime, check, OK if found <= allowed else FAILED, f"{found:.1e} of the largest value, allowed {allowed:.0e}"
    )


def _noise(runtime: str, expected: np.ndarray, found: np.ndarray, noise: float) -> Check:
    distance = divergence(expected, found) if np.isfinite(found).all() else float("inf")
    status = OK if distance <= NOISE_FACTOR * noise + 1e-3 else FAILED
    return Check(runtime, "as deployed", status, f"KL {distance:.1e} to torch, rounding noise {noise:.1e}")


def _takes_positions(model: torch.nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _until_end(artifact: Artifact, found: list[int], expected: list[int]) -> tuple[list[int], list[int]]:
    """Both up to the first end token of `expected`: a runtime that was asked for more goes its own way from there."""
    ends = getattr(artifact.generation_config, "eos_token_id", None)
    stops = set(ends if isinstance(ends, list) else [ends])
    end = next((i for i, token in enumerate(expected) if token in stops), len(expected))
    return found[:end], expected[:end]


def _tokens(runtime: str, check: str, found: list[int], expected: list[int]) -> Check:
    same = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    status = OK if found == expected else FAILED
    return Check(runtime, check, status, f"{same} of {len(expected)} tokens equal")


def _same_tokens(runtime: str, artifact: Artifact, encode: Callable[[str], list[int]], special: bool = True) -> Check:
    from compressor.exporters.tokenizer_files import PROBE

    tokenizer: Any = artifact.tokenizer
    expected = tokenizer(PROBE, add_special_tokens=special)["input_ids"]
    found = list(encode(PROBE))
    detail = f"{len(expected)} tokens" if found == expected else f"{len(found)} tokens, expected {len(expected)}"
    return Check(runtime, "tokenizer", OK if found == expected else FAILED, detail)


def _result(outputs: dict[str, np.ndarray]) -> str:
    return "logits" if "logits" in outputs else "last_hidden_state"


CHECKS = {
    "torch": check_torch,
    "onnxruntime": check_onnxruntime,
    LIBRARY: check_library,
    "optimum": check_optimum,
    "onnxruntime-genai": check_genai,
    "transformers": check_transformers,
}


def main(name: str, folder: str, scratch: str, result: str) -> None:
    try:
        rows = CHECKS[name](Path(folder), Path(scratch))
    except CompressorError as error:
        rows = [Check(name, "load", FAILED, str(error))]
    Path(result).write_text(json.dumps([asdict(r) for r in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
