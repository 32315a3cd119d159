"""Let quantised layers compute in floating point: what they round would hide mistakes."""

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.graph.quantisation.node_weights import float_weight

_ROUNDING = "QuantizeLinear"


class ComputeInFloat(ir.passes.InPlacePass):
    """Multiply by dequantised weights, and read inputs as they come.

    A MatMulNBits becomes a MatMul, and the DequantizeLinear of a weight the weight itself. A
    QuantizeLinear with its DequantizeLinear on an activation goes. Embeddings in MatMulNBits' form
    stay: they round nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph.all_nodes()):
            if node.op_type not in ("MatMulNBits", "DequantizeLinear"):
                continue
            weight = float_weight(node)
            if weight is None:
                _skip_rounding_(node)
            elif node.op_type == "MatMulNBits":
                _multiply_by_(node, weight)
            else:
                ir.convenience.replace_all_uses_with(node.outputs[0], _added(node, weight))
        return ir.passes.PassResult(model, modified=True)


def _multiply_by_(node: ir.Node, weight: Array) -> None:
    node.op_type, node.domain = "MatMul", ""
    node.attributes.clear()
    node.replace_input_with(1, _added(node, weight))
    node.resize_inputs(2)


def _added(node: ir.Node, weight: Array) -> ir.Value:
    """A weight as an initializer of the node's graph."""
    assert node.graph is not None
    name = f"{node.name}.float"
    values = ir.tensor(np.ascontiguousarray(weight), name=name)
    shape, dtype = ir.Shape(weight.shape), ir.TensorType(values.dtype)
    value = ir.Value(name=name, shape=shape, type=dtype, const_value=values)
    node.graph.register_initializer(value)
    return value


def _skip_rounding_(node: ir.Node) -> None:
    """Let what reads a dequantised activation read the activation."""
    quantise = node.inputs[0].producer() if node.inputs[0] is not None else None
    if quantise is None or quantise.op_type != _ROUNDING:
        return
    source = quantise.inputs[0]
    if source is None or source.const_value is not None:
        return
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
