"""A graph with scales of one adapter computes each row of a batch with scales of its own."""

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.scale_rows import ScalesToRows
from propulsion_export.runners.onnxruntime import onnxruntime_runner

# Values of three, four and two axes, and a table that all rows share.
SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, n, 2] x, float[batch, n, 3, 2] deep, float[batch, 2] flat)
    => (float[batch, n, 2] y, float[batch, n, 3, 2] z, float[batch, 2] f)
<float[2] a = {2.0, 3.0}, float[2] b = {1.0, 1.0}, float[2] c = {1.0, 1.0},
 float[1, 1, 2] table = {1.0, 10.0}, float[1, 1, 2] placed, float[batch, n, 2] sum> {
    scaled = Mul (x, a)
    placed = Mul (table, b)
    sum = Add (scaled, placed)
    y = Mul (c, sum)
    z = Mul (deep, c)
    f = Mul (flat, c)
}
"""
PARTS = {
    "a": Slot("a", 0, 2, (2,)),
    "idle": Slot("idle", 2, 1, (1,)),
    "b": Slot("b", 3, 2, (2,)),
    "c": Slot("c", 5, 2, (2,)),
}


def to_rows():
    return ScalesToRows("rows", PARTS, ir.DataType.FLOAT)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_each_row_is_multiplied_by_its_own_scales(tmp_path):
    model = ir.from_onnx_text(SCALED)

    to_rows()(model)

    ir.save(model, tmp_path / "model.onnx")
    x, deep, flat, rows = random(4, 5, 2), random(4, 5, 3, 2), random(4, 2), random(4, 7)
    feeds = {"x": x, "deep": deep, "flat": flat, "rows": rows}
    found = onnxruntime_runner(tmp_path / "model.onnx")(feeds)
    a, b, c = rows[:, None, :2], rows[:, None, 3:5], rows[:, None, 5:]
    table = np.array([1, 10], np.float32)
    np.testing.assert_allclose(found["y"], c * (x * a + table * b), rtol=1e-6)
    np.testing.assert_allclose(found["z"], deep * c[:, None], rtol=1e-6)
    np.testing.assert_allclose(found["f"], flat * c[:, 0], rtol=1e-6)


def test_the_input_is_there_for_a_graph_without_scales_too():
    model = ir.from_onnx_text(SCALED)
    parts = {"elsewhere": Slot("elsewhere", 0, 9, (9,))}

    ScalesToRows("rows", parts, ir.DataType.FLOAT16)(model)

    added = model.graph.inputs[-1]
    assert (added.name, str(added.shape), str(added.dtype)) == ("rows", "[batch,9]", "FLOAT16")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[batch, n, 2] x", "float[tokens, n, 2] x"),
        ("float[batch, 2] flat", "float[rows_and_tokens, 2] flat"),
        ("sum = Add", "sum = Max"),
        ("f = Mul (flat, c)", "f = Add (flat, c)"),
    ],
    ids=["tokens", "flat", "table", "no-product"],
)
def test_values_that_do_not_keep_rows_apart_are_refused_and_nothing_changes(old, new):
    model = ir.from_onnx_text(SCALED.replace(old, new))
    before = [node.op_type for node in model.graph]

    with pytest.raises(ir.passes.PreconditionError):
        to_rows()(model)

    assert [node.op_type for node in model.graph] == before
    assert len(model.graph.inputs) == 3
