"""A graph whose scales are removed computes what it did with scales of one."""

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.graph.passes.removing import RemoveScales
from propulsion_export.runners.onnxruntime import onnxruntime_runner

# A scale behind an output of the graph, one used twice, and one of a weight, as of experts.
SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x) => (float[batch, 2] y)
<float[2] s = {2.0, 3.0}, float[2] t = {5.0, 7.0}, float[2] u = {0.5, 0.25},
 float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, int64[1] one = {1}> {
    twice = Mul (x, s)
    again = Mul (s, twice)
    wide = Unsqueeze (t, one)
    weight = Mul (w, wide)
    product = MatMul (again, weight)
    y = Mul (product, u)
}
"""
X = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
W = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)


def test_no_scale_and_no_multiplication_is_left(tmp_path):
    model = ir.from_onnx_text(SCALED)

    RemoveScales(["s", "t", "u", "elsewhere"])(model)

    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert set(model.graph.initializers) == {"w", "one"}
    ir.save(model, tmp_path / "model.onnx")
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": X})
    np.testing.assert_array_equal(found["y"], X @ W)


def test_a_scale_that_stays_still_acts(tmp_path):
    model = ir.from_onnx_text(SCALED)

    RemoveScales(["s", "u"])(model)

    ir.save(model, tmp_path / "model.onnx")
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": X})
    np.testing.assert_array_equal(found["y"], X @ (W * np.float32([[5.0], [7.0]])))


def test_a_scale_that_something_else_reads_is_refused_and_nothing_changes():
    text = SCALED.replace("again = Mul (s, twice)", "again = Add (s, twice)")
    model = ir.from_onnx_text(text)

    with pytest.raises(ir.passes.PreconditionError, match="s: is read by a Add"):
        RemoveScales(["s", "t"])(model)

    assert len(list(model.graph)) == 6
