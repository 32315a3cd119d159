"""The reference evaluator computes what ONNX defines, or says that it cannot."""

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest

from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.reference import reference_runner

GATHER = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[2, 80] data, int64[2, 3] indices) => (float[2, 3] picked) {
    picked = GatherElements <axis = 1> (data, indices)
}
"""


@pytest.fixture
def gathered(tmp_path):
    ir.save(ir.from_onnx_text(GATHER), tmp_path / "gather.onnx")
    data = np.arange(160, dtype=np.float32).reshape(2, 80)
    indices = np.array([[79, 0, 3], [1, 1, 7]])
    return tmp_path / "gather.onnx", {"data": data, "indices": indices}


def test_elements_are_gathered_from_a_wide_matrix(gathered):
    path, feeds = gathered

    picked = reference_runner(path)(feeds)["picked"]

    np.testing.assert_array_equal(picked, onnxruntime_runner(path)(feeds)["picked"])
    np.testing.assert_array_equal(picked, [[79, 0, 3], [81, 81, 87]])


@pytest.mark.xfail(raises=ValueError, reason="a bug of onnx 1.23; when it passes, drop our own")
def test_onnx_gathers_such_elements_by_itself(gathered):
    path, feeds = gathered

    onnx.reference.ReferenceEvaluator(str(path)).run(None, feeds)


def test_what_the_evaluator_cannot_run_is_unavailable(gathered):
    path, feeds = gathered

    with pytest.raises(UnavailableError, match="reference evaluator cannot run it"):
        reference_runner(path)({**feeds, "indices": np.array([[99, 0, 0]] * 2)})


def test_a_file_of_weights_that_was_cut_is_told_in_a_line(tmp_path):
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        graph (float[1, 64] x, float[64, 64] w) => (float[1, 64] y) { y = MatMul(x, w) }"""
    )
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((64, 64), np.float32), name="w")
    model.graph.register_initializer(weight)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    (tmp_path / "m.data").write_bytes(b"0" * 100)

    with pytest.raises(ToolError, match=r"m\.onnx: onnx cannot load it \(.*exceeds"):
        reference_runner(tmp_path / "m.onnx")
