"""Pack many initializers into one flat graph input, split at the top of the graph."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.constants import add_constant


class PackInitializers(ir.passes.InPlacePass):
    """Replace initializers by slices of one graph input, `name` of shape [D].

    Attributes:
        name: the name of the new input, appended after the existing ones.
        parts: slots by initializer name, in the order of their offsets, without gaps.
        partial: whether some initializers may be missing, because they are in another graph. A
            graph without any gets no input.

    The input has no default yet: an optimiser would take that for a constant and fold it away.
    """

    def __init__(self, name: str, parts: Mapping[str, Slot], *, partial: bool = False) -> None:
        super().__init__()
        self.name = name
        self.parts = parts
        self.partial = partial

    def requires(self, model: ir.Model) -> None:
        missing = [name for name in self.parts if name not in model.graph.initializers]
        if missing and not self.partial:
            raise ir.passes.PreconditionError(
                f"{len(missing)} of {len(self.parts)} tensors are not in the graph: {missing[0]}, …"
            )
        values = [model.graph.initializers.get(name) for name in self.parts]
        dtypes = {str(value.dtype) for value in values if value is not None}
        if len(dtypes) > 1:
            raise ir.passes.PreconditionError(
                f"the tensors are of the types {', '.join(sorted(dtypes))}, expected one"
            )
        offset = 0
        for value, (name, slot) in zip(values, self.parts.items(), strict=True):
            if (value is not None and value.shape != slot.shape) or slot.offset != offset:
                raise ir.passes.PreconditionError(
                    f"{name}: has shape {value and value.shape} and offset {offset}, its slot "
                    f"{list(slot.shape)} and {slot.offset}"
                )
            offset += slot.length

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        olds = {name: v for name, v in graph.initializers.items() if name in self.parts}
        if not olds:
            return ir.passes.PassResult(model, modified=False)
        kind = next(iter(olds.values())).type
        total = sum(slot.length for slot in self.parts.values())
        packed = ir.Value(name=self.name, type=kind, shape=ir.Shape([total]))
        graph.inputs.append(packed)
        lengths = self._constant(graph, "lengths", [slot.length for slot in self.parts.values()])
        split = ir.node("Split", [packed, lengths], {"axis": 0}, num_outputs=len(self.parts))
        nodes = [split]
        for (name, slot), part in zip(self.parts.items(), split.outputs, strict=True):
            part.name, part.type = f"{name}.flat", kind
            part.shape = ir.Shape([slot.length])
            if name not in olds:
                continue
            new = part
            if len(slot.shape) > 1:
                shape = self._constant(graph, f"{name}.shape", list(slot.shape))
                reshape = ir.node("Reshape", [part, shape])
                nodes.append(reshape)
                new = reshape.outputs[0]
                new.type, new.shape = kind, ir.Shape(list(slot.shape))
            # The uses take the new value's name; the old initializer gives it up first.
            graph.initializers.pop(name)
            new.name = f"{name}.part"
            ir.convenience.replace_all_uses_with(olds[name], new)
        graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        left = [name for name in self.parts if name in model.graph.initializers]
        if left:
            raise ir.passes.PostconditionError(f"still initializers: {left}")

    def _constant(self, graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
        return add_constant(graph, f"{self.name}.{name}", np.array(numbers, np.int64))
