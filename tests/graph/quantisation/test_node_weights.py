"""Quantised weights are read as ONNX Runtime reads them, in every form."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from propulsion_export.errors import ArtifactError
from propulsion_export.graph.quantisation import dequantise
from propulsion_export.graph.quantisation.node_weights import node_weights
from propulsion_export.graph.quantisation.weights import quantise_for_matmulnbits

INPUTS, OUTPUTS = 40, 6  # the second block of 32 is not full
NUMBERS = np.random.default_rng(3)


def graph(nodes, tensors, inputs, width):
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(
        nodes,
        "one",
        [inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, width])],
        tensors,
    )
    return helper.make_model(made, opset_imports=domains, ir_version=10)


def run(model, feed):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_matmulnbits(bits):
    weight = NUMBERS.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    packed, scales = quantise_for_matmulnbits(weight, bits, 32)
    tensors = [numpy_helper.from_array(packed, "q"), numpy_helper.from_array(scales, "s")]
    node = helper.make_node(
        "MatMulNBits", ["x", *(tensor.name for tensor in tensors)], ["y"], "n",
        domain="com.microsoft", K=INPUTS, N=OUTPUTS, bits=bits, block_size=32, accuracy_level=1,
    )  # fmt: skip
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, INPUTS])
    model = graph([node], tensors, value, OUTPUTS)

    (found,) = node_weights(ir.from_proto(model))

    product = run(model, {"x": np.eye(INPUTS, dtype=np.float32)}).T
    np.testing.assert_allclose(dequantise(found.values), product, rtol=1e-5, atol=1e-6)
    assert (found.use, found.bits) == ("linear", bits)


def test_an_embedding_in_blocks():
    weight = NUMBERS.normal(size=(64, 7)).astype(np.float32)
    packed, scales = quantise_for_matmulnbits(weight, 4, 32)
    tensors = [
        numpy_helper.from_array(packed.reshape(7, -1), "q"), numpy_helper.from_array(scales, "s")
    ]  # fmt: skip
    node = helper.make_node(
        "GatherBlockQuantized", ["q", "x", "s"], ["y"], "n",
        domain="com.microsoft", bits=4, block_size=32, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    value = helper.make_tensor_value_info("x", TensorProto.INT64, [None])
    model = graph([node], tensors, value, 64)

    (found,) = node_weights(ir.from_proto(model))

    table = run(model, {"x": np.arange(7)})
    np.testing.assert_allclose(dequantise(found.values), table, rtol=1e-6, atol=1e-7)
    assert found.use == "embedding"


@pytest.mark.parametrize("transposed", [False, True])
def test_dequantised_by_channel(transposed):
    integers = NUMBERS.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    scales = NUMBERS.uniform(0.5, 2, OUTPUTS).astype(np.float32)
    stored = integers.T.copy() if transposed else integers
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "n", axis=0 if transposed else 1)
    ]
    if transposed:
        nodes.append(helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x", "v" if transposed else "w"], ["y"]))
    tensors = [numpy_helper.from_array(stored, "q"), numpy_helper.from_array(scales, "s")]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, INPUTS])
    model = graph(nodes, tensors, value, OUTPUTS)
    onnx.checker.check_model(model)

    (found,) = node_weights(ir.from_proto(model))

    np.testing.assert_allclose(dequantise(found.values), integers.T * scales[:, None], rtol=1e-6)
    assert found.values.block_size == 0


def test_weights_of_experts_are_refused_by_name():
    node = helper.make_node("QMoE", ["x"], ["y"], "/moe", domain="com.microsoft")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, INPUTS])

    with pytest.raises(ArtifactError, match="/moe: the quantised weights of experts"):
        node_weights(ir.from_proto(graph([node], [], value, OUTPUTS)))


def test_zero_points_are_refused():
    packed = np.zeros((OUTPUTS, 2, 16), np.uint8)
    tensors = [
        numpy_helper.from_array(packed, "q"),
        numpy_helper.from_array(np.ones((OUTPUTS, 2), np.float32), "s"),
        numpy_helper.from_array(np.full((OUTPUTS, 1), 0x55, np.uint8), "z"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s", "z"], ["y"], "n",
        domain="com.microsoft", K=INPUTS, N=OUTPUTS, bits=4, block_size=32,
    )  # fmt: skip
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, INPUTS])

    with pytest.raises(ArtifactError, match="n: has zero points"):
        node_weights(ir.from_proto(graph([node], tensors, value, OUTPUTS)))


@pytest.mark.parametrize("what", ["input", "attribute"])
def test_what_changes_the_meaning_of_a_packed_weight_is_refused(what):
    packed, scales = quantise_for_matmulnbits(np.ones((64, 4), np.float32), 4, 32)
    values = [ir.Value(name=n, const_value=ir.tensor(v)) for n, v in (("q", packed), ("s", scales))]
    attributes = {"K": 64, "N": 4, "bits": 4, "block_size": 32}
    if what == "input":
        values += [
            None,
            ir.Value(name="order", const_value=ir.tensor(np.arange(2, dtype=np.int32))),
        ]
    else:
        attributes["order"] = 1
    node = ir.node(
        "MatMulNBits", [ir.Value(name="x"), *values], attributes, domain="com.microsoft", name="n"
    )
    model = ir.Model(ir.Graph([], [], nodes=[node]), ir_version=10)

    with pytest.raises(
        ArtifactError, match="n: has order, expected its input, integers and scales"
    ):
        node_weights(model)


@pytest.mark.parametrize(
    ("zero", "behind", "message"),
    [
        (3, 0.5, "q: has zero points, expected a symmetric quantisation"),
        (0, 0.25, "q: its scale is 0.5, that of d behind it 0.25, expected the same"),
    ],
)
def test_activations_that_are_not_read_as_they_were_rounded_are_refused(zero, behind, message):
    tensors = [
        numpy_helper.from_array(np.array(value), name)
        for name, value in (
            ("scale", np.float32(0.5)), ("behind", np.float32(behind)), ("zero", np.int8(zero)),
            ("none", np.int8(0)),
        )
    ]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["rounded"], "q"),
        helper.make_node("DequantizeLinear", ["rounded", "behind", "none"], ["y"], "d"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, INPUTS])

    with pytest.raises(ArtifactError, match=message):
        node_weights(ir.from_proto(graph(nodes, tensors, value, INPUTS)))
