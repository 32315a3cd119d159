"""Compute in float32 what a graph of another precision computes in bfloat16."""

import onnx_ir as ir

_BFLOAT16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_KEPT = ("Cast", "Constant")


class ComputeInFloat32(ir.passes.InPlacePass):
    """Cast the bfloat16 inputs of each node to float32 and its outputs back.

    Falcon rounds its ALiBi positions to bfloat16 whatever its own precision is, and ONNX Runtime
    has hardly any kernel for that type. Float32 holds every bfloat16, and a sum or product computed
    in it and rounded once is what bfloat16 arithmetic gives.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type not in _KEPT]
        changed = [_detour(model.graph, node) for node in nodes]
        return ir.passes.PassResult(model, modified=any(changed))


def _detour(graph: ir.Graph, node: ir.Node) -> bool:
    inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None and v.dtype == _BFLOAT16]
    outputs = [value for value in node.outputs if value.dtype == _BFLOAT16]
    for index, value in inputs:
        cast = _cast(value, _FLOAT)
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    for value in outputs:
        users = tuple(value.uses())
        value.dtype = _FLOAT
        cast = _cast(value, _BFLOAT16)
        graph.insert_after(node, cast)
        for user, index in users:
            user.replace_input_with(index, cast.outputs[0])
    return bool(inputs or outputs)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    return cast
