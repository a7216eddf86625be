"""Running lean: the same results without activations of full width, for every family, from structure alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor import Recipe, compress, lean_modules, load
from compressor.lean import lean
from compressor.lowrank import LowRankLinear
from compressor.model import linears

Tiny = Callable[..., nn.Module]
SAME = 2e-6  # float32 sums in another order
PARTS = lean_modules.LEAN


def low_rank(model: nn.Module, rank: int = 12, pivoted: bool = False) -> nn.Module:
    """Random factors in the place of every linear of the blocks."""
    rng = torch.Generator().manual_seed(0)
    for name, layer in list(linears(model).items()):
        n, k = layer.out_features, layer.in_features
        made = LowRankLinear.shaped(n, k, min(rank, n // 2, k // 2), bias=layer.bias is not None, pivoted=pivoted)
        for part, value in list(made.named_parameters()):
            drawn = torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5
            owner, _, leaf = part.rpartition(".")
            made.get_submodule(owner)._parameters[leaf] = nn.Parameter(drawn, False)
        made.order = torch.randperm(n, generator=rng) if pivoted else None
        model.set_submodule(name, made)
    return model.requires_grad_(False).eval()


def texts(rows: int = 5, length: int = 13) -> dict[str, Tensor]:
    """Padded on the left, on the right and not at all; an odd length, and more rows than go together."""
    ids = torch.randint(4, 288, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, -5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def found(model: nn.Module) -> Counter[str]:
    return Counter(part.__name__ for m in model.modules() for part in PARTS if isinstance(m, part))


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def parts(model: nn.Module, wanted: dict[str, int]) -> dict[str, int]:
    return {name: found(model)[name] for name in wanted}


EXPECTED = {  # of two blocks
    "bert": {"FFN": 2, "Attention": 2, "Lift": 2, "AddNorm": 4, "Rows": 2, "Single": 8},
    "phi3": {"Rows": 2, "Single": 8},  # gate and up are one linear
    "mixtral": {"FFN": 8, "Rows": 2},
    "gpt_neox": {"FFN": 2, "Rows": 2, "Single": 4, "AddNorm": 0},
}


@torch.no_grad()
def test_every_family_computes_the_same(family: str, tiny: Tiny, plain_torch: None) -> None:
    if family == "gpt2":
        pytest.skip("its Conv1D become linears only when it is loaded")
    model = low_rank(tiny(family))
    given = texts()
    before = model(**given)[0]
    names = {n: p.shape for n, p in model.named_parameters()}
    lean(model, row_tokens=26)
    if family in EXPECTED:
        assert parts(model, EXPECTED[family]) == EXPECTED[family]
    assert off(model(**given)[0], before) < SAME
    assert {n: p.shape for n, p in model.named_parameters()} == names


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hidden_activations_of_all_tokens_never_exist(
    kind: str, pivoted: bool, tiny: Tiny, plain_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, so that rows cannot be parted; the feed-forward is 12 times as wide as the model."""
    from compressor.kernels import lowrank_ffn

    monkeypatch.setattr(lowrank_ffn, "CPU_HIDDEN_BYTES", 1)
    monkeypatch.setattr(lowrank_ffn, "LEAST_TOKENS", 16)
    model = low_rank(tiny(kind, intermediate_size=768, vocab_size=288), pivoted=pivoted)
    ids = torch.randint(4, 288, (1, 100), generator=torch.Generator().manual_seed(2))
    base = getattr(model, "model", model)
    with Largest() as before:
        expected = base(ids)[0]
    lean(model)
    with Largest() as after:
        assert off(base(ids)[0], expected) < SAME
    assert before.elements >= 100 * 768 and after.elements < 100 * 768 / 3


@torch.no_grad()
def test_a_cache_is_filled_as_ever(tiny: Tiny, plain_torch: None) -> None:
    model, given = low_rank(tiny("llama")), texts()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    before = model.generate(**given, **options)  # type: ignore[operator]
    assert torch.equal(lean(model, row_tokens=13).generate(**given, **options), before)  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "kept"), [("llama", 1), ("phi", 1), ("gemma2", 4)])
def test_the_cache_holds_values_in_rank_space(kind: str, kept: int, tiny: Tiny, plain_torch: None) -> None:
    """Rank 12 in one pseudo-head of 16 numbers instead of 4 heads; a model with a soft cap keeps its values."""
    model, given = low_rank(tiny(kind, **({} if kind == "phi" else {"num_key_value_heads": 4}))), texts()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    tokens = model.generate(**given, **options)  # type: ignore[operator]
    before = model(**given)
    lean(model, row_tokens=13, rank_values=True)
    after = model(**given)
    assert [t.shape[1] for t in (after[1].layers[0].keys, after[1].layers[0].values)] == [4, kept]
    assert off(after[0], before[0]) < SAME
    assert torch.equal(model.generate(**given, **options), tokens)  # type: ignore[operator]
    with pytest.raises(ValueError, match="runs lean already; load it with lean=False"):
        lean(model)


def test_gradients_are_those_of_the_linears(tiny: Tiny) -> None:
    grads = []
    for change in (lambda model: model, lambda model: lean(model, row_tokens=13)):
        model = change(low_rank(tiny("bert")))
        x = torch.randn(3, 13, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model(inputs_embeds=x)[0].square().sum().backward()
        grads.append(x.grad)
    assert off(*grads) < 1e-5


class Mixing(nn.Module):
    """Makes a block's rows depend on one another."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return out + out.mean(0) if isinstance(out, Tensor) else (out[0] + out[0].mean(0), *out[1:])


@torch.no_grad()
def test_what_cannot_be_proven_stays(tiny: Tiny, plain_torch: None) -> None:
    """An activation that the op does not know; rows that know of each other; nothing of low rank."""
    model = low_rank(tiny("llama", hidden_act="mish"))
    for block in model.model.layers:  # type: ignore[union-attr]
        lean_modules.become(block, Mixing)
    given = texts()
    before = model(**given)[0]
    assert set(found(lean(model, row_tokens=13))) == {"Single"}
    assert off(model(**given)[0], before) < SAME
    dense = tiny("llama")
    assert not found(lean(dense))


RECIPE = {"calibration": {"windows": 2, "length": 64}, "exports": ["safetensors"]}


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder_runs_lean_unless_told_otherwise(
    quantized: bool, tiny: Tiny, tiny_tokenizer: Any, prose: str, tmp_path: Path
) -> None:
    steps: list[Any] = [{"svd": {"keep": 0.6, "form": "plain", "rank_multiple": 8}}]
    steps += [{"quantize": {"weights": "int8", "rounding": "nearest"}}] if quantized else []
    (tmp_path / "text").write_text(prose)
    recipe = Recipe.from_dict({**RECIPE, "steps": steps})
    model = tiny("bert")
    artifact = compress(model, recipe, tokenizer=tiny_tokenizer, data=str(tmp_path / "text"), measure=False)
    folder = artifact.save(tmp_path / "out")
    plain, run = load(folder).model(lean=False), load(folder).model()
    assert not found(plain) and found(run)["FFN"] == 2
    assert off(run(**texts())[0], plain(**texts())[0]) < SAME
    changed = recipe.model_copy(update={"lean": False})
    assert "lean: false" in changed.to_yaml()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_graph_has_a_node_for_each_part(
    kind: str, tiny: Tiny, tiny_tokenizer: Any, prose: str, tmp_path: Path
) -> None:
    """Stock onnxruntime, and with the library, against torch; factors are the file's bfloat16, not copies."""
    import onnx
    import onnxruntime

    import compressor
    from compressor.kernels import native

    (tmp_path / "text").write_text(prose)
    steps = [{"svd": {"keep": 0.6, "form": "plain", "rank_multiple": 8}}]
    recipe = Recipe.from_dict({**RECIPE, "exports": ["safetensors", "onnx"], "steps": steps})
    artifact = compress(tiny(kind), recipe, tokenizer=tiny_tokenizer, data=str(tmp_path / "text"), measure=False)
    file = artifact.save(tmp_path / "out") / "model.onnx"
    graph = onnx.load(file, load_external_data=False).graph
    nodes = Counter(n.op_type for n in graph.node if n.domain == "ai.compressor")
    attention = {"LowRankAttention": 2} if kind == "bert" else {}
    assert nodes == {"LowRankFFN": 2, "LowRankLinear": 2 if attention else 8, **attention}
    kinds = {t.name: t.data_type for t in graph.initializer}
    factors = [name for n in graph.node if n.domain for name in n.input if name.endswith(("down.weight", "up.weight"))]
    assert factors and all(kinds[name] == onnx.TensorProto.BFLOAT16 for name in factors)
    given = texts()
    feed = {k: v.numpy() for k, v in given.items()}
    places = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    expected = artifact.model(lean=False)(**given, **({} if attention else {"position_ids": places}))[0]
    for library in (False, True)[: 1 + native.built()]:
        options = onnxruntime.SessionOptions()
        if library:
            compressor.register_ops(options)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for missing in (i for i in session.get_inputs() if i.name not in feed):
            empty = torch.zeros(5, missing.shape[1], 0, missing.shape[3]) if len(missing.shape) == 4 else None
            feed[missing.name] = (places * bool(not attention) if empty is None else empty).numpy()
        y = torch.from_numpy(session.run(None, feed)[0])
        real = given["attention_mask"].bool()
        assert off(y[real], expected[real]) < SAME
