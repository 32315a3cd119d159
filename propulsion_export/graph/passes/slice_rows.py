"""Let initializers be slices of the rows of one input, a row for each row of the batch."""

from collections.abc import Mapping

import onnx_ir as ir

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.row_slices import add_row_slices


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
        assert olds[0].type is not None
        nodes, slices = add_row_slices(graph, self.name, olds[0].type, lengths)
        for old, part in zip(olds, slices, strict=True):
            graph.initializers.pop(str(old.name))
            part.name = f"{old.name}.part"
            ir.convenience.replace_all_uses_with(old, part)
        graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)
