"""Give the dynamic dimensions names that mean something, the same for every input."""

import onnx_ir as ir

NAMES = ("batch", "sequence")


class NameDimensions(ir.passes.InPlacePass):
    """Call the first two dynamic dimensions of the inputs `batch` and `sequence` everywhere.

    The exporter gives each input symbols of its own (`s18`, `s43`), so that a reader, and an
    engine's profile, cannot know that they are equal.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        renamed: dict[str, str] = {}
        for value in model.graph.inputs:
            for dimension, name in zip(value.shape or (), NAMES, strict=False):
                if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                    renamed[str(dimension.value)] = name
        for value in _values(model.graph):
            if value.shape is not None:
                value.shape = ir.Shape([_rename(dimension, renamed) for dimension in value.shape])
        return ir.passes.PassResult(model, modified=bool(renamed))


def _rename(dimension: int | ir.SymbolicDim, renamed: dict[str, str]) -> int | str | None:
    if isinstance(dimension, int):
        return dimension
    symbol = str(dimension.value) if dimension.value is not None else None
    return renamed.get(symbol, symbol) if symbol else None


def _values(graph: ir.Graph) -> list[ir.Value]:
    produced = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *produced]
