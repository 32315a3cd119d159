"""Build the rows of a bank into a graph."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.graph.passes.constants import add_constant

BANK_FILE = "propulsion_bank.bin"


class BuildInBank(ir.passes.InPlacePass):
    """Make the input `propulsion_bank` [adapters, D] an initializer stored in BANK_FILE.

    An unknown id gives its row NaN: it must neither choose another client's adapter, as a negative
    index would, nor fail the batch with other clients' rows.

    Args:
        directory: the directory of the graph and the file.
        rows: the number of adapters in the file, the base model included; a row of NaN follows.
    """

    def __init__(self, directory: Path, rows: int) -> None:
        super().__init__()
        self.directory = directory
        self.rows = rows

    def requires(self, model: ir.Model) -> None:
        bank = {value.name: value for value in model.graph.inputs}.get(BANK_INPUT)
        if bank is None or bank.dtype is None or bank.shape is None or len(bank.shape) != 2:
            raise ir.passes.PreconditionError(
                f"{BANK_INPUT}: expected an input of shape [adapters, D], found "
                f"{bank and bank.shape}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        bank = next(value for value in model.graph.inputs if value.name == BANK_INPUT)
        assert bank.shape is not None
        assert bank.dtype is not None
        model.graph.inputs.remove(bank)
        bank.shape = ir.Shape([self.rows + 1, bank.shape[1]])
        bank.const_value = ir.ExternalTensor(
            BANK_FILE,
            offset=0,
            length=(self.directory / BANK_FILE).stat().st_size,
            dtype=bank.dtype,
            shape=bank.shape,
            name=BANK_INPUT,
            base_dir=self.directory,
        )
        model.graph.register_initializer(bank)
        self._guard_(model.graph)
        return ir.passes.PassResult(model, modified=True)

    def _guard_(self, graph: ir.Graph) -> None:
        """Make every unknown id choose the last row."""
        ids = next(value for value in graph.inputs if value.name == IDS_INPUT)
        uses = list(ids.uses())
        zero, last = (
            add_constant(graph, f"{IDS_INPUT}.{number}", np.array(number, np.int64))
            for number in (0, self.rows)
        )
        at_least = ir.node("GreaterOrEqual", [ids, zero])
        below = ir.node("Less", [ids, last])
        known = ir.node("And", [at_least.outputs[0], below.outputs[0]])
        chosen = ir.node("Where", [known.outputs[0], ids, last])
        for node, index in uses:
            node.replace_input_with(index, chosen.outputs[0])
        graph.insert_before(next(iter(graph)), [at_least, below, known, chosen])
