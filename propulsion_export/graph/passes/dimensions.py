"""Give dynamic dimensions meaningful names, the same in every input."""

import re
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from propulsion_export.artifacts.tensor_names import PAST, PRESENT

BATCH, SEQUENCE = "batch", "sequence"
PAST_SEQUENCE, TOTAL_SEQUENCE = "past_sequence", "total_sequence"
ENCODER_SEQUENCE = "encoder_sequence"
_SYMBOL = re.compile(r"\bs\d+\b")


class NameDimensions(ir.passes.InPlacePass):
    """Call the dynamic dimensions of the inputs `batch` and `sequence` everywhere.

    With a cache there are `past_sequence`, its length, and `total_sequence`, that with the new
    tokens; `encoder_sequence` is the length of the encoder's output that a decoder reads.
    The exporter gives each input symbols of its own (`s18`, `s43`), so that a reader, and an
    engine's profile, cannot know that they are equal; fixed sizes that it writes as symbols (`"2"`)
    become numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        cached = any(str(value.name).startswith(f"{PAST}.") for value in graph.inputs)
        renamed: dict[str, str] = {}
        for value in graph.inputs:
            for axis, name in _axes(str(value.name), cached):
                if value.shape is not None and axis < len(value.shape):
                    dimension = value.shape[axis]
                    if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                        renamed[str(dimension.value)] = name
        for value in _values(graph):
            if value.shape is not None:
                value.shape = ir.Shape([_rename(dimension, renamed) for dimension in value.shape])
        for value in graph.outputs:
            if value.shape is not None and str(value.name).startswith(f"{PRESENT}."):
                value.shape = _with(value.shape, dict(_axes(str(value.name), cached)))
        return ir.passes.PassResult(model, modified=bool(renamed))


def _axes(name: str, cached: bool) -> Iterator[tuple[int, str]]:
    """Axis and dimension name of an input or output; `cached`: the graph reads a cache."""
    yield 0, BATCH
    in_cache = name.startswith((f"{PAST}.", f"{PRESENT}."))
    if name.startswith("encoder_") or (in_cache and ".encoder." in name):
        yield 2 if in_cache else 1, ENCODER_SEQUENCE
    elif name.startswith(f"{PAST}."):
        yield 2, PAST_SEQUENCE
    elif name.startswith(f"{PRESENT}."):
        yield 2, TOTAL_SEQUENCE if cached else SEQUENCE
    else:
        yield 1, TOTAL_SEQUENCE if cached and name == "attention_mask" else SEQUENCE


def _with(shape: ir.Shape, names: Mapping[int, str]) -> ir.Shape:
    """A shape with named dimensions; a number stays, since the size is fixed there."""
    return ir.Shape(
        [
            dimension if isinstance(dimension, int) else names.get(axis, dimension)
            for axis, dimension in enumerate(shape)
        ]
    )


def _rename(dimension: int | ir.SymbolicDim, renamed: Mapping[str, str]) -> int | str | None:
    if isinstance(dimension, int):
        return dimension
    if dimension.value is None:
        return None
    symbol = str(dimension.value)
    if symbol.isdigit():
        return int(symbol)
    if symbol in renamed:
        return renamed[symbol]
    return _SYMBOL.sub(lambda match: renamed.get(match[0], match[0]), symbol)


def _values(graph: ir.Graph) -> list[ir.Value]:
    produced = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *produced]
