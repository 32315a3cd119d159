"""Quantised layers that compute in floating point, judged by ONNX Runtime's own kernels."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from propulsion_export.errors import ArtifactError
from propulsion_export.graph.passes.float_layers import ComputeInFloat
from propulsion_export.graph.quantisation.weights import quantise_for_matmulnbits

# A weight that is dequantised, and activations that are rounded to steps of 0.5.
ROUNDED = """
<ir_version: 10, opset_import: ["" : 21]>
graph (float[n, 2] x) => (float[n, 2] y)
    <int8[2, 2] weight = {1, 2, 3, 4}, float[2] scale = {0.1, -0.2}, float step = {0.5},
     int8 zero = {0}> {
    steps = QuantizeLinear (x, step, zero)
    rounded = DequantizeLinear (steps, step, zero)
    dequantised = DequantizeLinear <axis = 1> (weight, scale)
    y = MatMul (rounded, dequantised)
}
"""
# The same weight, outputs first.
TRANSPOSED = """
<ir_version: 10, opset_import: ["" : 21]>
graph (float[n, 2] x) => (float[n, 2] y)
    <int8[2, 2] weight = {1, 3, 2, 4}, float[2] scale = {0.1, -0.2}> {
    dequantised = DequantizeLinear <axis = 0> (weight, scale)
    turned = Transpose <perm = [1, 0]> (dequantised)
    y = MatMul (x, turned)
}
"""
WEIGHT = np.array([[1, 2], [3, 4]]) * [0.1, -0.2]
X = np.array([[0.3, -0.7]], np.float32)
INPUTS, OUTPUTS = 1536, 48


def run(model, x=X):
    options = onnxruntime.SessionOptions()
    # It would make a MatMulNBits of the dequantised weight, which rounds activations itself.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def quantised(weight, level, bits=4, bias=None):
    """A graph whose one node multiplies by a weight [inputs, outputs] as MatMulNBits."""
    packed, scales = quantise_for_matmulnbits(weight, bits, 32)
    inputs, outputs = weight.shape
    x = ir.Value(name="x", shape=ir.Shape(["n", inputs]), type=ir.TensorType(ir.DataType.FLOAT))
    tensors = [ir.tensor(packed, name="q"), ir.tensor(scales, name="s")]
    values = [ir.Value(name=each.name, const_value=each) for each in tensors]
    if bias is not None:
        values += [None, None, ir.Value(name="b", const_value=ir.tensor(bias, name="b"))]
    attributes = {
        "K": inputs, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": level,
    }  # fmt: skip
    node = ir.node("MatMulNBits", [x, *values], attributes, domain="com.microsoft", name="layer")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["n", outputs])
    initializers = [value for value in values if value is not None]
    imports = {"": 21, "com.microsoft": 1}
    graph = ir.Graph(
        [x], [node.outputs[0]], nodes=[node], initializers=initializers, opset_imports=imports,
        name="one",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("text", [ROUNDED, TRANSPOSED])
def test_activations_are_read_as_they_come_and_weights_are_dequantised(text):
    model = ir.from_onnx_text(text)
    if text is ROUNDED:
        assert np.abs(run(model) - X @ WEIGHT).max() > 0.05

    ComputeInFloat()(model)

    np.testing.assert_allclose(run(model), X @ WEIGHT, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_matmulnbits_multiplies_by_the_weight_that_its_kernel_reads(bits):
    model = quantised(np.random.default_rng(0).normal(size=(96, 8)).astype(np.float32), 1, bits)
    rows = np.eye(96, dtype=np.float32)  # one of them alone: nothing is summed
    kernel = run(model, rows)

    ComputeInFloat()(model)

    np.testing.assert_allclose(run(model, rows), kernel, rtol=1e-6, atol=1e-7)


def test_sums_are_more_exact_than_those_of_matmulnbits_in_float32():
    chooser = np.random.default_rng(0)
    weight = chooser.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    x = chooser.normal(size=(32, INPUTS)).astype(np.float32)
    x[:, 3] = 1000  # the large activation that language models have in some channel
    model, exact = quantised(weight, 1), quantised(weight, 1)
    ComputeInFloat()(exact)
    dequantised = run(exact, np.eye(INPUTS, dtype=np.float32)).astype(np.float64)

    kernel, own = (np.abs(run(one, x) - x @ dequantised).max() for one in (model, exact))

    assert kernel > 2 * own


def test_a_bias_inside_is_refused():
    bias = np.ones(8, np.float32)
    model = quantised(np.ones((32, 8), np.float32), 1, bias=bias)

    with pytest.raises(ArtifactError, match="layer: has b, expected its input"):
        ComputeInFloat()(model)
