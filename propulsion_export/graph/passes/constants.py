"""Add a constant to a graph."""

import onnx_ir as ir

from propulsion_export.adapters.scales import Array


def add_constant(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    """Register `values` as an initializer of the graph and return its value."""
    tensor = ir.tensor(values, name=name)
    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(values.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
