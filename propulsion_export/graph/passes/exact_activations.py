"""Let quantised layers read their inputs unrounded: rounding would hide mistakes."""

import onnx_ir as ir

_FLOAT32 = 1  # of the attribute accuracy_level of MatMulNBits
_ROUNDING = "QuantizeLinear"


class KeepActivations(ir.passes.InPlacePass):
    """Compute quantised layers in floating point: weights as they are, inputs as they come.

    MatMulNBits gets accuracy level 1, and a QuantizeLinear with its DequantizeLinear on an
    activation goes. ONNX Runtime makes MatMulNBits of a dequantised weight and a MatMul; at which
    level is an option of the session.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph.all_nodes()):
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
            elif node.op_type == "DequantizeLinear":
                _skip_rounding_(node)
        return ir.passes.PassResult(model, modified=True)


def _skip_rounding_(node: ir.Node) -> None:
    """Let what reads a dequantised activation read the activation."""
    quantise = node.inputs[0].producer() if node.inputs[0] is not None else None
    if quantise is None or quantise.op_type != _ROUNDING:
        return
    source = quantise.inputs[0]
    if source is None or source.const_value is not None:
        return
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
