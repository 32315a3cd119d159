"""Find the linear layers of a graph: a MatMul or Gemm with a weight of two dimensions."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from propulsion_export.adapters.scales import Array

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class LinearLayer:
    """One use of a weight that is an initializer.

    Attributes:
        node: MatMul or Gemm.
        weight: the initializer, named by the parameter; [outputs, inputs] if `transposed`, as
            nn.Linear keeps it, else [inputs, outputs].
        transposed: whether the node multiplies by the transpose of the initializer.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def parameter(self) -> str:
        """The name of the weight."""
        return str(self.weight.name)

    def matrix(self) -> Array:
        """The weight as [inputs, outputs]."""
        assert self.weight.const_value is not None
        values = self.weight.const_value.numpy()
        return values.T if self.transposed else values


def linear_layers(model: ir.Model) -> Iterator[LinearLayer]:
    """The linear layers in the graph's order; one whose weight is used twice comes twice."""
    for node in model.graph:
        if (found := as_linear_layer(node)) is not None:
            yield found


def as_linear_layer(node: ir.Node) -> LinearLayer | None:
    """The linear layer that a node computes with a weight in floating point, if it does."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.inputs[1] is None:
        return None
    if node.op_type == "Gemm" and not is_plain_gemm(node):
        return None
    value: ir.Value | None = node.inputs[1]
    transposed = node.attributes.get_int("transB", 0) == 1
    producer = value.producer() if value is not None else None
    if producer is not None and _swaps_two_axes(producer):
        value, transposed = producer.inputs[0], not transposed
    if value is None or not _is_weight(value):
        return None
    return LinearLayer(node, value, transposed)


def is_plain_gemm(node: ir.Node) -> bool:
    """Whether it computes x W + b."""
    return (
        node.attributes.get_float("alpha", 1.0) == 1
        and node.attributes.get_float("beta", 1.0) == 1
        and node.attributes.get_int("transA", 0) == 0
    )


def _swaps_two_axes(node: ir.Node) -> bool:
    """Whether it is the Transpose of a matrix."""
    if node.op_type != "Transpose" or node.domain:
        return False
    return tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)


def _is_weight(value: ir.Value) -> bool:
    constant = value.is_initializer() and not value.is_graph_input()
    tensor = value.const_value
    return constant and tensor is not None and len(tensor.shape) == 2 and tensor.dtype in _FLOATS
