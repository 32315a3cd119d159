"""Put an adapter's scales behind the modules of a base model's graph, found by their weights.

A traced graph names its weights by parameter; nothing else in it tells the modules apart. A module
is refused whose weight is not there by its name, or is read more than once: equal weights may have
become one, and a tied one may be the other module's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.errors import AdapterError
from propulsion_export.graph.genai.editing import behind_, scale_input_
from propulsion_export.graph.optimise import TRANSPOSED
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.scaling.attach import initializer_name

_REMEDY = "Take a switchable artifact of the base model as the source; it marks each module."
# How the weight of a module may be called: as traced, transposed, or quantised.
_WEIGHTS = ("", TRANSPOSED, "_Q4", "_Q8", "_DQ_Q4", "_DQ_Q8")
_STEPS = ("Transpose", "Cast", "CastLike", "Identity", "DequantizeLinear", "Reshape")
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "Gather", "LayerNormalization", "Mul")


@dataclass(frozen=True)
class Brought:
    """What an adapter brings into graphs, float64, by the name of the initializer.

    Attributes:
        scales: read by multiplies behind (or before) the scaled modules.
        others: trained biases and saved modules.
    """

    scales: dict[str, Array]
    others: dict[str, Array]


def insert_scales_(programs: Mapping[str, ir.Model], adapter: Adapter) -> Brought:
    """Multiply the outputs, or inputs, of an adapter's modules by initializers, in place.

    Raises:
        AdapterError: a module, bias or saved parameter cannot be found; all of them are named.
    """
    findings = []
    for path, scale in adapter.scales.items():
        found = [_insert_(name, program.graph, path, scale) for name, program in programs.items()]
        reasons = [reason for reason in found if reason is not None]
        if set(reasons) - {_MISSING} or len(reasons) == len(found):
            findings.append(f"{path}: {max(reasons, key=lambda reason: reason != _MISSING)}")
    others = {f"{path}.bias": bias for path, bias in adapter.biases.items()} | dict(adapter.modules)
    brought: dict[str, Array] = {}
    for name, values in others.items():
        place = _place_of(programs, name, values)
        if place is None:
            findings.append(f"{name}: is not in the graph under its name, so it cannot be set")
        else:
            brought |= place
    if findings:
        raise AdapterError(*findings, remedy=_REMEDY)
    scales = {
        initializer_name(path, scale.side): np.asarray(scale.values, np.float64)
        for path, scale in adapter.scales.items()
    }
    return Brought(scales, brought)


_MISSING = "its weight is not in the graph under its name"


def _insert_(file: str, graph: ir.Graph, path: str, scale: Scale) -> str | None:
    """Put one scale into a graph; why that is not possible, or None."""
    if scale.values.ndim > 1:
        return "scales experts, which only a switchable graph has a place for"
    weights = [f"{path}.weight{ending}" for ending in _WEIGHTS]
    named = [graph.initializers[name] for name in weights if name in graph.initializers]
    if not named:
        return _MISSING
    if _other_half(path) in file:
        return "its weight is shared by encoder and decoder"
    nodes = [node for weight in named for node in _readers(weight)]
    if len(nodes) != 1 or nodes[0][0].op_type not in _PRODUCTS:
        return f"its weight is read by {len(nodes)} nodes of the graph, expected one of a layer"
    node = nodes[0][0]
    values = np.ones(scale.values.shape)
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    name = initializer_name(path, scale.side)
    new = add_constant(graph, name, values.astype(dtype.numpy()))
    if scale.side == "input":
        scale_input_(graph, node, new)
    else:
        behind_(graph, "Mul", _with_bias(node.outputs[0], path), new)
    return None


def _other_half(path: str) -> str:
    """How the files of an encoder-decoder begin that the module at `path` is not in."""
    names = path.split(".")
    halves = {"encoder": "decoder_", "decoder": "encoder_"}
    return next((other for half, other in halves.items() if half in names), "/")


def _readers(weight: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that compute with a weight."""
    for node, index in weight.uses():
        if node.op_type in _STEPS or (node.op_type == "Add" and _adds_a_number(node)):
            yield from _readers(node.outputs[0])
        else:
            yield node, index


def _adds_a_number(node: ir.Node) -> bool:
    constants = [each for each in node.inputs if each is not None and each.const_value is not None]
    return any(each.const_value is not None and each.const_value.size == 1 for each in constants)


def _with_bias(value: ir.Value, path: str) -> ir.Value:
    """The sum with the module's own bias, if that is what reads the value."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return value
    node, index = uses[0]
    bias = node.inputs[1 - index]
    return node.outputs[0] if bias is not None and bias.name == f"{path}.bias" else value


def _place_of(
    programs: Mapping[str, ir.Model], name: str, values: Array
) -> dict[str, Array] | None:
    """The name of a parameter's initializer, and its values as that has them."""
    for stored, kept in ((name, values), (f"{name}{TRANSPOSED}", values.T)):
        for program in programs.values():
            value = program.graph.initializers.get(stored)
            if value is not None and len(value.uses()) == 1:
                return {stored: kept}
    return None
