"""MixedBitMoE: the module, its fused kernel, its body in stock onnxruntime, and stock QMoE, against one another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.experts import Clamped, Expert, Gated
from compressor.kernels import codec, mixed_bit_moe, native
from compressor.kernels.mixed_bit_moe import PackedExperts, reference
from compressor.layers import Packed, build

TOLERANCE = 1e-5  # of the largest value: float32 sums in another order
BITS = "38124"
LAYER = "model.layers.0.mlp.experts"
NAMES = ("w1", "w3", "w2")  # as Mixtral has them: down is not the last


def linear(n: int, k: int, bits: int, group: int, rng: torch.Generator, **more: Tensor) -> nn.Module:
    values = torch.tensor(codec.int_values(bits))[torch.randint(1 << bits, (n, k), generator=rng)].to(torch.int8)
    scale = torch.rand(n, -(-k // group) if group else 1, generator=rng).add(0.1).mul(2.0**-bits).bfloat16()
    tensors = {
        "weight_packed": codec.pack_int(values, bits), "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]), **more,
    }  # fmt: skip
    attributes = {
        "in_features": k, "out_features": n, "padding": 0, "bits": bits, "group_size": group or None,
        "activations": "none",
    }  # fmt: skip
    return build(Packed("int_linear", tensors, attributes))


def layer(
    hidden: int, wide: int, group: int = 32, bits: str = BITS, act: nn.Module | None = None, down: int | None = None
) -> Any:
    """What PackedExperts sees of a layer. down: its own group size, if it has one."""
    rng = torch.Generator().manual_seed(hidden + wide)
    experts = nn.ModuleList()
    for digit in bits:
        gate, up = (linear(wide, hidden, int(digit), group, rng) for _ in range(2))
        act = act or Gated(nn.SiLU())
        last = linear(hidden, wide, int(digit), group if down is None else down, rng)
        experts.append(Expert(NAMES, gate, up, last, act))  # type: ignore[arg-type]
    weight = torch.zeros(len(bits), hidden)
    return SimpleNamespace(experts=experts, weight=weight, activation=lambda: act)


def routed(tokens: int, experts: int, idle: tuple[int, ...] = (1,)) -> Tensor:
    """Weights [T, E] of two experts a token; those of `idle` are chosen by nobody."""
    rng = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts, generator=rng)
    scores[:, list(idle)] = 0
    values, indices = scores.topk(2, dim=-1)
    return torch.zeros_like(scores).scatter(1, indices, values)


def one_by_one(view: Any, x: Tensor, weights: Tensor) -> Tensor:
    return sum(weights[:, e, None] * expert(x) for e, expert in enumerate(view.experts))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().amax() <= TOLERANCE * expected.abs().amax())


# H, I, group. The last has several tasks of rows and columns, inputs of two panels, and rows that end within a group.
SIZES = [(64, 96, 32), (33, 70, 0), (256, 96, 24), (540, 530, 40)]


@pytest.mark.parametrize(("hidden", "wide", "group"), SIZES)
def test_the_specification_is_the_sum_of_the_experts(hidden: int, wide: int, group: int) -> None:
    view = layer(hidden, wide, group)
    packed = PackedExperts.of(view)
    assert isinstance(packed, PackedExperts) and packed.attributes["bits"] == BITS
    assert packed.attributes["activation"] == "silu"
    x = torch.randn(7, hidden, generator=torch.Generator().manual_seed(3))
    weights = routed(7, 5)
    expected = one_by_one(view, x, weights)
    assert close(reference(x, weights, packed.experts, **packed.attributes), expected)
    poisoned = packed.experts.clone()  # of an expert that nobody chose nothing is read
    first, last = mixed_bit_moe.starts(BITS, packed.attributes["layout"])[1:3]
    poisoned[first:last] = 255
    assert close(reference(x, weights, poisoned, **packed.attributes), expected)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni"])
def test_the_fused_kernel_computes_what_the_specification_says(isa: str) -> None:
    if not native.built():
        pytest.skip("the library was not built")
    best = native.isa()
    if not native.use_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        for hidden, wide, group in SIZES:
            packed = PackedExperts.of(layer(hidden, wide, group))
            assert isinstance(packed, PackedExperts)
            for tokens in (0, 1, 2, 7, 33, 301):
                x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens))
                for weights in (routed(tokens, 5), routed(tokens, 5, idle=(0, 2, 3)), torch.zeros(tokens, 5)):
                    found = [
                        native.run("MixedBitMoE", packed.attributes, [x, weights, packed.experts], x.shape, threads)
                        for threads in (1, 2, 4)
                    ]
                    assert all(torch.equal(found[0], other) for other in found)
                    expected = reference(x, weights, packed.experts, **packed.attributes)
                    assert tokens == 0 or close(found[0], expected), (hidden, tokens)
    finally:
        native.use_isa(best)


KINDS = {
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU(),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_activations_groups_of_their_own_and_negative_weights(kind: str) -> None:
    view = layer(64, 96, 32, act=Gated(KINDS[kind]), down=48)
    packed = PackedExperts.of(view)
    assert isinstance(packed, PackedExperts) and packed.attributes["activation"] == kind
    assert (packed.attributes["group_size"], packed.attributes["down_group_size"]) == (32, 48)
    x, weights = torch.randn(9, 64, generator=torch.Generator().manual_seed(3)), routed(9, 5)
    weights[::2] *= -1
    expected = one_by_one(view, x, weights)
    assert close(reference(x, weights, packed.experts, **packed.attributes), expected)
    assert close(packed(x, weights), expected), "the op, which is the kernel where it was built"
    half = x.bfloat16(), weights.bfloat16()
    assert packed(*half).dtype == reference(*half, packed.experts, **packed.attributes).dtype == torch.bfloat16


class UpFirst(nn.Module):
    """An expert whose gate is not the first of its modules."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act: nn.Module):
        super().__init__()
        self.up, self.gate, self.down, self.act = up, gate, down, act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x), self.up(x)))


def test_the_gate_is_found_by_what_it_does() -> None:
    view = layer(64, 96)
    view.experts = nn.ModuleList(UpFirst(e.w1, e.w3, e.w2, e.act_fn) for e in view.experts)
    packed = PackedExperts.of(view)
    assert isinstance(packed, PackedExperts)
    x, weights = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)), routed(7, 5)
    assert close(reference(x, weights, packed.experts, **packed.attributes), one_by_one(view, x, weights))


def test_what_nobody_chose_is_not_read_by_the_kernel() -> None:
    if not native.built():
        pytest.skip("the library was not built")
    packed = PackedExperts.of(layer(64, 96))
    assert isinstance(packed, PackedExperts)
    x, weights = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)), routed(7, 5)
    poisoned = packed.experts.clone()
    first, last = mixed_bit_moe.starts(BITS, packed.attributes["layout"])[1:3]
    poisoned[first:last] = 255  # scales are NaN
    clean, found = (
        native.run("MixedBitMoE", packed.attributes, [x, weights, held], x.shape) for held in (packed.experts, poisoned)
    )
    assert torch.equal(clean, found)


def session(packed: PackedExperts, library: bool, qmoe: bool = False, prepacking: bool = True) -> Any:
    """One node in onnxruntime: through its body, with our kernel, or as stock QMoE."""
    import onnx_ir as ir
    import onnxruntime

    from compressor.exporters import onnx_functions, onnx_nodes, onnx_qmoe

    kind = ir.TensorType(ir.DataType.FLOAT)
    x, weights = (ir.Value(name=n, type=kind) for n in ("x", "weights"))
    held = ir.val("experts", const_value=ir.tensor(packed.experts.numpy(), name="experts"))
    node = ir.node(
        "MixedBitMoE", [x, weights, held], packed.attributes, domain=onnx_nodes.DOMAIN, name=LAYER
    )
    y = ir.node("Identity", [node.outputs[0]])
    y.outputs[0].name, y.outputs[0].type = "y", kind
    opsets = {"": onnx_nodes.OPSET, onnx_nodes.DOMAIN: onnx_nodes.VERSION}
    graph = ir.Graph(
        [x, weights], y.outputs, nodes=[node, y], initializers=[held], opset_imports=opsets, name="one_node"
    )
    model = ir.Model(graph, ir_version=10)
    if qmoe:
        onnx_qmoe.lower(model, {LAYER: 2})
    onnx_functions.attach_bodies(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 4
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepacking)))
    if library:
        compressor.register_ops(options)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def test_its_body_and_the_kernel_agree_in_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")
    for hidden, wide, group in SIZES:
        packed = PackedExperts.of(layer(hidden, wide, group))
        assert isinstance(packed, PackedExperts)
        for library in (False, True) if native.built() else (False,):
            made = session(packed, library)
            for tokens in (1, 2, 7, 33):
                x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens))
                weights = routed(tokens, 5)
                runs = [made.run(None, {"x": x.numpy(), "weights": weights.numpy()})[0] for _ in range(10)]
                assert all((r == runs[0]).all() for r in runs)
                expected = reference(x, weights, packed.experts, **packed.attributes)
                assert close(torch.from_numpy(runs[0]), expected), (hidden, tokens, library)


def test_stock_qmoe_is_within_two_percent() -> None:
    """Its kernels round inputs to 8 bits; one that read a wrong width, group or order is off by half and more."""
    pytest.importorskip("onnxruntime")
    for bits in ("2442", "48284"):
        packed = PackedExperts.of(layer(128, 64, 32, bits))
        assert isinstance(packed, PackedExperts)
        made = session(packed, library=False, qmoe=True)
        for tokens in (1, 7, 33):
            x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))
            weights = routed(tokens, len(bits))
            found = torch.from_numpy(made.run(None, {"x": x.numpy(), "weights": weights.numpy()})[0])
            expected = reference(x, weights, packed.experts, **packed.attributes)
            assert (found - expected).abs().amax() <= 2e-2 * expected.abs().amax(), (bits, tokens)


def test_which_widths_stock_qmoe_rounds() -> None:
    pytest.importorskip("onnxruntime")
    from onnx import helper

    from compressor.exporters.onnx_qmoe import rounds

    cases = [("2222", 16, False), ("2222", 32, True), ("4444", 32, False), ("8888", 32, True)]
    for bits, group, rounding in cases:
        attributes = {"expert_weight_bits": int(bits[0]), "block_size": group}
        assert rounds(helper.make_node("QMoE", [], [], domain="com.microsoft", **attributes)) is rounding
        packed = PackedExperts.of(layer(128, 64, group, bits))
        assert isinstance(packed, PackedExperts)
        x, weights = torch.randn(7, 128, generator=torch.Generator().manual_seed(1)), routed(7, 4)
        expected = reference(x, weights, packed.experts, **packed.attributes)
        for prepacking in (True, False):  # without, 8 bits have no kernel of their own
            made = session(packed, library=False, qmoe=True, prepacking=prepacking)
            found = torch.from_numpy(made.run(None, {"x": x.numpy(), "weights": weights.numpy()})[0])
            error = ((found - expected).abs().amax() / expected.abs().amax()).item()
            exact = not rounding or (bits == "8888" and not prepacking)
            assert error <= (TOLERANCE if exact else 2e-2), (bits, group, error)
    assert not rounds(helper.make_node("MatMulNBits", [], [], domain="com.microsoft"))


def test_what_the_op_cannot_compute_is_said() -> None:
    assert PackedExperts.of(layer(64, 96, act=Clamped(1.7, 7.0))) == "their activation is clamped"
    view = layer(64, 96)
    view.experts[1].w1 = linear(96, 64, 8, 32, torch.Generator(), bias=torch.zeros(96))
    assert PackedExperts.of(view) == "their linears have biases"
    view.experts[1].w1 = linear(96, 64, 2, 32, torch.Generator())
    assert PackedExperts.of(view) == "one of them has linears of several widths"
    view.experts[1].w1 = linear(96, 64, 8, 16, torch.Generator())
    assert PackedExperts.of(view) == "their shapes differ"
    view.experts[1].w1 = nn.Linear(64, 96, bias=False)
    assert PackedExperts.of(view) == "not all of their weights are packed integers"
    for change in ({"activations": "int8"}, {"hadamard": 16}):
        view.experts[1].w1 = linear(96, 64, 8, 32, torch.Generator())
        view.experts[1].w1.attributes |= change
        assert PackedExperts.of(view) == "their inputs are rounded or rotated"
    view.experts[1].w1 = linear(96, 64, 8, 32, torch.Generator())
    view.experts[1].w1.padding = 32
    assert PackedExperts.of(view) == "their inputs are padded, or their rounding is corrected"
    view.experts[1].w1.padding = 0
    view.experts[1].w1.weight_scale = view.experts[1].w1.weight_scale.float()
    assert PackedExperts.of(view) == "their scales are not bfloat16"
    packed = PackedExperts.of(layer(64, 96))
    assert isinstance(packed, PackedExperts)
    wrong = [
        ({"bits": "25"}, "bits is '25', this library knows 1, 2, 3, 4, 8"),
        ({"activation": "mish"}, "activation is 'mish'"),
        ({"bits": "3812"}, "weights has shape"),
        ({"intermediate": 500}, "do not hold three matrices of 500 x 64"),
        ({"layout": "3 12"}, "eight numbers for each width"),
        ({"layout": "9" + packed.attributes["layout"][1:]}, "widths of 1 to 8"),
        ({"layout": "0" + packed.attributes["layout"][1:]}, "widths of 1 to 8"),
        ({"layout": packed.attributes["layout"].replace(" 8 20480 0", " 8 20480 20000")}, "do not hold three matrices"),
        ({"bits": "38123"}, "experts has shape"),
        ({"layout": packed.attributes["layout"].replace(" 8 20480", " 7 20480")}, "a place for every width in bits"),
        ({"group_size": 1}, "do not hold three matrices"),  # more scales than there are
        ({"down_group_size": -1}, "0 and above"),
        ({"hidden": 0}, "1 and above"),
    ]
    x, weights = torch.zeros(1, 64), torch.zeros(1, 5)
    for change, sentence in wrong if native.built() else ():
        with pytest.raises(compressor.errors.CompressorError, match=sentence):
            native.run("MixedBitMoE", packed.attributes | change, [x, weights, packed.experts], x.shape)
