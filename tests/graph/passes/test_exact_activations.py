import numpy as np
import onnx_ir as ir
import onnxruntime

from propulsion_export.graph.passes.exact_activations import KeepActivations

# A weight that is dequantised, and activations that are rounded to steps of 0.5.
ROUNDED = """
<ir_version: 10, opset_import: ["" : 21]>
graph (float[n, 2] x) => (float[n, 2] y)
    <int8[2, 2] weight = {1, 2, 3, 4}, float scale = {0.1}, float step = {0.5}, int8 zero = {0}> {
    steps = QuantizeLinear (x, step, zero)
    rounded = DequantizeLinear (steps, step, zero)
    dequantised = DequantizeLinear (weight, scale)
    y = MatMul (rounded, dequantised)
}
"""
X = np.array([[0.3, -0.7]], np.float32)


def run(model):
    options = onnxruntime.SessionOptions()
    # It would make a MatMulNBits of the dequantised weight, which rounds activations itself.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def test_activations_are_no_longer_rounded_and_weights_stay_quantised():
    model = ir.from_onnx_text(ROUNDED)
    exact = X @ (np.array([[1, 2], [3, 4]]) * 0.1)
    assert np.abs(run(model) - exact).max() > 0.05

    KeepActivations()(model)

    np.testing.assert_allclose(run(model), exact, rtol=1e-6)


def test_matmulnbits_computes_in_float32():
    node = ir.node("MatMulNBits", [], {"accuracy_level": 4}, domain="com.microsoft")
    plain = ir.node("MatMulNBits", [], {}, domain="com.microsoft")
    model = ir.Model(ir.Graph([], [], nodes=[node, plain]), ir_version=10)

    KeepActivations()(model)

    assert [each.attributes["accuracy_level"].as_int() for each in (node, plain)] == [1, 1]
