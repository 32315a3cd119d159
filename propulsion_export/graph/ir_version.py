"""Declare the lowest ONNX IR version that a graph needs, so that older servers load it."""

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

# The IR version that brought a type of tensor, as onnx.proto lists them: onnx has no table of it.
_SINCE = {
    "FLOAT8E4M3FN": 9,
    "FLOAT8E4M3FNUZ": 9,
    "FLOAT8E5M2": 9,
    "FLOAT8E5M2FNUZ": 9,
    "UINT4": 10,
    "INT4": 10,
    "FLOAT4E2M1": 11,
    "FLOAT8E8M0": 12,
    "UINT2": 13,
    "INT2": 13,
    "FLOAT6E2M3": 14,
    "FLOAT6E3M2": 14,
}


def lower_ir_version_(model: ir.Model) -> None:
    """Set the lowest IR version that the opsets and tensor types of `model` allow.

    What the exporter noted at nodes and values is removed: it needs IR version 10, and it names
    files of the machine that exported.
    """
    from onnx.helper import find_min_ir_version_for, make_opsetid

    opsets = [make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    elements = list(_elements(model))
    types = {str(getattr(element, "dtype", None)) for element in elements}
    model.ir_version = max(
        find_min_ir_version_for(opsets, ignore_unknown=True),
        *(_SINCE.get(name, 0) for name in types),
    )
    for element in elements:
        element.metadata_props.clear()


def _elements(model: ir.Model) -> Iterator[Any]:
    """Everything in `model` that carries metadata: graphs, nodes, values and their tensors."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        yield graph
        for node in graph:
            yield from (node, *node.outputs)
            yield from (
                attribute.value
                for attribute in node.attributes.values()
                if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR
            )
        yield from graph.inputs
        for value in graph.initializers.values():
            yield value
            if value.const_value is not None:
                yield value.const_value
