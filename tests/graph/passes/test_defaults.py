"""The last steps change no result, and the signature says what a caller may leave out."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.graph.build import optimise
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.signature import signature
from propulsion_export.runners.onnxruntime import onnxruntime_runner

SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x, float[2] scale) => (float[batch, 2] y) {
    y = Mul (x, scale)
}
"""
# Constants to fold, a doubled node, a dead one, and an input nobody reads.
WASTEFUL = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x, float[2] scale) => (float[batch, 2] y)
<float[2] one = {1.0, 2.0}, float[2] two = {3.0, 4.0}> {
    constant = Add (one, two)
    first = Mul (x, constant)
    second = Mul (x, constant)
    dead = Neg (x)
    sum = Add (first, second)
    y = Mul (sum, scale)
}
"""
X = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
HALVES = np.array([0.5, 0.25], np.float32)


def session(model, tmp_path):
    ir.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )


def test_input_with_a_default_is_one_that_may_be_overridden(tmp_path):
    model = ir.from_onnx_text(SCALED)
    required = session(model, tmp_path)

    SetDefaults({"scale": HALVES})(model)

    optional = session(model, tmp_path)
    assert [value.name for value in required.get_inputs()] == ["x", "scale"]
    assert [value.name for value in optional.get_inputs()] == ["x"]
    assert [value.name for value in optional.get_overridable_initializers()] == ["scale"]
    np.testing.assert_array_equal(optional.run(None, {"x": X})[0], X * HALVES)
    np.testing.assert_array_equal(optional.run(None, {"x": X, "scale": X[1]})[0], X * X[1])


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"scale": np.ones(3, np.float32)}, r"scale: the default is float32 of shape \[3\]"),
        ({"scale": np.ones((1, 2), np.float32)}, r"of shape \[1, 2\]"),
        ({"scale": np.ones(2, np.float16)}, "scale: the default is float16"),
        ({"other": np.ones(2, np.float32)}, "other: is no input"),
    ],
    ids=["length", "dimensions", "dtype", "name"],
)
def test_default_that_does_not_fit_is_refused(defaults, message):
    model = ir.from_onnx_text(SCALED)

    with pytest.raises(ir.passes.PreconditionError, match=message):
        SetDefaults(defaults)(model)

    assert not model.graph.initializers


def test_optimiser_removes_what_is_not_needed_and_changes_no_result(tmp_path):
    feeds = {"x": X, "scale": HALVES}
    ir.save(ir.from_onnx_text(WASTEFUL), tmp_path / "before.onnx")
    before = onnxruntime_runner(tmp_path / "before.onnx")(feeds)

    model = optimise(ir.from_onnx_text(WASTEFUL))

    ir.save(model, tmp_path / "after.onnx")
    np.testing.assert_array_equal(
        onnxruntime_runner(tmp_path / "after.onnx")(feeds)["y"], before["y"]
    )
    assert sorted(node.op_type for node in model.graph) == ["Add", "Mul", "Mul"]
    assert [value.name for value in model.graph.inputs] == ["x", "scale"]


def test_optimiser_keeps_an_input_that_gets_its_default_afterwards(tmp_path):
    model = optimise(ir.from_onnx_text(WASTEFUL))
    SetDefaults({"scale": HALVES})(model)

    ir.save(model, tmp_path / "model.onnx")

    run = onnxruntime_runner(tmp_path / "model.onnx")
    assert not np.allclose(run({"x": X})["y"], run({"x": X, "scale": np.ones(2, np.float32)})["y"])


def test_signature_has_names_dtypes_dimensions_and_what_is_optional():
    model = ir.from_onnx_text(SCALED)
    SetDefaults({"scale": HALVES})(model)

    inputs, outputs = signature(model)

    assert inputs == (
        TensorSpec("x", "float32", ("batch", 2)),
        TensorSpec("scale", "float32", (2,), optional=True),
    )
    assert outputs == (TensorSpec("y", "float32", ("batch", 2)),)
