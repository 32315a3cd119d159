"""The optimiser changes no result and removes no input."""

import numpy as np
import onnx_ir as ir

from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.runners.onnxruntime import onnxruntime_runner

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
