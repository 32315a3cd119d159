"""Quantise what linear layers read, too: int8 activations with scales that are constants."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.quantisation.reading import parameter_of

_LARGEST = 127


class QuantiseActivations(ir.passes.InPlacePass):
    """Put a QuantizeLinear and a DequantizeLinear before each layer with a quantised weight.

    Scales are symmetric, one for each value; layers that read the same value share them. Zero
    points are zero, as TensorRT needs them.

    Attributes:
        largest: the largest magnitude of each layer's inputs, by the layer's parameter.
    """

    def __init__(self, largest: Mapping[str, float]) -> None:
        super().__init__()
        self.largest = largest

    def requires(self, model: ir.Model) -> None:
        unknown = [
            f"{parameter}: the inputs of its layer were not measured"
            for _, parameter in _layers(model)
            if parameter not in self.largest
        ]
        if unknown:
            raise ir.passes.PreconditionError("; ".join(unknown))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        readers: dict[ir.Value, list[tuple[ir.Node, str]]] = {}
        for node, parameter in _layers(model):
            value = node.inputs[0]
            assert value is not None
            readers.setdefault(value, []).append((node, parameter))
        uses: Counter[str] = Counter()
        for value, layers in readers.items():
            first, parameter = layers[0]
            number = f".{uses[parameter]}" if uses[parameter] else ""
            uses[parameter] += 1
            largest = max(self.largest[parameter] for _, parameter in layers)
            name = f"{parameter}_input{number}"
            quantised = _round_trip(model.graph, first, value, largest, name)
            for node, _ in layers:
                node.replace_input_with(0, quantised)
        return ir.passes.PassResult(model, modified=bool(readers))


def _layers(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The layers whose weight a DequantizeLinear gives, with its parameter."""
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[1] is not None:
            producer = node.inputs[1].producer()
            if producer is not None and producer.op_type == "DequantizeLinear":
                yield node, parameter_of(str(producer.name))


def _round_trip(
    graph: ir.Graph, first: ir.Node, value: ir.Value, largest: float, name: str
) -> ir.Value:
    """The value as int8 and back, computed before the first layer that reads it."""
    assert value.dtype is not None
    numpy_type = value.dtype.numpy()
    wanted = max(largest / _LARGEST, float(np.finfo(numpy_type).smallest_normal))
    scale = rounded(np.array(wanted), numpy_type)
    constants = [
        add_constant(graph, f"{name}_scale", scale),
        add_constant(graph, f"{name}_zero_point", np.array(0, np.int8)),
    ]
    quantise = ir.node("QuantizeLinear", [value, *constants], name=f"{name}_Q8")
    back = ir.node("DequantizeLinear", [quantise.outputs[0], *constants], name=f"{name}_DQ8")
    quantise.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    back.outputs[0].type = value.type
    quantise.outputs[0].shape = back.outputs[0].shape = value.shape
    graph.insert_before(first, [quantise, back])
    return back.outputs[0]
