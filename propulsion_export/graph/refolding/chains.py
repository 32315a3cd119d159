"""The initializer behind a constant that a node reads: what may stand between the two, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from propulsion_export.graph.quantisation.sinks import read_constant

_SAME = ("Cast", "CastLike", "Identity")


@dataclass(frozen=True)
class Chain:
    """How a node comes by a constant.

    Attributes:
        initializer: where the values are.
        steps: the nodes between, from the reader to the initializer, and which input each goes on
            through; none if the node reads the initializer itself.
        swapped: whether the reader sees the transpose of a matrix.
        added: the number that is added on the way, as 1 to the weight of Gemma's norms.
    """

    initializer: ir.Value
    steps: Sequence[tuple[ir.Node, int]] = ()
    swapped: bool = False
    added: float = 0.0

    def lead_to_(self, graph: ir.Graph, reader: ir.Node, index: int, new: ir.Value) -> None:
        """Let the reader's input come from another initializer, by the same steps.

        Steps that others take too are copied for this reader.
        """
        for node, onward in self.steps:
            value = reader.inputs[index]
            assert value is not None
            if len(value.uses()) > 1:
                node = _copied(graph, node, reader, index)
            reader, index = node, onward
        reader.replace_input_with(index, new)


def chain_of(value: ir.Value) -> Chain | None:
    """The initializer behind a constant; None if there is none, or what is done to it is unknown.

    A constant of the graph's optional inputs is none.
    """
    steps: list[tuple[ir.Node, int]] = []
    swapped, added = False, 0.0
    while not value.is_initializer():
        node = value.producer()
        onward = None if node is None else _onward(node)
        if node is None or onward is None:
            return None
        if node.op_type == "Add":
            added += _number(node.inputs[1 - onward]) or 0.0
        swapped ^= node.op_type == "Transpose"
        steps.append((node, onward))
        value = node.inputs[onward]  # type: ignore[assignment]
    known = value.const_value is not None and not value.is_graph_input()
    return Chain(value, steps, swapped, added) if known else None


def _onward(node: ir.Node) -> int | None:
    """Through which input a step goes on to the initializer."""
    if node.domain or node.inputs[0] is None:
        return None
    if node.op_type in _SAME:
        return 0
    if node.op_type == "Transpose":
        return 0 if tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0) else None
    if node.op_type == "Add":
        return next((i for i in (0, 1) if _number(node.inputs[1 - i]) is not None), None)
    return None


def _number(value: ir.Value | None) -> float | None:
    values = None if value is None else read_constant(value)
    if values is None or values.size != 1:
        return None
    return float(np.asarray(values).reshape(()))


def _copied(graph: ir.Graph, node: ir.Node, reader: ir.Node, index: int) -> ir.Node:
    old = node.outputs[0]
    copy = ir.node(node.op_type, list(node.inputs), dict(node.attributes))
    new = copy.outputs[0]
    new.name, new.type, new.shape = f"{old.name}.{reader.name}", old.type, old.shape
    graph.insert_before(reader, copy)
    reader.replace_input_with(index, new)
    return copy
