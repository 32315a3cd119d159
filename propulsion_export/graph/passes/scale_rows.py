"""Give each row of a batch scales of its own."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.passes.dimensions import BATCH
from propulsion_export.graph.passes.row_slices import add_row_slices
from propulsion_export.graph.passes.scale_products import ScaleProduct, products_by

_RANK = 3  # of [batch, 1, channels], which most scaled values broadcast with


class ScalesToRows(ir.passes.InPlacePass):
    """Replace scales by slices of one input, `name` of shape [batch, D].

    A scale [channels] becomes [batch, 1, channels], with as many axes as the value that it
    multiplies. It must multiply values [batch, …, channels], or a table [1, …, channels] that is
    then added to such; not tokens in one axis with the rows. The new input is there even if the
    graph has no scale.

    Attributes:
        name: the name of the new input, appended after the existing ones.
        parts: slots by initializer name, in the order of their offsets, without gaps; those that
            are not in the graph are skipped.
        dtype: of the scales and of the new input.
    """

    def __init__(self, name: str, parts: Mapping[str, Slot], dtype: ir.DataType) -> None:
        super().__init__()
        self.name = name
        self.parts = parts
        self.dtype = dtype

    def requires(self, model: ir.Model) -> None:
        for name, scale in self._scales(model).items():
            for product in products_by(scale):
                if product.scale is not scale or not _has_rows(product):
                    raise ir.passes.PreconditionError(
                        f"{name}: multiplies a value of shape {product.other.shape}, expected "
                        f"[{BATCH}, …, {self.parts[name].length}]"
                    )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, scales = model.graph, self._scales(model)
        lengths = [slot.length for slot in self.parts.values()]
        nodes, slices = add_row_slices(graph, self.name, ir.TensorType(self.dtype), lengths)
        for name, part in zip(self.parts, slices, strict=True):
            part.name = f"{name}.rows"
            if name in scales:
                nodes += self._replace(graph, scales[name], part)
                graph.initializers.pop(name)
        graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)

    def _replace(self, graph: ir.Graph, scale: ir.Value, part: ir.Value) -> list[ir.Node]:
        """Let each Mul by `scale` read `part` with the right number of axes; returns new nodes."""
        made: dict[int, ir.Node] = {}
        for product in list(products_by(scale)):
            assert product.other.shape is not None
            rank = len(product.other.shape)
            if rank != _RANK and rank not in made:
                made[rank] = self._with_axes(graph, part, rank)
            fitting = made[rank].outputs[0] if rank in made else part
            product.node.replace_input_with(product.index, fitting)
            product.node.outputs[0].shape = ir.Shape([BATCH, *product.other.shape[1:]])
        return list(made.values())

    def _with_axes(self, graph: ir.Graph, part: ir.Value, rank: int) -> ir.Node:
        operator = "Unsqueeze" if rank > _RANK else "Squeeze"
        axes = list(range(1, rank - 2)) if rank > _RANK else [1]
        name = f"{self.name}.axes{rank}"
        constant = graph.initializers.get(name) or add_constant(
            graph, name, np.array(axes, np.int64)
        )
        node = ir.node(operator, [part, constant])
        assert part.shape is not None
        output, channels = node.outputs[0], part.shape[2]
        output.name, output.type = f"{part.name}.{rank}", part.type
        output.shape = ir.Shape([BATCH, *[1] * (rank - 2), channels])
        return node

    def _scales(self, model: ir.Model) -> dict[str, ir.Value]:
        initializers = model.graph.initializers
        return {name: initializers[name] for name in self.parts if name in initializers}


def _has_rows(product: ScaleProduct) -> bool:
    """Whether a Mul scales [batch, …, channels], or a table that rows are added to."""
    shape, scale = product.other.shape, product.scale.shape
    if shape is None or scale is None or len(shape) < 2 or len(scale) != 1:
        return False
    if shape[-1] != scale[0]:
        return False
    return _starts_with_batch(shape) or (shape[0] == 1 and _joins_rows(product.node.outputs[0]))


def _joins_rows(table: ir.Value) -> bool:
    """Whether all that is done with a table [1, …, channels] is to add it to rows of its rank."""
    assert table.shape is not None
    rank, uses = len(table.shape), table.uses()
    return bool(uses) and all(
        node.op_type == "Add"
        and (shape := node.outputs[0].shape) is not None
        and len(shape) == rank
        and _starts_with_batch(shape)
        for node, _ in uses
    )


def _starts_with_batch(shape: ir.Shape) -> bool:
    batch = shape[0]
    return isinstance(batch, ir.SymbolicDim) and batch.value == BATCH
