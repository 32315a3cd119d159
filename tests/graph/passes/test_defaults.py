"""An input with a default may be left out."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from propulsion_export.graph.passes.defaults import SetDefaults

SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x, float[2] scale) => (float[batch, 2] y) {
    y = Mul (x, scale)
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
