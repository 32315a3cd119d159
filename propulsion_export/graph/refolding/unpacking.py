"""Take a packed input of a graph that was written apart again: the inverse of `packing`."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.quantisation.sinks import read_constant


class UnpackInput(ir.passes.InPlacePass):
    """Replace the parts of a packed graph input, `name` of shape [D], by initializers.

    Attributes:
        name: the packed input; a graph without it stays as it is.
        values: of the whole input, float64 [D].
        slots: by the name of the initializer that each becomes; parts that hold several slots, as
            those of packed query, key and value, are named by the input and their offset.
        parts: after the call, the values of each initializer, float64, by its name. Those that
            nothing reads are left out.
    """

    def __init__(self, name: str, values: Array, slots: Mapping[str, Slot]) -> None:
        super().__init__()
        self.name = name
        self.values = values
        self._names = {(slot.offset, slot.length): name for name, slot in slots.items()}
        self.parts: dict[str, Array] = {}

    def requires(self, model: ir.Model) -> None:
        for value in self._inputs(model):
            if value.shape != self.values.shape:
                raise ir.passes.PreconditionError(
                    f"{self.name}: has shape {value.shape}, its values {list(self.values.shape)}"
                )
            for node, _ in value.uses():
                if node.op_type == "Split" and read_lengths(node) is None:
                    raise ir.passes.PreconditionError(f"{node.name}: splits at no constants")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        inputs = self._inputs(model)
        for packed in inputs:
            for offset, value in list(_pieces(packed)):
                self._replace(graph, offset, value)
            remove_readers(graph, packed)
            graph.inputs.remove(packed)
            graph.initializers.pop(self.name, None)
        return ir.passes.PassResult(model, modified=bool(inputs))

    def _inputs(self, model: ir.Model) -> list[ir.Value]:
        return [value for value in model.graph.inputs if value.name == self.name]

    def _replace(self, graph: ir.Graph, offset: int, value: ir.Value) -> None:
        if not value.uses():
            return
        shape = value.shape.numpy() if value.shape is not None else ()
        length = int(np.prod(shape))
        name = self._names.get((offset, length), f"{self.name}.{offset}")
        self.parts[name] = part = self.values[offset : offset + length].reshape(shape)
        assert value.dtype is not None
        value.name = f"{name}.packed"
        new = add_constant(graph, name, part.astype(value.dtype.numpy()))
        ir.convenience.replace_all_uses_with(value, new)


def read_lengths(split: ir.Node) -> list[int] | None:
    """How many elements each output of a Split has; None if that is no constant."""
    lengths = split.inputs[1] if len(split.inputs) > 1 else None
    values = None if lengths is None else read_constant(lengths)
    return None if values is None else [int(length) for length in values]


def remove_readers(graph: ir.Graph, value: ir.Value) -> None:
    """Remove the nodes behind a value whose results nothing reads, with their own constants."""
    for node, _ in list(value.uses()):
        constants = [each for each in node.inputs[1:] if each is not None and each.is_initializer()]
        for output in node.outputs:
            remove_readers(graph, output)
        graph.remove(node, safe=True)
        for constant in constants:
            if not constant.uses():
                graph.initializers.pop(str(constant.name), None)


def _pieces(packed: ir.Value) -> Iterator[tuple[int, ir.Value]]:
    """The offset of each part, and the value that holds it in its own shape."""
    splits = [node for node, _ in packed.uses() if node.op_type == "Split"]
    for split in splits:
        offset = 0
        for length, part in zip(read_lengths(split) or (), split.outputs, strict=True):
            yield from ((offset, value) for value in _shaped(part))
            offset += length
    if not splits:
        yield from ((0, value) for value in _shaped(packed))


def _shaped(part: ir.Value) -> Iterator[ir.Value]:
    """The part itself, and what a Reshape to a shape of its own makes of it."""
    for node, _ in part.uses():
        if node.op_type == "Reshape":
            yield node.outputs[0]
    if any(node.op_type != "Reshape" for node, _ in part.uses()):
        yield part
