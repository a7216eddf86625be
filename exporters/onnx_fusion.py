"""`graph: ort`: the same model in fewer nodes, with operators that stock onnxruntime has beside those of ONNX.

    GroupQueryAttention              attention, cache, mask and softmax (onnx_attention.py), rotary embeddings included
    RotaryEmbedding                  the seven nodes that turn queries or keys, where attention cannot turn both
    (Skip)SimplifiedLayerNormalization   RMS norm, and the residual addition in front of it
    QuickGelu                        x · sigmoid(x)
    FusedMatMul                      a product with a transposed matrix, which need not be held twice

Everything is found by what nodes compute, never by names; what is not found stays as it is. Linears with one input: onnx_sites.py.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from compressor.errors import OutputError
from compressor.exporters import onnx_attention, onnx_capture
from compressor.exporters.onnx_nodes import STOCK_DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

SWAP = (0, 2, 1, 3)  # [B, H, S, D] <-> [B, S, H, D]


def capture(model: nn.Module, kind: str) -> tuple[ir.Model, dict[str, Any]]:
    """The fused graph, and how many of which node it has; `attention` says why a language model's stayed in parts."""
    report: dict[str, Any] = {}
    graph = None
    if kind == "causal-lm":
        try:
            with onnx_attention.grouped(model):
                graph = onnx_capture.capture(model, kind, grouped=True, change=fuse)
        except (onnx_attention.NotGroupedError, OutputError) as error:
            report["attention"] = f"portable: {error}"
    if graph is None:
        graph = onnx_capture.capture(model, kind, change=fuse)
    kinds = Counter(n.op_type for n in graph.graph if n.domain == STOCK_DOMAIN or n.op_type.startswith("Simplified"))
    return graph, {**report, **{name: kinds[name] for name in sorted(kinds) if name != "MatMulNBits"}}


def fuse(model: ir.Model) -> None:
    """Every fusion, in place. Values need their shapes."""
    from onnx_ir.passes import common
    from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
    from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

    _fold_constants(model)
    fuse_rms_normalization(model)
    _Attention(model.graph).fuse()
    fuse_skip_rms_normalization(model)
    for node in list(model.graph):
        _fuse_silu(model.graph, node)
        _fuse_transposed(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    model.graph.opset_imports[STOCK_DOMAIN] = 1


def _fold_constants(model: ir.Model) -> None:
    """Compute what hangs on constants alone. Weights are left: they are bytes of another file."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import _constant_folding

    weights = set(model.graph.initializers.values())

    def rule(node: ir.Node) -> bool | None:
        return False if any(v in weights for v in node.inputs) else None

    fold = _constant_folding.FoldConstantsPass(
        shape_inference=True, input_size_limit=1024, output_size_limit=1024, should_fold=rule
    )
    for step in (fold, common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass()):
        step(model)


def _made(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes the value, if it is one of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _input(node: ir.Node, index: int = 0) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _constant(value: ir.Value | None) -> float | None:
    """The number that a value of one element always is."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _dims(value: ir.Value) -> list[Any]:
    return list(value.shape or ())


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and _dims(a) == _dims(b)


def _last(node: ir.Node, value: ir.Value) -> bool:
    """Whether the node's axis is the last of `value`."""
    return node.attributes.get_int("axis", 0) in (-1, len(_dims(value)) - 1)


def _swapped(value: ir.Value) -> ir.Value | None:
    """[B, S, H, D] of which `value` is the transposed view [B, H, S, D], or the other way round."""
    node = _made(value, "Transpose")
    return _input(node) if node and tuple(node.attributes.get_ints("perm", ())) == SWAP else None


def _fuse_silu(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    if node.op_type != "Mul":
        return
    for x, gate in _either(node):
        sigmoid = _made(gate, "Sigmoid")
        if sigmoid and _input(sigmoid) is x:
            _replace(graph, node, ir.node("QuickGelu", [x], {"alpha": 1.0}, domain=STOCK_DOMAIN))
            return


def _either(node: ir.Node) -> tuple[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]]:
    """The two inputs of a node for which their order is one."""
    a, b = _input(node), _input(node, 1)
    return (a, b), (b, a)


def _fuse_transposed(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    transpose = _made(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
    if transpose and len(_dims(_input(transpose))) == 2:
        inputs = [_input(node), _input(transpose)]
        _replace(graph, node, ir.node("FusedMatMul", inputs, {"transB": 1}, domain=STOCK_DOMAIN))


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, with its output's name, type and shape."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    before.name = None
    graph.insert_before(old, new)
    if before.is_graph_output():
        graph.outputs[graph.outputs.index(before)] = after
    before.replace_all_uses_with(after)
    graph.remove(old, safe=True)


class _Attention:
    """Queries, keys and values of every GroupQueryAttention as its linears make them: [B, S, heads · D], turned by one
    node where they are turned, and no transposition on the way."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.tables: dict[ir.Value, ir.Value] = {}  # cos or sin [B, S, D] -> [B * S, D / 2]
        self.positions: dict[ir.Value, ir.Value] = {}  # the same -> [B, S], the rows of that table
        self.long: dict[ir.Value, ir.Value] = {}  # a table -> the same with as many rows more as there are positions

    def fuse(self) -> None:
        for node in [n for n in self.graph if n.op_type == "GroupQueryAttention"]:
            self.before = node  # where new nodes go
            for index in range(3):
                node.replace_input_with(index, self.flat(_input(node, index)))
            self.turn_inside(node)
            out = node.outputs[0]
            for split in [n for n in out.consumers() if n.op_type == "Reshape"]:
                for join in [n for n in split.outputs[0].consumers() if n.op_type == "Reshape"]:
                    if _same_shape(join.outputs[0], out):
                        join.outputs[0].replace_all_uses_with(out)

    def add(
        self, op_type: str, inputs: list[ir.Value], like: ir.Value | None = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A new node with one output, which has the type and shape of `like`."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, domain=domain)
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        return self.add("Constant", [], value_ints=list(numbers))

    def flat(self, value: ir.Value) -> ir.Value:
        """The same [B, S, heads * D], made without transposing where that can be."""
        join = _made(value, "Reshape")
        if join is None:
            return value
        heads = _input(join)  # [B, S, H, D]
        turned = _swapped(heads)
        if turned is None:
            return self.joined(heads, value)
        if (found := self.rotary(turned)) is None:
            return self.joined(self.unswapped(turned, heads), value)
        x, cos, sin = found
        inputs = [self.joined(self.unswapped(x, heads), value), self.positions[cos], self.tables[cos], self.tables[sin]]
        return self.add("RotaryEmbedding", inputs, value, STOCK_DOMAIN)

    def turn_inside(self, attention: ir.Node) -> None:
        """Let the attention turn queries and keys itself where both are turned by the same angles.

        It insists on a row for every position up to the last; the rows in use are still those of `positions`.
        """
        import onnx_ir as ir

        query, key = (_made(attention.inputs[i], "RotaryEmbedding") for i in (0, 1))
        size = _dims(_input(attention, 3))[-1]
        if not query or not key or query.inputs[1:] != key.inputs[1:] or size % 16:
            return
        for index, node in enumerate((query, key)):
            attention.replace_input_with(index, _input(node))
        positions, *tables = (_input(query, i) for i in (1, 2, 3))
        for index, table in enumerate(tables, 7):
            if table not in self.long:
                total = self.add("Reshape", [self.add("Cast", [_input(attention, 6)], to=ir.DataType.INT64), self.ints(1)])
                zeros = self.add("ConstantOfShape", [self.add("Concat", [total, self.ints(size // 2)], axis=0)])
                self.long[table] = self.add("Concat", [table, zeros], axis=0)
            attention.replace_input_with(index, self.long[table])
        attention.replace_input_with(9, positions)
        attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)

    def unswapped(self, x: ir.Value, like: ir.Value) -> ir.Value:
        """[B, S, H, D] of x [B, H, S, D]; a norm over D does not care, so it moves in front."""
        if (found := _swapped(x)) is not None:
            return found
        if norm := _made(x, "SimplifiedLayerNormalization"):
            attributes = {name: a.value for name, a in norm.attributes.items()}
            inner = self.unswapped(_input(norm), like)
            return self.add("SimplifiedLayerNormalization", [inner, _input(norm, 1)], like, **attributes)
        return self.add("Transpose", [x], like, perm=list(SWAP))

    def joined(self, heads: ir.Value, like: ir.Value) -> ir.Value:
        """[B, S, H, D] -> [B, S, H * D]: what was split into heads, else a Reshape."""
        split = _made(heads, "Reshape")
        if split and _same_shape(_input(split), like):
            return _input(split)
        return self.add("Reshape", [heads, self.ints(0, 0, -1)], like)

    def rotary(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
        """(x, cos, sin) if `value` is x · cos + (-x2, x1) · sin over two halves x1, x2, with the same cos for both."""
        add = _made(value, "Add")
        for left, right in _either(add) if add else ():
            plain, crossed = _made(left, "Mul"), _made(right, "Mul")
            if not plain or not crossed:
                continue
            for x, cos in _either(plain):
                for halves, sin in _either(crossed):
                    angles = [a for a in (_before_heads(cos), _before_heads(sin)) if a is not None]
                    if len(angles) == 2 and _is_crossed(halves, x) and all(self.table(a, x) for a in angles):
                        return x, angles[0], angles[1]
        return None

    def table(self, angles: ir.Value, x: ir.Value) -> bool:
        """Whether cos or sin [B, S, D] repeats itself after D / 2; makes it the rows that RotaryEmbedding reads.

        As the model computes them for these positions, so that any scaling of frequencies is in them.
        """
        dims = _dims(x)
        if len(dims) != 4 or _dims(angles) != [dims[0], dims[2], dims[3]]:
            return False
        if angles not in self.tables:
            if (half := self.half(angles)) is None:
                return False
            self.tables[angles] = self.add("Reshape", [half, self.ints(-1, dims[3] // 2)])
            tokens = self.add("Shape", [angles], start=0, end=2)
            zero, one = (self.add("Constant", [], value_int=n) for n in (0, 1))
            rows = self.add("Range", [zero, self.add("ReduceProd", [tokens], keepdims=0), one])
            self.positions[angles] = self.add("Reshape", [rows, tokens])
        return True

    def half(self, value: ir.Value) -> ir.Value | None:
        """The first half of what is [f, f] on its last axis, through functions of each element; None if it is not."""
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Concat":
            same = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _last(node, value)
            return _input(node) if same else None
        scaled = node.op_type == "Mul" and _constant(node.inputs[1]) is not None
        if not scaled and node.op_type not in ("Cos", "Sin", "Cast", "Identity"):
            return None
        inner = self.half(_input(node))
        attributes = {name: a.value for name, a in node.attributes.items()}
        rest = [_input(node, i) for i in range(1, len(node.inputs))]
        return None if inner is None else self.add(node.op_type, [inner, *rest], **attributes)


def _before_heads(value: ir.Value) -> ir.Value | None:
    """[B, S, D] of which `value` is [B, 1, S, D]."""
    node = _made(value, "Unsqueeze")
    return _input(node) if node and _constant(node.inputs[1]) == 1 else None


def _is_crossed(value: ir.Value, x: ir.Value) -> bool:
    """Whether value is (-x2, x1) of x = (x1, x2) on the last axis."""
    join = _made(value, "Concat")
    if join is None or len(join.inputs) != 2 or not _last(join, value):
        return False
    negative, size = _made(join.inputs[0], "Neg"), _dims(x)[-1]
    parts = [_made(negative.inputs[0] if negative else None, "Slice"), _made(join.inputs[1], "Slice")]
    return all(
        part is not None
        and _input(part) is x
        and _constant(part.inputs[1]) == start
        and _constant(part.inputs[3]) in (-1, 3)
        and _dims(part.outputs[0])[-1:] == [size // 2]
        for part, start in zip(parts, (size // 2, 0), strict=True)
    )
