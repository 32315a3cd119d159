"""Runners feed what a model takes, and say in one line why they cannot run."""

import gc
import os
import weakref
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.runners.onnxruntime import onnxruntime_runner, place
from propulsion_export.runners.reference import reference_runner

# The second input gets a default.
SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x, float[2] scale) => (float[batch, 2] scaled, float[batch, 2] negative) {
    scaled = Mul (x, scale)
    negative = Neg (x)
}
"""
X = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
RUNNERS = pytest.mark.parametrize("runner", [onnxruntime_runner, reference_runner])


@pytest.fixture(name="scaled")
def make_scaled(tmp_path):
    model = ir.from_onnx_text(SCALED)
    SetDefaults({"scale": np.array([2.0, 0.5], np.float32)})(model)
    ir.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@RUNNERS
def test_outputs_come_by_name(runner, scaled):
    outputs = runner(scaled)({"x": X, "scale": np.array([10.0, -1.0], np.float32)})

    assert list(outputs) == ["scaled", "negative"]
    np.testing.assert_array_equal(outputs["scaled"], [[10, -2], [30, 4]])
    np.testing.assert_array_equal(outputs["negative"], -X)


@RUNNERS
def test_inputs_that_the_model_does_not_have_are_left_out(runner, scaled):
    outputs = runner(scaled)({"x": X, "token_type_ids": np.zeros((2, 2), np.int64)})

    np.testing.assert_array_equal(outputs["negative"], -X)


@RUNNERS
def test_optional_input_that_is_not_fed_has_its_default(runner, scaled):
    np.testing.assert_array_equal(runner(scaled)({"x": X})["scaled"], [[2, 1], [6, -2]])


@RUNNERS
def test_optional_input_does_not_remember_what_was_fed(runner, scaled):
    run = runner(scaled)
    run({"x": X, "scale": np.array([10.0, -1.0], np.float32)})

    np.testing.assert_array_equal(run({"x": X})["scaled"], [[2, 1], [6, -2]])


def test_unknown_provider_is_told_with_those_there_are(scaled):
    with pytest.raises(UnavailableError, match=r"has no NoSuchProvider, only .*CPUExecutionProv"):
        onnxruntime_runner(scaled, "NoSuchProvider")


def test_broken_file_is_refused_with_its_name(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no graph")

    with pytest.raises(ToolError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        onnxruntime_runner(file)


def test_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ToolError, match=r"gone\.onnx: ONNX Runtime cannot load it"):
        onnxruntime_runner(tmp_path / "gone.onnx")


# Arrays that stay where they are

GATHERED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x, float[adapters, 2] bank, int64[batch] ids)
    => (float[batch, 2] scaled, int64[batch] same) {
    rows = Gather <axis = 0> (bank, ids)
    scaled = Mul (x, rows)
    same = Identity (ids)
}
"""


@pytest.fixture
def banked(tmp_path):
    ir.save(ir.from_onnx_text(GATHERED), tmp_path / "model.onnx")
    return onnxruntime_runner(tmp_path / "model.onnx")


@pytest.fixture
def mapped(tmp_path):
    """A bank of 1,000 rows in a file: row r is r and r + 1/2."""
    values = np.arange(1000)[:, None] + np.array([0, 0.5])
    values.astype(np.float32).tofile(tmp_path / "bank.bin")
    return np.memmap(tmp_path / "bank.bin", np.float32, mode="r", shape=(1000, 2))


def test_a_placed_array_is_read_where_it_lies(mapped):
    placed = place(mapped, "cpu")

    assert placed.value.data_ptr() == mapped.ctypes.data
    assert placed.shape == (1000, 2)


def test_bfloat16_is_placed_too():
    bits = np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 2)

    placed = place(bits, "cpu")

    assert placed.value.data_type() == "tensor(bfloat16)"
    assert (placed.value.data_ptr(), placed.shape) == (bits.ctypes.data, (4, 2))


def test_a_placed_array_is_fed_like_any_other(banked, mapped):
    ids = np.array([999, 3])
    feeds = {"x": X, "ids": ids, "unknown": X}

    plain = banked({**feeds, "bank": np.array(mapped)})
    placed = banked({**feeds, "bank": place(mapped, "cpu")})

    assert list(placed) == ["scaled", "same"]
    np.testing.assert_array_equal(placed["scaled"], X * mapped[ids])
    np.testing.assert_array_equal(plain["scaled"], placed["scaled"])
    np.testing.assert_array_equal(placed["same"], ids)


def test_beside_a_placed_array_inputs_need_not_be_contiguous(banked, mapped):
    """They are bound by their address; what is copied to make them so must live on."""
    wide = np.arange(40000, dtype=np.float32).reshape(2, 20000)
    ids = np.arange(40000)[::2] % 1000

    scaled = banked({"x": wide.T, "ids": ids, "bank": place(mapped, "cpu")})

    np.testing.assert_array_equal(scaled["scaled"], wide.T * mapped[ids])


def test_a_placed_array_lives_as_long_as_it_is_used(banked, tmp_path):
    np.full((4, 2), 3, np.float32).tofile(tmp_path / "bank.bin")
    array = np.memmap(tmp_path / "bank.bin", np.float32, mode="r", shape=(4, 2))
    alive = weakref.ref(array)
    placed = place(array, "cpu")
    (tmp_path / "bank.bin").unlink()

    del array
    gc.collect()
    scaled = banked({"x": X, "ids": np.array([1, 2]), "bank": placed})["scaled"]

    np.testing.assert_array_equal(scaled, 3 * X)
    del placed
    gc.collect()
    assert alive() is None


def test_memory_does_not_grow_with_the_shapes_there_were(banked):
    """A bank has another shape after each change."""
    bank = np.ones((15000, 2), np.float32)

    def run(rows):
        banked({"x": X, "ids": np.array([1, 2]), "bank": place(bank[:rows], "cpu")})

    for rows in range(10, 3000):
        run(rows)
    before = owned()
    for rows in range(3000, 15000):
        run(rows)

    assert owned() - before < 2**20


def owned():
    """Bytes of memory of this process alone."""
    gc.collect()
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("3", 3), ("2,1", 2), (" 4 ", 4), ("40000", 8), ("", 0), ("0", 0), ("many", 0), (None, 0)],
)
def test_onnx_runtime_has_as_many_threads_as_pytorch(variable, expected, tmp_path, monkeypatch):
    import onnxruntime

    asked = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, **others):
            asked.append(options.intra_op_num_threads)
            super().__init__(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    ir.save(ir.from_onnx_text(THREADS_GRAPH), tmp_path / "model.onnx")

    with pytest.warns() if variable == "40000" else nullcontext():
        onnxruntime_runner(tmp_path / "model.onnx")

    assert asked == [expected]


@pytest.mark.parametrize(
    ("policy", "expected"), [("PASSIVE", ["0"]), (" passive ", ["0"]), ("ACTIVE", []), (None, [])]
)
def test_onnx_runtimes_threads_wait_as_openmps_do(policy, expected, tmp_path, monkeypatch):
    import onnxruntime

    asked = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            asked.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    ir.save(ir.from_onnx_text(THREADS_GRAPH), tmp_path / "model.onnx")

    onnxruntime_runner(tmp_path / "model.onnx")

    assert [value for key, value in asked if key == "session.intra_op.allow_spinning"] == expected


THREADS_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[n] x) => (float[n] y) {
    y = Neg (x)
}
"""


def test_shapes_that_do_not_fit_are_refused_with_the_inputs(scaled):
    with pytest.raises(ToolError, match=r"model\.onnx: the model failed on inputs x \[2, 3\] \("):
        onnxruntime_runner(scaled)({"x": np.ones((2, 3), np.float32)})
