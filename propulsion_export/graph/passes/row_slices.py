"""Slices of one input that has a row for each row of the batch."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.passes.dimensions import BATCH


def add_row_slices(
    graph: ir.Graph, name: str, kind: ir.TypeProtocol, lengths: Sequence[int]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Append an input `name` [batch, sum of lengths] to a graph, to be cut into slices.

    Returns:
        The nodes that cut it, not yet in the graph, and the slices, [batch, 1, length] each, which
        have no names; none of both where there are no lengths.
    """
    rows = ir.Value(name=name, type=kind, shape=ir.Shape([BATCH, sum(lengths)]))
    graph.inputs.append(rows)
    if not lengths:
        return [], []
    axis = add_constant(graph, f"{name}.axis", np.array([1], np.int64))
    sizes = add_constant(graph, f"{name}.lengths", np.array(lengths, np.int64))
    apart = ir.node("Unsqueeze", [rows, axis], name=f"{name}/Unsqueeze")
    wide = apart.outputs[0]
    wide.type, wide.shape = kind, ir.Shape([BATCH, 1, sum(lengths)])
    split = ir.node(
        "Split", [wide, sizes], {"axis": 2}, num_outputs=len(lengths), name=f"{name}/Split"
    )
    for part, length in zip(split.outputs, lengths, strict=True):
        part.type, part.shape = kind, ir.Shape([BATCH, 1, length])
    return [apart, split], list(split.outputs)
