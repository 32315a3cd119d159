"""Let initializers be slices of the rows of one input, a row for each row of the batch."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.passes.dimensions import BATCH


class SliceRows(ir.passes.InPlacePass):
    """Replace initializers [channels] by [batch, 1, channels] of an input `name` [batch, D].

    Attributes:
        name: the name of the new input, appended after the existing ones.
        parts: slots by initializer name, in the order in which a row holds them, without gaps.
    """

    def __init__(self, name: str, parts: Mapping[str, Slot]) -> None:
        super().__init__()
        self.name = name
        self.parts = parts

    def requires(self, model: ir.Model) -> None:
        for name, slot in self.parts.items():
            value = model.graph.initializers.get(name)
            if value is None or value.shape != (slot.length,):
                raise ir.passes.PreconditionError(
                    f"{name}: has shape {value and value.shape}, its slot {[slot.length]}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        olds = [graph.initializers[name] for name in self.parts]
        lengths = [slot.length for slot in self.parts.values()]
        rows = ir.Value(name=self.name, type=olds[0].type, shape=ir.Shape([BATCH, sum(lengths)]))
        graph.inputs.append(rows)
        axis = self._constant(graph, "axis", [1])
        sizes = self._constant(graph, "lengths", lengths)
        spread = ir.node("Unsqueeze", [rows, axis], name=f"{self.name}/Unsqueeze")
        spread.outputs[0].name = f"{self.name}.spread"
        split = ir.node(
            "Split",
            [spread.outputs[0], sizes],
            {"axis": 2},
            num_outputs=len(olds),
            name=f"{self.name}/Split",
        )
        for old, part, length in zip(olds, split.outputs, lengths, strict=True):
            graph.initializers.pop(str(old.name))
            part.name, part.type = f"{old.name}.part", old.type
            part.shape = ir.Shape([BATCH, 1, length])
            ir.convenience.replace_all_uses_with(old, part)
        graph.insert_before(next(iter(graph)), [spread, split])
        return ir.passes.PassResult(model, modified=True)

    def _constant(self, graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
        return add_constant(graph, f"{self.name}.{name}", np.array(numbers, np.int64))
