"""A graph that computed rows it was given computes rows it chooses from a bank."""

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.graph.passes.gather_rows import GatherRows
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.reference import reference_runner

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 3] x, float[batch, 3] rows) => (float[batch, 3] y, float[batch, 3] z) {
    y = Mul (x, rows)
    z = Add (x, rows)
}
"""
X = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
BANK = np.array([[1, 1, 1], [2, -3, 0.5], [10, 20, 30], [-1, 0, 4]], np.float32)
RUNNERS = pytest.mark.parametrize("runner", [onnxruntime_runner, reference_runner])


@pytest.fixture
def banked():
    model = ir.from_onnx_text(GRAPH)
    GatherRows("rows")(model)
    return model


@RUNNERS
@pytest.mark.parametrize("ids", [[0, 0, 0], [3, 1, 2], [2, 2, 0]])
def test_each_row_has_the_row_of_the_bank_that_its_id_says(runner, ids, banked, tmp_path):
    ir.save(banked, tmp_path / "model.onnx")

    found = runner(tmp_path / "model.onnx")(
        {"x": X, "propulsion_bank": BANK, "adapter_ids": np.array(ids)}
    )

    np.testing.assert_array_equal(found["y"], X * BANK[ids])
    np.testing.assert_array_equal(found["z"], X + BANK[ids])


def test_an_id_that_the_bank_has_not_is_an_error(banked, tmp_path):
    ir.save(banked, tmp_path / "model.onnx")
    run = onnxruntime_runner(tmp_path / "model.onnx")

    with pytest.raises(Exception, match="out of data bounds"):
        run({"x": X, "propulsion_bank": BANK, "adapter_ids": np.array([0, 4, 1])})


def test_the_rows_are_no_input_any_more(banked):
    shown = {value.name: str(value.shape) for value in banked.graph.inputs}

    assert shown == {
        "x": "[batch,3]",
        "propulsion_bank": "[adapters,3]",
        "adapter_ids": "[batch]",
    }


@pytest.mark.parametrize("name", ["nothing", "x"])
def test_only_an_input_of_rows_can_be_replaced(name):
    model = ir.from_onnx_text(GRAPH.replace("float[batch, 3] x", "float[batch, 2, 3] x"))

    with pytest.raises(ir.passes.PreconditionError, match=f"{name}: expected an input of shape"):
        GatherRows(name)(model)
