"""Graphs with scales as a producer leaves them, and running them."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from propulsion_export.artifacts.manifest import QuantizationEntry

WIDTH, INNER = 48, 64
Q4 = QuantizationEntry(4, "matmulnbits", 16, accuracy_level=1)
Q8 = QuantizationEntry(8, "matmulnbits", 16, accuracy_level=1)
DQ4 = QuantizationEntry(4, "qdq", 16)
DQ8 = QuantizationEntry(8, "qdq", 0)
SCHEMES = {"matmulnbits-4": Q4, "matmulnbits-8": Q8, "qdq-4": DQ4, "qdq-8": DQ8}

# A norm, two linear layers as nn.Linear is traced, one as Conv1D is, and an embedding.
TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
graph (int64[batch, sequence] ids, float[7, 48] table, float[48] norm, float[64, 48] up,
       float[64] bias, float[48, 64] down, float[48, 48] conv, float[48] conv_bias,
       float[48] table_scale, float[48] norm_scale, float[64] up_scale, float[48] down_scale,
       float[48] conv_scale) => (float[batch, sequence, 48] out) {
    embedded = Gather <axis = 0> (table, ids)
    hidden = Mul (embedded, table_scale)
    straight = Tanh (hidden)
    normed = Mul (norm, straight)
    scaled = Mul (normed, norm_scale)
    upwards = Transpose <perm = [1, 0]> (up)
    product = MatMul (scaled, upwards)
    sum = Add (product, bias)
    wide = Mul (sum, up_scale)
    active = Relu (wide)
    downwards = Transpose <perm = [1, 0]> (down)
    low = MatMul (active, downwards)
    narrow = Mul (low, down_scale)
    flat_shape = Constant <value_ints = [-1, 48]> ()
    flat = Reshape (narrow, flat_shape)
    gemm = Gemm (flat, conv, conv_bias)
    shape = Shape (narrow)
    back = Reshape (gemm, shape)
    out = Mul (back, conv_scale)
}
"""

SCALES = {"table_scale": 48, "norm_scale": 48, "up_scale": 64, "down_scale": 48, "conv_scale": 48}
PARAMETERS = {"up": (64, 48), "down": (48, 64), "conv": (48, 48)}


def make_graph(dtype=np.float32, seed=0):
    """The graph above with random weights, and ones as scales."""
    text = TEXT if dtype == np.float32 else TEXT.replace("float[", "float16[")
    model = ir.from_onnx_text(text)
    numbers = np.random.default_rng(seed)
    for value in list(model.graph.inputs):
        if value.name == "ids":
            continue
        values = np.ones if value.name in SCALES else numbers.normal
        shape = tuple(value.shape)
        drawn = values(shape) if value.name in SCALES else values(0, 0.3, shape)
        value.const_value = ir.tensor(drawn.astype(dtype), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.initializers[value.name] = value
    ShapeInferencePass()(model)
    return model


def draw_scales(seed=1, *, signs=True, zeros=True):
    """Never ones; some negative, some zero."""
    numbers = np.random.default_rng(seed)
    drawn = {}
    for name, width in SCALES.items():
        values = numbers.uniform(0.3, 2.0, width) ** 3
        if signs:
            values[::5] *= -1
        if zeros:
            values[3] = 0
        drawn[name] = values
    return drawn


def multiply_by(model, scales):
    """Give the multiplies of a scaled graph their values, in place."""
    for name, values in scales.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(values.astype(value.dtype.numpy()), name=name)
    return model


def run(model, ids=None):
    """The output of a graph in ONNX Runtime, which leaves it as it is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    ids = np.arange(12).reshape(3, 4) % 7 if ids is None else ids
    return session.run(None, {"ids": ids})[0]


def without_quantisation(model):
    """A graph whose linear layers multiply by the dequantised weights, in float32."""
    from propulsion_export.graph.quantisation import dequantise, quantised_weights

    plain = make_graph()
    for parameter, weight in quantised_weights(model).items():
        value = plain.graph.initializers[parameter]
        matrix = dequantise(weight) if parameter != "conv" else dequantise(weight).T
        value.const_value = ir.tensor(matrix.astype(np.float32), name=parameter)
    return plain


def operators(model):
    return [node.op_type for node in model.graph]
