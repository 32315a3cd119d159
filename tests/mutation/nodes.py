"""Mistakes in what a graph computes: operators, their attributes, constants and order."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from mutation.editing import Editor, after_node_, replace_node_
from mutation.mistakes import Family, Place, Places
from mutation.planted import Copy
from propulsion_export.adapters.scales import Array
from propulsion_export.scaling.attach import BUFFERS

NODES = Family("nodes")
_ATTENTION_SCALES = ("Mul", "Div")


def _node(copy: Copy, place: Place) -> tuple[ir.Graph, ir.Node]:
    file, _, index = place[:3]
    graph = copy.graphs[file].graph
    return graph, graph[index]


def of_type(*kinds: str, when: Callable[[ir.Node], bool] = lambda node: True) -> Places:
    """The nodes of these operators, by file and index."""

    def places(copy: Copy) -> Iterator[Place]:
        for file, model in copy.graphs.items():
            for index, node in enumerate(model.graph):
                if node.op_type in kinds and when(node):
                    yield file, node.op_type, index

    return places


def constant_of(value: ir.Value | None) -> Array | None:
    """The values of a constant."""
    if value is None:
        return None
    tensor = value.const_value or ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _floats(value: ir.Value | None) -> Array | None:
    found = constant_of(value)
    return found if found is not None and found.dtype.kind in "fV" else None


def _is_number(value: ir.Value | None) -> bool:
    found = _floats(value)
    return found is not None and found.size == 1


def _number_in(node: ir.Node) -> int | None:
    """The index of the input that is a single number; None unless there is one."""
    places = [index for index, value in enumerate(node.inputs) if _is_number(value)]
    return places[0] if len(places) == 1 else None


def _is_residual(node: ir.Node) -> bool:
    """A sum of two computed values of one shape, as far as that is known."""
    one, other = node.inputs
    computed = all(v is not None and v.producer() and constant_of(v) is None for v in node.inputs)
    if not computed or one is None or other is None:
        return False
    return str(one.shape) == str(other.shape) and len(node.outputs[0].shape or ()) == 3


def _is_small(node: ir.Node) -> bool:
    index = _number_in(node)
    return index is not None and 0 < abs(float(_floats(node.inputs[index]).reshape(()))) < 1e-3


def _is_factor(node: ir.Node) -> bool:
    index = _number_in(node)
    return index is not None and 1e-3 < abs(float(_floats(node.inputs[index]).reshape(()))) < 1e3


def _is_scale(node: ir.Node) -> bool:
    """A multiply by the scale of an adapter, in a switchable graph a part of its input."""
    return any(
        value is not None and (BUFFERS["output"] in str(value.name) or _comes_from_split(value))
        for value in node.inputs
    )


def _comes_from_split(value: ir.Value) -> bool:
    node = value.producer()
    for _ in range(3):
        if node is None:
            return False
        if node.op_type == "Split":
            return True
        if node.op_type not in ("Reshape", "Unsqueeze", "Cast", "Gather"):
            return False
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return False


def _set_constant_(
    graph: ir.Graph, node: ir.Node, index: int, change: Callable[[Array], Array]
) -> None:
    """Let one node read another constant."""
    value = node.inputs[index]
    tensor = value.const_value or ir.convenience.get_const_tensor(value)
    old = tensor.numpy()
    new = np.asarray(change(old.astype(np.float64) if old.dtype.kind in "fV" else old))
    made = Editor(graph, node).of(new, tensor.dtype)
    made.shape, made.type = value.shape, value.type
    node.replace_input_with(index, made)


def _scalar_(copy: Copy, place: Place, change: Callable[[Array], Array]) -> None:
    graph, node = _node(copy, place)
    index = _number_in(node)
    assert index is not None
    _set_constant_(graph, node, index, change)


_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
          "SkipSimplifiedLayerNormalization", "SkipLayerNormalization")  # fmt: skip
_EPSILON_NODES = of_type(*_NORMS)
_EPSILON_SUMS = of_type("Add", when=_is_small)


def _epsilon_(copy: Copy, place: Place, factor: float) -> None:
    node = _node(copy, place)[1]
    if node.op_type == "Add":
        _scalar_(copy, place, lambda values: values * factor)
        return
    old = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", old * factor)


def _epsilons(copy: Copy) -> Iterator[Place]:
    yield from _EPSILON_NODES(copy)
    yield from _EPSILON_SUMS(copy)


@NODES.kind("epsilon lost", _epsilons)
def epsilon_lost(copy: Copy, place: Place) -> None:
    _epsilon_(copy, place, 0.0)


@NODES.kind("epsilon a thousand times as large", _epsilons)
def epsilon_large(copy: Copy, place: Place) -> None:
    _epsilon_(copy, place, 1000.0)


@NODES.kind("softmax over another axis", of_type("Softmax"))
def softmax_axis(copy: Copy, place: Place) -> None:
    _node(copy, place)[1].attributes["axis"] = ir.AttrInt64("axis", -2)


@NODES.kind("softmax lost", of_type("Softmax"))
def softmax_lost(copy: Copy, place: Place) -> None:
    _bypass_(copy, place)


@NODES.sized("the inputs of a softmax scaled by", of_type("Softmax"), 0.001, 0.01, 0.1)
def temperature(copy: Copy, place: Place, *, size: float) -> None:
    graph, node = _node(copy, place)
    editor = Editor(graph, node)
    source = node.inputs[0]
    node.replace_input_with(0, editor.op("Mul", source, editor.like(1 + size, source)))


def _bypass_(copy: Copy, place: Place, index: int = 0) -> None:
    graph, node = _node(copy, place)
    source = node.inputs[index]
    assert source is not None
    replace_node_(graph, node, lambda editor: editor.op("Identity", source))


def _swapped(kind: str, *others: str) -> Callable[[Copy, Place], None]:
    def plant_(copy: Copy, place: Place) -> None:
        graph, node = _node(copy, place)
        sources = list(node.inputs)
        replace_node_(graph, node, lambda editor: editor.op(kind, *sources))

    return plant_


_ACTIVATIONS = ("Gelu", "Relu", "Tanh", "Erf", "Sigmoid", "Swish", "QuickGelu")
NODES.kind("an activation lost", of_type(*_ACTIVATIONS))(_bypass_)
NODES.kind(
    "relu instead of another activation", of_type("Gelu", "Tanh", "Erf", "Sigmoid", "Swish")
)(lambda copy, place: _unary_(copy, place, "Relu"))
NODES.kind("tanh instead of erf", of_type("Erf"))(lambda c, p: _unary_(c, p, "Tanh"))
NODES.kind("gelu instead of relu", of_type("Relu"))(lambda c, p: _unary_(c, p, "Softplus"))
NODES.kind("a sum instead of a difference", of_type("Sub"))(_swapped("Add"))
NODES.kind("a difference instead of a sum", of_type("Add", when=_is_residual))(_swapped("Sub"))
NODES.kind("cosine and sine exchanged", of_type("Cos"))(lambda c, p: _unary_(c, p, "Sin"))
NODES.kind("a sine instead of a cosine lost", of_type("Sin"))(_bypass_)
NODES.kind("the sign of a rotated half lost", of_type("Neg"))(_bypass_)
NODES.kind("a square root lost", of_type("Sqrt"))(_bypass_)


def _unary_(copy: Copy, place: Place, kind: str) -> None:
    graph, node = _node(copy, place)
    source = node.inputs[0]
    assert source is not None
    replace_node_(graph, node, lambda editor: editor.op(kind, source))


@NODES.kind("gelu by tanh instead of erf, or the other way", of_type("Gelu"))
def gelu(copy: Copy, place: Place) -> None:
    node = _node(copy, place)[1]
    approximate = node.attributes.get("approximate")
    other = "none" if approximate is not None and approximate.as_string() == "tanh" else "tanh"
    node.attributes["approximate"] = ir.AttrString("approximate", other)


@NODES.sized("a number that a tanh's input is made with off by",
             of_type("Mul", "Div", when=_is_factor), 0.001, 0.01, 0.1)  # fmt: skip
def factor_off(copy: Copy, place: Place, *, size: float) -> None:
    _scalar_(copy, place, lambda values: values * (1 + size))


@NODES.kind("the first addend of a residual dropped", of_type("Add", when=_is_residual))
def residual_dropped(copy: Copy, place: Place) -> None:
    _bypass_(copy, place, 1)


@NODES.kind("the second addend of a residual dropped", of_type("Add", when=_is_residual))
def update_dropped(copy: Copy, place: Place) -> None:
    _bypass_(copy, place, 0)


@NODES.kind("a residual added twice", of_type("Add", when=_is_residual))
def residual_twice(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    first = node.inputs[0]
    after_node_(graph, node.outputs[0], lambda editor, value: editor.op("Add", value, first))


_SCALES = of_type("Mul", when=_is_scale)


def _scaled_input(node: ir.Node) -> int:
    """The index of what is multiplied."""
    return (
        0
        if _comes_from_split(node.inputs[1]) or BUFFERS["output"] in str(node.inputs[1].name)
        else 1
    )


@NODES.kind("a scale not multiplied", _SCALES, everywhere=True)
def scale_dropped(copy: Copy, place: Place) -> None:
    _bypass_(copy, place, _scaled_input(_node(copy, place)[1]))


@NODES.kind("a scale multiplied twice", _SCALES, everywhere=True)
def scale_twice(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    scale = node.inputs[1 - _scaled_input(node)]
    after_node_(graph, node.outputs[0], lambda editor, value: editor.op("Mul", value, scale))


@NODES.kind("a scale divided by", _SCALES, everywhere=True)
def scale_divided(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    index = _scaled_input(node)
    source, scale = node.inputs[index], node.inputs[1 - index]
    replace_node_(graph, node, lambda editor: editor.op("Div", source, scale))


@NODES.kind("a scale added", _SCALES, everywhere=True)
def scale_added(copy: Copy, place: Place) -> None:
    _swapped("Add")(copy, place)


@NODES.kind("a scale's absolute value multiplied", _SCALES, everywhere=True)
def scale_sign(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    index = 1 - _scaled_input(node)
    node.replace_input_with(index, Editor(graph, node).op("Abs", node.inputs[index]))


def _behind_bias(node: ir.Node) -> bool:
    if not _is_scale(node):
        return False
    source = node.inputs[_scaled_input(node)]
    before = source.producer() if source is not None else None
    return before is not None and before.op_type == "Add" and not _is_residual(before)


@NODES.kind("a bias outside the product", of_type("Mul", when=_behind_bias), everywhere=True)
def bias_outside(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    index = _scaled_input(node)
    added = node.inputs[index].producer()
    biases = [n for n, v in enumerate(added.inputs) if v is not None and "bias" in str(v.name)]
    at = biases[0] if biases else 1
    product, bias = added.inputs[1 - at], added.inputs[at]
    scale = node.inputs[1 - index]
    replace_node_(
        graph, node, lambda editor: editor.op("Add", editor.op("Mul", product, scale), bias)
    )


_PRODUCTS = of_type("MatMul", "Gemm")


@NODES.kind("a product rounded to float16", _PRODUCTS)
def product_float16(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    after_node_(graph, node.outputs[0], lambda editor, value: editor.through(value, "FLOAT16"))


@NODES.kind("a product rounded to bfloat16", _PRODUCTS)
def product_bfloat16(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    after_node_(graph, node.outputs[0], lambda editor, value: editor.through(value, "BFLOAT16"))


@NODES.kind("a product scaled as by dropout", _PRODUCTS)
def product_dropout(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    after_node_(graph, node.outputs[0], lambda e, value: e.op("Div", value, e.like(0.9, value)))


@NODES.sized("a product scaled by", _PRODUCTS, 0.001, 0.01)
def product_scaled(copy: Copy, place: Place, *, size: float) -> None:
    graph, node = _node(copy, place)
    after_node_(
        graph, node.outputs[0], lambda e, value: e.op("Mul", value, e.like(1 + size, value))
    )


@NODES.kind("a product with its rows shifted", _PRODUCTS)
def product_rows(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)

    def rolled(editor: Editor, value: ir.Value) -> ir.Value:
        axis = editor.number([0])
        last = editor.op("Slice", value, editor.number([-1]), editor.number([2**31 - 1]), axis)
        rest = editor.op("Slice", value, editor.number([0]), editor.number([-1]), axis)
        return editor.op("Concat", last, rest, axis=0)

    after_node_(graph, node.outputs[0], rolled)


def _is_lookup(node: ir.Node) -> bool:
    table = _floats(node.inputs[0])
    return table is not None and table.ndim == 2


@NODES.kind("a table's rows clamped at 64", of_type("Gather", when=_is_lookup))
def gather_clamped(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    editor = Editor(graph, node)
    node.replace_input_with(1, editor.op("Min", node.inputs[1], editor.number(64)))


@NODES.kind("a table's rows off by one", of_type("Gather", when=_is_lookup))
def gather_off(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    editor = Editor(graph, node)
    lower = editor.op("Max", editor.op("Sub", node.inputs[1], editor.number(1)), editor.number(0))
    node.replace_input_with(1, lower)


def _is_cache(node: ir.Node) -> bool:
    first = node.inputs[0]
    return len(node.inputs) == 2 and first is not None and str(first.name).startswith("past")


@NODES.kind("new entries before the cache", of_type("Concat", when=_is_cache))
def cache_order(copy: Copy, place: Place) -> None:
    _reverse_(copy, place)


def _joins_halves(node: ir.Node) -> bool:
    return len(node.inputs) == 2 and any(
        value is not None and value.producer() and value.producer().op_type == "Neg"
        for value in node.inputs
    )


@NODES.kind("rotated halves exchanged", of_type("Concat", when=_joins_halves))
def halves(copy: Copy, place: Place) -> None:
    _reverse_(copy, place)


def _reverse_(copy: Copy, place: Place) -> None:
    node = _node(copy, place)[1]
    one, other = node.inputs
    node.replace_input_with(0, other)
    node.replace_input_with(1, one)


@NODES.kind("the branches of a choice exchanged", of_type("Where"))
def where(copy: Copy, place: Place) -> None:
    node = _node(copy, place)[1]
    _, one, other = node.inputs
    node.replace_input_with(1, other)
    node.replace_input_with(2, one)


_COMPARISONS = {
    "Less": "LessOrEqual",
    "LessOrEqual": "Less",
    "Greater": "GreaterOrEqual",
    "GreaterOrEqual": "Greater",
}


@NODES.kind("a comparison off by one", of_type(*_COMPARISONS))
def comparison(copy: Copy, place: Place) -> None:
    _swapped(_COMPARISONS[place[1]])(copy, place)


@NODES.kind("one of two conditions dropped", of_type("And"))
def condition(copy: Copy, place: Place) -> None:
    _bypass_(copy, place, 0)


@NODES.kind("the other of two conditions dropped", of_type("And"))
def other_condition(copy: Copy, place: Place) -> None:
    _bypass_(copy, place, 1)


def _mask_values(copy: Copy) -> Iterator[Place]:
    """Constants as large as a precision has them, which hide positions."""
    for file, model in copy.graphs.items():
        for index, node in enumerate(model.graph):
            for at, value in enumerate(node.inputs):
                found = _floats(value)
                if found is not None and found.size == 1 and float(found.reshape(())) < -1e4:
                    yield file, node.op_type, index, at


def _mask_value_(copy: Copy, place: Place, to: float) -> None:
    graph, node = _node(copy, place)
    _set_constant_(graph, node, place[3], lambda values: np.full_like(values, to))


@NODES.kind("hidden positions only made unlikely", _mask_values)
def weak_mask(copy: Copy, place: Place) -> None:
    _mask_value_(copy, place, -5.0)


@NODES.kind("hidden positions not hidden", _mask_values)
def no_mask(copy: Copy, place: Place) -> None:
    _mask_value_(copy, place, 0.0)


def _integers(copy: Copy) -> Iterator[Place]:
    """Single integers that arithmetic and comparisons read: windows, buckets, offsets."""
    for file, model in copy.graphs.items():
        for index, node in enumerate(model.graph):
            if node.op_type not in ("Add", "Sub", "Mul", "Div", "Min", "Max", *_COMPARISONS):
                continue
            for at, value in enumerate(node.inputs):
                found = constant_of(value)
                if found is not None and found.size == 1 and found.dtype.kind == "i":
                    yield file, node.op_type, index, at


@NODES.kind("an integer constant off by one", _integers)
def integer_off(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    _set_constant_(graph, node, place[3], lambda values: values + 1)


@NODES.kind("an integer constant doubled", _integers)
def integer_doubled(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    _set_constant_(graph, node, place[3], lambda values: values * 2)


@NODES.sized("an exponent off by", of_type("Pow"), 0.01, 0.1)
def exponent(copy: Copy, place: Place, *, size: float) -> None:
    graph, node = _node(copy, place)
    _set_constant_(graph, node, 1, lambda values: values * (1 + size))


def _swaps_heads(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return order is not None and list(order.as_ints()) == [0, 2, 1, 3]


@NODES.kind("heads in reverse", of_type("Transpose", when=_swaps_heads))
def heads(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)

    def reversed_(editor: Editor, value: ir.Value) -> ir.Value:
        shape = editor.op("Shape", value, start=1, end=2)
        count = editor.op("Squeeze", shape)
        counted = editor.op("Range", editor.number(0), count, editor.number(1))
        order = editor.op("Sub", editor.op("Sub", count, editor.number(1)), counted)
        return editor.op("Gather", value, order, axis=1)

    after_node_(graph, node.outputs[0], reversed_)


@NODES.kind("a mean over another axis", of_type("ReduceMean", "ReduceSum", "ReduceMax"))
def mean_axis(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is not None:
        _set_constant_(graph, node, 1, lambda values: values - 1)


@NODES.kind("a slice off by one", of_type("Slice"))
def slice_off(copy: Copy, place: Place) -> None:
    graph, node = _node(copy, place)
    starts = constant_of(node.inputs[1])
    if starts is not None:
        _set_constant_(graph, node, 1, lambda values: values + 1)


_FUSED = of_type("GroupQueryAttention", "MultiHeadAttention", "Attention")


@NODES.kind("the scale of a fused attention wrong", _FUSED, everywhere=True)
def fused_scale(copy: Copy, place: Place) -> None:
    _node(copy, place)[1].attributes["scale"] = ir.AttrFloat32("scale", 0.5)


@NODES.kind("the window of a fused attention short", _FUSED, everywhere=True)
def fused_window(copy: Copy, place: Place) -> None:
    _node(copy, place)[1].attributes["local_window_size"] = ir.AttrInt64("local_window_size", 24)


@NODES.kind("a fused attention without a rotation", _FUSED, everywhere=True)
def fused_rotary(copy: Copy, place: Place) -> None:
    node = _node(copy, place)[1]
    if "do_rotary" in node.attributes and node.attributes["do_rotary"].as_int():
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)


@NODES.kind("a fused attention rotating neighbours", _FUSED, everywhere=True)
def fused_interleaved(copy: Copy, place: Place) -> None:
    _node(copy, place)[1].attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
