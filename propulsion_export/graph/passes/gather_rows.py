"""Gather the rows that a graph computes with from a bank."""

import onnx_ir as ir

from propulsion_export.artifacts.tensor_names import ADAPTERS_DIMENSION, BANK_INPUT, IDS_INPUT
from propulsion_export.graph.passes.dimensions import BATCH


class GatherRows(ir.passes.InPlacePass):
    """Replace the input `name` [batch, D] by rows of `propulsion_bank` [adapters, D].

    `adapter_ids`, int64 [batch], chooses the bank's row for each row of the batch.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def requires(self, model: ir.Model) -> None:
        found = {value.name: value for value in model.graph.inputs}.get(self.name)
        if found is None or found.shape is None or len(found.shape) != 2:
            raise ir.passes.PreconditionError(
                f"{self.name}: expected an input of shape [batch, D], found {found and found.shape}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        old = next(value for value in graph.inputs if value.name == self.name)
        assert old.shape is not None
        bank = ir.Value(
            name=BANK_INPUT, type=old.type, shape=ir.Shape([ADAPTERS_DIMENSION, old.shape[1]])
        )
        ids = ir.Value(
            name=IDS_INPUT, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([BATCH])
        )
        gather = ir.node("Gather", [bank, ids], {"axis": 0})
        rows = gather.outputs[0]
        rows.name, rows.type, rows.shape = f"{self.name}.chosen", old.type, old.shape
        ir.convenience.replace_all_uses_with(old, rows)
        graph.inputs.remove(old)
        graph.inputs.extend([bank, ids])
        graph.insert_before(next(iter(graph)), gather)
        return ir.passes.PassResult(model, modified=True)
