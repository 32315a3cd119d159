"""Read the quantised weights of a graph as integers and scales, whatever form they have.

| node | integers | scales |
|---|---|---|
| MatMulNBits | uint8 [N, K/block, bytes], low nibble first | [N, K/block] |
| GatherBlockQuantized | the same, or a 4-bit tensor [rows, width] | [rows, width/block] |
| DequantizeLinear before a MatMul | int4 or int8 [K, N] | [K/block, N], or [N] |
| DequantizeLinear before a Gather or Transpose | int4 or int8 [N, K] | [N, K/block], or [N] |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.errors import ArtifactError
from propulsion_export.graph.quantisation.weights import (
    Bits,
    QuantisedWeight,
    dequantise,
    unpack_matmulnbits,
)

Use = Literal["linear", "embedding"]
# Behind them: the order of groups, and a bias.
_PLAIN_INPUTS = 4
_ATTRIBUTES = {
    *("K", "N", "bits", "block_size", "accuracy_level"),
    *("gather_axis", "quantize_axis"),
}
_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)


@dataclass(frozen=True)
class NodeWeight:
    """The weight of one node.

    Attributes:
        name: of the node that computes with it.
        use: of a linear layer or of an embedding.
        bits: of an integer.
        values: integers and scales; of an embedding, rows first.
    """

    name: str
    use: Use
    bits: Bits
    values: QuantisedWeight

    @property
    def positive(self) -> bool:
        """Whether the quantiser made scales above zero, and so no use of the lowest integer."""
        return int(self.values.integers.min(initial=0)) > -(1 << (self.bits - 1))


def node_weights(model: ir.Model) -> list[NodeWeight]:
    """The quantised weight of every node of a graph that computes with one.

    Raises:
        ArtifactError: a node keeps its weight in a form that is not in the table above.
    """
    return list(_found(model))


def float_weight(node: ir.Node) -> Array | None:
    """The dequantised weight of a MatMulNBits or DequantizeLinear, as what reads it takes it.

    Inputs first for a MatMulNBits. Each product of integer and scale is rounded once to the dtype
    of the scales. None if a DequantizeLinear reads no constant.

    Raises:
        ArtifactError: as by `node_weights`.
    """
    name, inputs_first = str(node.name), True
    if node.op_type == "MatMulNBits":
        values = _packed(node, name, "linear").values
    elif _constant(node.inputs[0]) is not None:
        values = _dequantised(node, name).values
        inputs_first = not _use(node)[1]
    else:
        return None
    weight = rounded(dequantise(values), values.scales.dtype)
    return weight.T if inputs_first else weight


def _found(model: ir.Model) -> Iterator[NodeWeight]:
    for node in model.graph.all_nodes():
        name = str(node.name)
        if node.op_type == "MatMulNBits":
            yield _packed(node, name, "linear")
        elif node.op_type == "GatherBlockQuantized":
            yield _packed(node, name, "embedding")
        elif node.op_type == "DequantizeLinear" and _constant(node.inputs[0]) is not None:
            yield _dequantised(node, name)
        elif node.op_type == "QuantizeLinear":
            _check_activation(node, name)
        elif node.op_type == "QMoE":
            raise ArtifactError(f"{name}: the quantised weights of experts cannot be read")


def _packed(node: ir.Node, name: str, use: Use) -> NodeWeight:
    raw, scales = _read(node.inputs[1 if use == "linear" else 0], name), _read(node.inputs[2], name)
    _check_symmetric(node, 3, name)
    _check_plain(node, name)
    bits: Bits = 8 if _integer(node, "bits", 4) == 8 else 4
    rows = _integer(node, "N", len(raw))
    integers = _unpacked(raw.reshape(rows, -1), bits)
    width = _integer(node, "K", integers.shape[1])
    block = _integer(node, "block_size", 32)
    values = QuantisedWeight(integers[:, :width], scales.reshape(rows, -1), block)
    return NodeWeight(name, use, bits, values)


def _unpacked(raw: Array, bits: int) -> Array:
    """Integers of packed bytes or of a 4-bit tensor, int8 [rows, width]."""
    if raw.dtype != np.uint8:
        return raw.astype(np.int8)
    return unpack_matmulnbits(raw, bits, raw.shape[1] * 8 // bits)


def _check_symmetric(node: ir.Node, index: int, name: str) -> None:
    """Refuse zero points: packed bytes have another one than zero where they name none."""
    zeros = node.inputs[index] if len(node.inputs) > index else None
    packed = node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    if zeros is not None and (packed or np.any(_read(zeros, name))):
        raise ArtifactError(f"{name}: has zero points, expected a symmetric quantisation")


def _check_activation(node: ir.Node, name: str) -> None:
    """Refuse an activation that is read back by another scale than it was rounded with."""
    _check_symmetric(node, 2, name)
    scale = _read(node.inputs[1], name)
    for user, _ in node.outputs[0].uses():
        if user.op_type != "DequantizeLinear":
            continue
        _check_symmetric(user, 2, str(user.name))
        if not np.array_equal(_read(user.inputs[1], name), scale):
            raise ArtifactError(
                f"{name}: its scale is {scale}, that of {user.name} behind it "
                f"{_read(user.inputs[1], name)}, expected the same"
            )


def _check_plain(node: ir.Node, name: str) -> None:
    """Refuse inputs and attributes that change what a packed weight means."""
    more = [value.name for value in node.inputs[_PLAIN_INPUTS:] if value is not None]
    unknown = sorted(node.attributes.keys() - _ATTRIBUTES)
    if more or unknown:
        raise ArtifactError(
            f"{name}: has {', '.join(map(str, [*more, *unknown]))}, expected its input, integers "
            "and scales, and nothing that changes them"
        )


def _dequantised(node: ir.Node, name: str) -> NodeWeight:
    data, scales = node.inputs[0], _read(node.inputs[1], name)
    integers = _read(data, name).astype(np.int8)
    bits: Bits = 4 if data is not None and data.dtype in _FOUR_BITS else 8
    _check_symmetric(node, 2, name)
    use, rows_first = _use(node)
    axis = _integer(node, "axis", 1) % 2
    if scales.ndim == 1:  # one scale for each channel of the axis
        scales = np.expand_dims(scales, 1 - axis)
    if not rows_first:
        integers, scales = integers.T, scales.T
    integers, block = np.ascontiguousarray(integers), _integer(node, "block_size", 0)
    return NodeWeight(name, use, bits, QuantisedWeight(integers, scales, block))


def _use(node: ir.Node) -> tuple[Use, bool]:
    """What reads a dequantised weight, and whether its rows are output channels."""
    value, transposed = node.outputs[0], False
    while (user := next(iter(value.uses()), None)) is not None:
        if user.node.op_type == "Gather":
            return "embedding", True
        if user.node.op_type == "Gemm":
            return "linear", transposed != bool(_integer(user.node, "transB", 0))
        if user.node.op_type == "MatMul":
            return "linear", transposed
        if user.node.op_type not in ("Transpose", "Cast", "Identity", "Reshape"):
            break
        transposed ^= user.node.op_type == "Transpose"
        value = user.node.outputs[0]
    raise ArtifactError(f"{node.name}: no MatMul, Gemm or Gather reads its weight")


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.value)


def _constant(value: ir.Value | None) -> Array | None:
    """A constant of the graph, also behind a Reshape; None if it is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    producer = value.producer()
    if producer is not None and producer.op_type in ("Reshape", "Identity"):
        return _constant(producer.inputs[0])
    return None


def _read(value: ir.Value | None, name: str) -> Array:
    found = _constant(value)
    if found is None:
        raise ArtifactError(f"{name}: its quantised weight is computed, expected a constant")
    return found
