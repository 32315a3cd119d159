"""Put nodes into a graph."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array


class Editor:
    """Adds nodes before a node of a graph.

    Attributes:
        graph: the graph to change.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph = graph
        self._before = before
        self._floating = _floating_type(graph)
        self.added: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        """Add a node of one output."""
        node = ir.node(kind, list(inputs), attributes)
        node.outputs[0].name = f"planted_{len(self.graph)}_{len(self.added)}"
        self.graph.insert_before(self._before, [node])
        self.added.append(node)
        return node.outputs[0]

    def number(self, value: Array | float | list[int], dtype: str = "int64") -> ir.Value:
        """Add a constant."""
        return self.of(np.array(value), ir.DataType.from_numpy(np.dtype(dtype)))

    def of(self, values: Array, dtype: ir.DataType) -> ir.Value:
        """Add a constant of a type of ONNX."""
        tensor = ir.Tensor(np.asarray(values).astype(dtype.numpy()), dtype=dtype)
        node = ir.node("Constant", [], {"value": tensor})
        node.outputs[0].name = f"planted_{len(self.graph)}_{len(self.added)}c"
        self.graph.insert_before(self._before, [node])
        self.added.append(node)
        return node.outputs[0]

    def like(self, value: float, other: ir.Value) -> ir.Value:
        """A constant of the type of another value."""
        return self.of(np.array(value), self.type_of(other))

    def cast(self, value: ir.Value, to: str | ir.DataType) -> ir.Value:
        code = to if isinstance(to, ir.DataType) else ir.DataType[to]
        return self.op("Cast", value, to=int(code))

    def through(self, value: ir.Value, to: str) -> ir.Value:
        """The value rounded to another type and back."""
        return self.cast(self.cast(value, to), self.type_of(value))

    def type_of(self, value: ir.Value) -> ir.DataType:
        """The type of a value; where the graph does not say, that of most of its weights."""
        return value.dtype or self._floating

    def rows(self, value: ir.Value) -> ir.Value:
        """0, 1, 2, … for each row of a batch, int64."""
        shape = self.op("Shape", value, start=0, end=1)
        count = self.op("Squeeze", shape)
        return self.op("Range", self.number(0), count, self.number(1))

    def columns(self, value: ir.Value) -> ir.Value:
        """0, 1, 2, … along the second dimension, int64."""
        shape = self.op("Shape", value, start=1, end=2)
        count = self.op("Squeeze", shape)
        return self.op("Range", self.number(0), count, self.number(1))


Make = Callable[[Editor, ir.Value], ir.Value]


def after_input_(graph: ir.Graph, value: ir.Value, make: Make) -> None:
    """Let all nodes that read a graph's input read what `make` makes of it."""
    _redirect_(graph, value, Editor(graph, graph[0]), make)


def after_node_(graph: ir.Graph, value: ir.Value, make: Make) -> None:
    """Let everything that reads a node's output read what `make` makes of it.

    An output of the graph keeps its name.
    """
    producer = value.producer()
    assert producer is not None
    end = ir.node("Identity", [value])
    graph.insert_after(producer, [end])
    is_output = any(output is value for output in graph.outputs)
    _redirect_(graph, value, Editor(graph, end), make, is_output=is_output)
    graph.remove(end, safe=True)


def replace_node_(graph: ir.Graph, node: ir.Node, make: Callable[[Editor], ir.Value]) -> None:
    """Let everything that reads the first output of a node read something else."""
    after_node_(graph, node.outputs[0], lambda editor, _: make(editor))


def _floating_type(graph: ir.Graph) -> ir.DataType:
    types = Counter(
        value.dtype
        for value in graph.initializers.values()
        if value.dtype is not None and value.dtype.is_floating_point()
    )
    return types.most_common(1)[0][0] if types else ir.DataType.FLOAT


def _redirect_(
    graph: ir.Graph, value: ir.Value, editor: Editor, make: Make, *, is_output: bool = False
) -> None:
    uses = list(value.uses())
    made = make(editor, value)
    assert made is not value
    made.shape, made.type = made.shape or value.shape, made.type or value.type
    for use in uses:
        use.node.replace_input_with(use.idx, made)
    if is_output:
        made.name, value.name = value.name, f"{value.name}_before"
        made.shape, made.type = value.shape, value.type
        graph.outputs[:] = [made if output is value else output for output in graph.outputs]
