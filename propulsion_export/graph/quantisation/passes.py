"""Replace the weights of linear layers by integers and scales."""

from collections import Counter
from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.quantisation.linear_layers import LinearLayer, linear_layers
from propulsion_export.graph.quantisation.weights import (
    quantise_for_matmulnbits,
    quantise_positive,
)

MICROSOFT = "com.microsoft"
QDQ_BLOCKS_OPSET = 21  # brought int4 and blocks to DequantizeLinear
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class QuantiseWeights(ir.passes.InPlacePass):
    """Quantise the weight of each MatMul and Gemm that is an initializer of two dimensions.

    A weight that is used twice, as ALBERT's are, is quantised once. One that an embedding shares
    stays beside its integers, in floating point. New nodes and initializers are named by the
    parameter and an ending, in the manner of ONNX Runtime's quantiser: `…weight_DQ_Q4` and
    `…weight_DQ_scales` are read by the node `…weight/DQ_Q4`, since TensorRT gives an initializer's
    name to a layer.

    Attributes:
        scheme: bits, form and block size; activations are `activations.QuantiseActivations`.
        keep: parameters that stay in floating point, such as heads that adapters bring.
    """

    def __init__(self, scheme: QuantizationEntry, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.scheme = scheme
        self.keep = frozenset(keep)

    def requires(self, model: ir.Model) -> None:
        opset, needed = model.opset_imports[""], needed_opset(self.scheme)
        if opset < needed:
            raise ir.passes.PreconditionError(f"the graph has opset {opset}, expected {needed}")
        layers = self._layers(model)
        wrong = {str(x.weight.dtype) for x in layers if x.weight.dtype not in _FLOATS}
        if wrong:
            raise ir.passes.PreconditionError(f"weights are {wrong}, expected float32 or float16")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers = self._layers(model)
        done: dict[str, list[ir.Value]] = {}
        uses: Counter[str] = Counter()
        for layer in layers:
            if layer.parameter not in done:
                done[layer.parameter] = self._constants(model.graph, layer)
            constants, number = done[layer.parameter], uses[layer.parameter]
            put = _put_dequantised if self.scheme.form == "qdq" else _put_matmulnbits
            name = f"{layer.parameter}/{self._kind}{f'.{number}' if number else ''}"
            put(model.graph, layer, constants, self.scheme, name)
            uses[layer.parameter] += 1
        if self.scheme.form == "matmulnbits":
            model.opset_imports[MICROSOFT] = 1
        for layer in layers:
            _remove_unused(model.graph, layer.weight)
        return ir.passes.PassResult(model, modified=bool(layers))

    def _layers(self, model: ir.Model) -> list[LinearLayer]:
        return _quantisable(model, self.keep)

    def _constants(self, graph: ir.Graph, layer: LinearLayer) -> list[ir.Value]:
        """Integers and scales as the operator reads them, in the graph."""
        bits, block = self.scheme.bits, self.scheme.block_size
        if self.scheme.form == "matmulnbits":
            integers, scales = quantise_for_matmulnbits(layer.matrix(), bits, block)
        else:
            integers, scales = _dequantised_by_operator(layer.matrix(), self.scheme)
        named = {self._kind: integers, f"{self._kind[:-2]}scales": scales}
        return [add_constant(graph, f"{layer.parameter}_{e}", v) for e, v in named.items()]

    @property
    def _kind(self) -> str:
        """How ONNX Runtime's quantiser ends the names of what it makes."""
        return f"{'DQ_' if self.scheme.form == 'qdq' else ''}Q{self.scheme.bits}"


def check_quantisable(
    model: ir.Model, scheme: QuantizationEntry, keep: Collection[str] = ()
) -> None:
    """Refuse a graph that `QuantiseWeights` makes nothing of.

    Raises:
        UsageError: the block size does not divide a layer's inputs (form `qdq`).
        BaseModelError: there is nothing to quantise.
    """
    layers = _quantisable(model, keep)
    if not layers:
        raise BaseModelError("found no linear layer to quantise", remedy="Leave out --quantize.")
    _check_blocks(layers, scheme)


def needed_opset(scheme: QuantizationEntry) -> int:
    """The lowest opset of a graph in which weights are quantised by this scheme."""
    blocks = scheme.form == "qdq" and (scheme.bits == 4 or scheme.block_size > 0)
    return QDQ_BLOCKS_OPSET if blocks else 1


def _quantisable(model: ir.Model, keep: Collection[str]) -> list[LinearLayer]:
    return [layer for layer in linear_layers(model) if layer.parameter not in keep]


def _dequantised_by_operator(matrix: Array, scheme: QuantizationEntry) -> tuple[Array, Array]:
    """Integers [inputs, outputs] and scales [blocks, outputs] or [outputs]."""
    found = quantise_positive(matrix.T, scheme.bits, scheme.block_size)
    stored = np.dtype(ml_dtypes.int4 if scheme.bits == 4 else np.int8)
    integers = np.ascontiguousarray(found.integers.T).astype(stored)
    scales = np.ascontiguousarray(found.scales.T)
    return integers, scales if scheme.block_size else scales[0]


def _put_dequantised(
    graph: ir.Graph,
    layer: LinearLayer,
    constants: list[ir.Value],
    scheme: QuantizationEntry,
    name: str,
) -> None:
    """Let the node read its weight, [inputs, outputs], from a DequantizeLinear."""
    block = {"block_size": scheme.block_size} if scheme.block_size else {}
    axis = {"axis": 0 if block else 1}
    node = ir.node("DequantizeLinear", constants, axis | block, name=name)
    output = node.outputs[0]
    output.type, output.shape = constants[1].type, constants[0].shape
    graph.insert_before(layer.node, node)
    layer.node.replace_input_with(1, output)
    if layer.node.op_type == "Gemm":
        layer.node.attributes["transB"] = ir.AttrInt64("transB", 0)


def _put_matmulnbits(
    graph: ir.Graph,
    layer: LinearLayer,
    constants: list[ir.Value],
    scheme: QuantizationEntry,
    name: str,
) -> None:
    """Replace the node by a MatMulNBits, and by an Add where it has a bias."""
    inputs, outputs = layer.matrix().shape
    sizes = {"K": inputs, "N": outputs, "bits": scheme.bits, "block_size": scheme.block_size}
    if scheme.accuracy_level:
        sizes["accuracy_level"] = scheme.accuracy_level
    old = layer.node.outputs[0]
    product = ir.node(
        "MatMulNBits", [layer.node.inputs[0], *constants], sizes, domain=MICROSOFT, name=name
    )
    nodes = [product]
    if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
        nodes.append(ir.node("Add", [product.outputs[0], layer.node.inputs[2]]))
        product.outputs[0].name = f"{name}.product"
        product.outputs[0].type, product.outputs[0].shape = old.type, old.shape
    new = nodes[-1].outputs[0]
    new.type, new.shape, new.name, old.name = old.type, old.shape, old.name, f"{old.name}.float"
    graph.insert_before(layer.node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(layer.node, safe=True)


def _check_blocks(layers: list[LinearLayer], scheme: QuantizationEntry) -> None:
    """TensorRT reads whole blocks only; MatMulNBits fills the last one up."""
    if scheme.form != "qdq" or not scheme.block_size:
        return
    widths = {layer.parameter: layer.matrix().shape[0] for layer in layers}
    wrong = [
        f"--block-size {scheme.block_size}: {parameter} has {width} inputs, expected a multiple of "
        "the block size"
        for parameter, width in widths.items()
        if width % scheme.block_size
    ]
    if wrong:
        raise UsageError(
            *wrong,
            remedy="Choose a divisor of all of them, or --quantization-form matmulnbits.",
        )


def _remove_unused(graph: ir.Graph, weight: ir.Value) -> None:
    """Remove a weight, and the Transposes of it, that nothing reads any more."""
    for node, _ in list(weight.uses()):
        if node.op_type == "Transpose" and not node.outputs[0].uses():
            graph.remove(node, safe=True)
    if not weight.uses() and weight.name in graph.initializers:
        graph.initializers.pop(str(weight.name))
