"""Find the constants that a scale can be multiplied into."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.graph.passes.scale_products import ScaleProduct
from propulsion_export.graph.quantisation.linear_layers import as_linear_layer, is_plain_gemm

# Norms by the inputs that hold their weight and bias; only the first output is scaled.
_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
# What may stand between a weight and the product that it is in.
_OF_CONSTANTS = ("Add", "Cast", "CastLike", "Constant", "Identity", "Transpose")


@dataclass(frozen=True)
class Target:
    """A constant that a node reads and that has the channels in one axis.

    Attributes:
        node: who reads it, as input `index`.
        index: of the input.
        axis: of the channels: 0 or -1.
        quantises: whether it holds quantisation scales.
        weight: the initializer, if it is a matrix in floating point.
    """

    node: ir.Node
    index: int
    axis: int = -1
    quantises: bool = False
    weight: ir.Value | None = None

    @property
    def value(self) -> ir.Value:
        """What the node reads."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    def spread(self, factors: Array) -> Array:
        """Factors [channels] in a shape that broadcasts with the constant."""
        return factors[:, None] if self.axis == 0 else factors


@dataclass(frozen=True)
class Sink:
    """Where a scale goes: everything that has to be multiplied by it.

    `positive`: quantisation scales have to stay positive.
    """

    targets: tuple[Target, ...]
    positive: bool = False


def find_sinks(products: Sequence[ScaleProduct], slots: Collection[str]) -> dict[ir.Node, Sink]:
    """The sink of each Mul by one scale, by the Mul; a Mul that has to stay has none.

    Args:
        products: every Mul by the scale.
        slots: names of initializers whose values change too, so that nothing is folded into them.
    """
    found = {}
    for product in products:
        width = product.scale.shape[0] if product.scale.shape is not None else None
        if isinstance(width, int) and product.scale.is_initializer():
            sink = find_sink(product.other, width, slots)
            if sink is not None:
                found[product.node] = sink
    readers = {target.node for sink in found.values() for target in sink.targets}
    return {node: sink for node, sink in found.items() if not _shares(sink, readers)}


def read_constant(value: ir.Value) -> Array | None:
    """The values of an initializer, or of a sum such as 1 + weight in float64; else None."""
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.domain or node.op_type not in _OF_CONSTANTS:
        return None
    if node.op_type == "Constant":
        return _value_of(node)
    operands = [read_constant(operand) for operand in node.inputs[:2] if operand is not None]
    if any(operand is None for operand in operands):
        return None
    match node.op_type, operands:
        case "Add", [left, right]:
            return np.asarray(left, np.float64) + np.asarray(right, np.float64)
        case "Transpose", [matrix]:
            return None if matrix is None else matrix.T
        case (("Cast" | "CastLike" | "Identity"), [first, *_]):
            return first
    return None


def find_sink(value: ir.Value, width: int, slots: Collection[str]) -> Sink | None:
    """Walk from a scaled value, with `width` channels, to the node that computes it.

    Args:
        value: what is scaled; nothing else reads it.
        width: of its last axis.
        slots: as for `find_sinks`.
    """
    biases: list[Target] = []
    while (node := _only_for_the_scale(value)) is not None:
        found = _ending(node, value, width, slots)
        if found is not None:
            return Sink((*found.targets, *biases), found.positive)
        index = _next(node, width)
        if index is None:
            return None
        if node.op_type == "Add":
            biases.append(Target(node, 1 - index))
        value = node.inputs[index]  # type: ignore[assignment]
    return None


def _only_for_the_scale(value: ir.Value) -> ir.Node | None:
    """The producer of a value that nothing else reads."""
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _next(node: ir.Node, width: int) -> int | None:
    """Through which input a node hands its channels on.

    It adds a bias, multiplies by a number as behind Gemma's embeddings, or changes type or shape.
    """
    if node.domain:
        return None
    if node.op_type == "Add":
        return next((i for i in (0, 1) if _is_vector(node.inputs[1 - i], width, ())), None)
    if node.op_type == "Mul":
        return next((i for i in (0, 1) if _is_number(node.inputs[1 - i])), None)
    same = node.op_type in ("Identity", "Cast", "CastLike")
    if same or (node.op_type == "Reshape" and _last(node.inputs[0]) == _last(node.outputs[0])):
        return 0 if _last(node.inputs[0]) in (width, None) else None
    return None


def _ending(node: ir.Node, value: ir.Value, width: int, slots: Collection[str]) -> Sink | None:
    """The sink, if the node computes the channels by a weight."""
    if value is not node.outputs[0]:
        return None
    sink: Sink | None
    find: Callable[[ir.Node], Sink | None] | None = {
        "MatMulNBits": _of_matmulnbits,
        "MatMul": _of_product,
        "Gemm": _of_product,
        "Gather": _of_gather,
    }.get(node.op_type)
    if node.op_type in _NORMS:
        indices = [i for i in _NORMS[node.op_type] if _has(node, i)]
        sink = Sink(tuple(Target(node, index) for index in indices))
    elif node.op_type == "Mul":
        vectors = [i for i in (0, 1) if _is_vector(node.inputs[i], width, slots)]
        sink = Sink((Target(node, vectors[0]),)) if len(vectors) == 1 else None
    else:
        sink = find(node) if find else None
    return sink if sink and all(_fits(target, width) for target in sink.targets) else None


def _of_matmulnbits(node: ir.Node) -> Sink:
    biases = (Target(node, 5),) if _has(node, 5) else ()
    return Sink((Target(node, 2, axis=0, quantises=True), *biases))


def _of_product(node: ir.Node) -> Sink | None:
    if node.op_type == "Gemm" and not is_plain_gemm(node):
        return None
    biases = (Target(node, 2),) if node.op_type == "Gemm" and _has(node, 2) else ()
    weight = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        if node.attributes.get_int("transB", 0) or producer.attributes.get_int("axis", 1) < 0:
            return None
        return Sink((Target(producer, 1, quantises=True), *biases), positive=True)
    layer = as_linear_layer(node)
    if layer is None:
        return None
    axis = 0 if node.attributes.get_int("transB", 0) else -1
    return Sink((Target(node, 1, axis=axis, weight=layer.weight), *biases))


def _of_gather(node: ir.Node) -> Sink | None:
    table = node.inputs[0]
    if table is None or not table.is_initializer() or node.attributes.get_int("axis", 0) != 0:
        return None
    return Sink((Target(node, 0, weight=table),))


def _fits(target: Target, width: int) -> bool:
    """Whether the constant is one, with so many channels."""
    values = read_constant(target.value)
    return values is not None and values.ndim > 0 and values.shape[target.axis] == width


def _shares(sink: Sink, readers: Collection[ir.Node]) -> bool:
    """Whether a matrix is also read by nodes of other modules, so that it would be doubled."""
    weights = [target.weight for target in sink.targets if target.weight is not None]
    return any(node not in readers for weight in weights for node in _readers(weight))


def _readers(weight: ir.Value) -> Iterator[ir.Node]:
    for node, _ in weight.uses():
        if node.op_type == "Transpose":
            yield from _readers(node.outputs[0])
        else:
            yield node


def _is_number(value: ir.Value | None) -> bool:
    values = None if value is None else read_constant(value)
    return values is not None and values.size == 1


def _is_vector(value: ir.Value | None, width: int, slots: Collection[str]) -> bool:
    if value is None or value.name in slots:
        return False
    values = read_constant(value)
    return values is not None and values.shape == (width,)


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _last(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape else None
    return size if isinstance(size, int) else None


def _value_of(node: ir.Node) -> Array | None:
    attribute = node.attributes.get("value")
    if attribute is not None:
        return attribute.as_tensor().numpy()
    for name, read in (("value_float", "as_float"), ("value_floats", "as_floats")):
        if name in node.attributes:
            return np.asarray(getattr(node.attributes[name], read)())
    return None
