"""Read the quantised weights of a graph, whichever exporter wrote it."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.errors import ArtifactError
from propulsion_export.graph.quantisation.weights import QuantisedWeight, unpack_matmulnbits

# `<parameter>/Q4`, `<parameter>/DQ_Q8`; a further use of the weight has a number behind it. The
# builder of onnxruntime-genai writes `<MatMul>_Q4`.
_ENDING = re.compile(r"[/_](DQ_)?Q[48]([._]\d+)?$")


class Part(NamedTuple):
    """Rows of a quantised node's weight that are rows of a parameter.

    `node` is the node's name without its ending, such as `/model/layers.0/attn/qkv_proj/MatMul`;
    rows are from `start` to before `stop`, None: to the end.
    """

    node: str
    start: int = 0
    stop: int | None = None


def quantised_weights(
    model: ir.Model, places: Mapping[str, Sequence[Part]] | None = None
) -> dict[str, QuantisedWeight]:
    """The integers and scales of every quantised weight, by parameter name.

    Args:
        model: a finished graph, or one after `QuantiseWeights`; weights may be on disk.
        places: of each parameter, which rows of which nodes it is, one part behind the other.
            None: nodes are named by their parameter, as `QuantiseWeights` does. The builder of
            onnxruntime-genai names them by layer, and packs query, key and value.

    Raises:
        ArtifactError: a node has zero points, or is not in the graph.
    """
    nodes = {parameter_of(node): node for node in model.graph if _quantised(node)}
    if places is None:
        return {name: _read(node) for name, node in nodes.items()}
    missing = sorted({part.node for parts in places.values() for part in parts} - nodes.keys())
    if missing:
        raise ArtifactError(*(f"{name}: is no quantised node of the graph" for name in missing))
    read = {name: _read(node) for name, node in nodes.items()}
    return {parameter: _joined(read, parts) for parameter, parts in places.items()}


def parameter_of(node: ir.Node) -> str:
    """The name of a quantised node without what tells that it is one: the parameter's name."""
    return _ENDING.sub("", str(node.name))


def _quantised(node: ir.Node) -> bool:
    if node.op_type == "MatMulNBits":
        return True
    return node.op_type == "DequantizeLinear" and len(_shape(node.inputs[0])) == 2


def _read(node: ir.Node) -> QuantisedWeight:
    first = 3 if node.op_type == "MatMulNBits" else 2
    if any(value is not None for value in node.inputs[first : first + 1]):
        raise ArtifactError(f"{node.name}: has zero points, expected symmetric integers")
    if node.op_type == "MatMulNBits":
        return _read_matmulnbits(node)
    integers, scales = _constant(node, 0).astype(np.int8), _constant(node, 1)
    block = node.attributes.get_int("block_size", 0)
    rows = scales.T if block else scales.reshape(-1, 1)
    return QuantisedWeight(np.ascontiguousarray(integers.T), rows, block)


def _read_matmulnbits(node: ir.Node) -> QuantisedWeight:
    attributes = node.attributes
    packed, scales = _constant(node, 1), _constant(node, 2)
    outputs, inputs = attributes["N"].as_int(), attributes["K"].as_int()
    integers = unpack_matmulnbits(
        packed.reshape(outputs, -1), attributes.get_int("bits", 4), inputs
    )
    return QuantisedWeight(integers, scales.reshape(outputs, -1), attributes["block_size"].as_int())


def _joined(read: Mapping[str, QuantisedWeight], parts: Sequence[Part]) -> QuantisedWeight:
    found = [read[part.node] for part in parts]
    rows = [slice(part.start, part.stop) for part in parts]
    integers = [weight.integers[r] for weight, r in zip(found, rows, strict=True)]
    scales = [weight.scales[r] for weight, r in zip(found, rows, strict=True)]
    return QuantisedWeight(np.concatenate(integers), np.concatenate(scales), found[0].block_size)


def _constant(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ArtifactError(f"{node.name}: reads no constant, expected integers and scales")
    return value.const_value.numpy()


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    tensor = None if value is None else value.const_value
    return () if tensor is None else tuple(tensor.shape.numpy())
