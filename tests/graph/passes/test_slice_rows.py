"""Initializers become slices of a row for each row of the batch."""

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.slice_rows import SliceRows
from propulsion_export.runners.onnxruntime import onnxruntime_runner

SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, n, 2] x, float[batch, n, 3] y) => (float[batch, n, 2] u, float[batch, n, 3] v)
<float[2] first = {1.0, 1.0}, float[3] second = {0.0, 0.0, 0.0}> {
    u = Mul(x, first)
    v = Add(y, second)
}
"""
PARTS = {"first": Slot("a", 0, 2, (2,)), "second": Slot("b", 2, 3, (3,))}


def test_each_row_is_computed_with_its_own_values(tmp_path):
    model = ir.from_onnx_text(SCALED)

    SliceRows("rows", PARTS)(model)

    assert not {"first", "second"} & model.graph.initializers.keys()
    assert [str(size) for size in model.graph.inputs[-1].shape] == ["batch", "5"]
    ir.save(model, tmp_path / "model.onnx")
    x, y = np.ones((2, 4, 2), np.float32), np.zeros((2, 4, 3), np.float32)
    rows = np.arange(10, dtype=np.float32).reshape(2, 5)
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": x, "y": y, "rows": rows})
    np.testing.assert_array_equal(found["u"], np.broadcast_to(rows[:, None, :2], (2, 4, 2)))
    np.testing.assert_array_equal(found["v"], np.broadcast_to(rows[:, None, 2:], (2, 4, 3)))


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"third": Slot("c", 0, 2, (2,))}, id="missing"),
        pytest.param({"first": Slot("a", 0, 4, (4,))}, id="width"),
    ],
)
def test_a_slot_without_its_initializer_is_refused(parts):
    with pytest.raises(ir.passes.PreconditionError, match="its slot"):
        SliceRows("rows", parts)(ir.from_onnx_text(SCALED))
