"""Make every input of a graph required, since TensorRT drops optional ones."""

from collections.abc import Sequence

import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.tensor_names import BANK_INPUT, PACKED_INPUTS


def require_inputs_(model: ir.Model, *, constant: Sequence[str] = ()) -> None:
    """Remove the defaults of inputs, in place: TensorRT's parser drops inputs that have one.

    Inputs named in `constant` become weights: they keep their default and are no longer inputs.
    Fixed dimensions that were exported as symbols of digits become numbers.
    """
    graph = model.graph
    for value in list(graph.inputs):
        _fix_digits_(value)
        if value.name is None or value.name not in graph.initializers:
            continue
        if value.name in constant:
            graph.inputs.remove(value)
        else:
            graph.initializers.pop(value.name)
            value.const_value = None
    for value in graph.outputs:
        _fix_digits_(value)


def adapter_inputs(model: ir.Model) -> tuple[str, ...]:
    """The names of the graph's inputs that carry adapters."""
    names = {value.name for value in model.graph.inputs}
    return tuple(name for name in (*PACKED_INPUTS, BANK_INPUT) if name in names)


def give_default_(model: ir.Model, name: str, values: Array) -> None:
    """Give an input a default value, in place."""
    value = next(value for value in model.graph.inputs if value.name == name)
    value.shape = ir.Shape(values.shape)
    value.const_value = ir.tensor(values, name=name)
    model.graph.register_initializer(value)


def _fix_digits_(value: ir.Value) -> None:
    if value.shape is not None:
        value.shape = ir.Shape(
            int(text) if (text := str(getattr(size, "value", size))).isdigit() else size
            for size in value.shape
        )
