"""Put one node behind, or before, a value of a graph."""

import onnx_ir as ir


def behind_(graph: ir.Graph, operator: str, value: ir.Value, operand: ir.Value) -> ir.Value:
    """Let all users of a value read `operator(value, operand)` instead.

    The value's name goes to the result, and so does being an output of the graph.

    Returns:
        The result.
    """
    users, producer, name = tuple(value.uses()), value.producer(), str(value.name)
    assert producer is not None
    operand = _like(graph, operand, value)
    new = ir.node(operator, [value, operand], name=f"{name}/propulsion/{operator}")
    result = new.outputs[0]
    result.type, result.shape = value.type, value.shape
    value.name, result.name = f"{name}/before/{operator}", name
    for user, index in users:
        user.replace_input_with(index, result)
    for index, each in enumerate(graph.outputs):
        if each is value:
            graph.outputs[index] = result
    graph.insert_after(producer, new)
    return result


def scale_input_(graph: ir.Graph, node: ir.Node, scale: ir.Value) -> None:
    """Multiply the first input of a node by `scale`; other users of that input stay as they are."""
    value = node.inputs[0]
    assert value is not None
    new = ir.node("Mul", [value, _like(graph, scale, value)], name=f"{node.name}/propulsion/input")
    result = new.outputs[0]
    result.name, result.type, result.shape = f"{node.name}/input", value.type, value.shape
    node.replace_input_with(0, result)
    graph.insert_before(node, new)


def _like(graph: ir.Graph, operand: ir.Value, value: ir.Value) -> ir.Value:
    """The operand in the dtype of the value: some norms compute in float32."""
    if value.dtype is None or operand.dtype is None or value.dtype == operand.dtype:
        return operand
    cast = ir.node("Cast", [operand], {"to": value.dtype}, name=f"{operand.name}/cast")
    result = cast.outputs[0]
    result.name, result.shape = f"{operand.name}.cast", operand.shape
    result.type = ir.TensorType(value.dtype)
    graph.insert_before(next(iter(graph)), cast)
    return result
