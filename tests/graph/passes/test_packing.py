"""A packed graph computes what it did before, from one input instead of many initializers."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.reference import reference_runner

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[n, 3] x) => (float[n, 2] y)
<float[3] a = {2.0, -3.0, 0.5}, float[3, 2] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0},
 float[2] b = {0.25, -1.0}, int64[1] whole = {7}> {
    scaled = Mul (x, a)
    again = Mul (scaled, a)
    product = MatMul (again, w)
    y = Add (product, b)
}
"""
PARTS = {
    "a": Slot("first", 0, 3, (3,)),
    "w": Slot("second.weight", 3, 6, (3, 2)),
    "b": Slot("second", 9, 2, (2,)),
}
VALUES = np.array([2, -3, 0.5, 1, 2, 3, 4, 5, 6, 0.25, -1], np.float32)
X = np.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]], np.float32)
RUNNERS = pytest.mark.parametrize("runner", [onnxruntime_runner, reference_runner])


def graph(text=GRAPH):
    return ir.from_onnx_text(text)


def run(runner, model, directory, **feeds):
    ir.save(model, directory / "model.onnx")
    return runner(directory / "model.onnx")({"x": X} | feeds)["y"]


@RUNNERS
def test_packed_graph_gives_the_same_when_fed_the_same(runner, tmp_path):
    expected = run(runner, graph(), tmp_path)
    model = graph()

    PackInitializers("packed", PARTS)(model)

    np.testing.assert_array_equal(run(runner, model, tmp_path, packed=VALUES), expected)


@RUNNERS
def test_each_part_of_the_input_is_used_where_its_slot_says(runner, tmp_path):
    model = graph()
    PackInitializers("packed", PARTS)(model)
    fed = np.random.default_rng(0).normal(size=11).astype(np.float32)

    found = run(runner, model, tmp_path, packed=fed)

    a, w, b = fed[:3], fed[3:9].reshape(3, 2), fed[9:]
    np.testing.assert_allclose(found, (X * a * a) @ w + b, rtol=1e-5)


def test_packed_input_comes_last_with_the_size_of_all_parts_and_their_dtype():
    model = graph()

    PackInitializers("packed", PARTS)(model)

    packed = model.graph.inputs[-1]
    assert [value.name for value in model.graph.inputs] == ["x", "packed"]
    assert packed.shape == (11,)
    assert packed.dtype == ir.DataType.FLOAT
    assert not PARTS.keys() & model.graph.initializers.keys()


@RUNNERS
def test_several_packs_in_one_graph(runner, tmp_path):
    expected = run(runner, graph(), tmp_path)
    model = graph()

    PackInitializers("scales", {"a": Slot("first", 0, 3, (3,))})(model)
    PackInitializers("modules", {"w": Slot("w", 0, 6, (3, 2)), "b": Slot("b", 6, 2, (2,))})(model)

    assert [value.name for value in model.graph.inputs] == ["x", "scales", "modules"]
    found = run(runner, model, tmp_path, scales=VALUES[:3], modules=VALUES[3:])
    np.testing.assert_array_equal(found, expected)


@RUNNERS
def test_packed_input_with_a_default_need_not_be_fed(runner, tmp_path):
    expected = run(runner, graph(), tmp_path)
    model = graph()
    PackInitializers("packed", PARTS)(model)

    SetDefaults({"packed": VALUES})(model)

    np.testing.assert_array_equal(run(runner, model, tmp_path), expected)
    changed = run(runner, model, tmp_path, packed=2 * VALUES)
    assert not np.allclose(changed, expected)


def refused(model, parts, match):
    before = ir.to_onnx_text(model)
    with pytest.raises(ir.passes.PreconditionError, match=match):
        PackInitializers("packed", parts)(model)
    assert ir.to_onnx_text(model) == before


def test_missing_initializer_is_refused_by_name():
    parts = {**PARTS, "gone": Slot("third", 11, 1, (1,))}

    refused(graph(), parts, "1 of 4 tensors are not in the graph: gone")


def test_mixed_dtypes_are_refused():
    refused(graph(), {**PARTS, "whole": Slot("third", 11, 1, (1,))}, "FLOAT, INT64, expected one")


@pytest.mark.parametrize(
    "slot",
    [Slot("second", 9, 3, (3,)), Slot("second", 8, 2, (2,)), Slot("second", 10, 2, (2,))],
    ids=["other-shape", "overlap", "gap"],
)
def test_slots_that_do_not_fit_the_graph_are_refused(slot):
    refused(graph(), {**PARTS, "b": slot}, "b: has shape .* its slot")


# Parts that are in another graph


def test_graph_may_be_without_parts_that_are_in_another_one():
    model = graph()
    before = {name for name in model.graph.initializers if name not in PARTS}
    parts = {"gone": Slot("zeroth", 0, 4, (2, 2)), **shifted(PARTS, 4)}

    PackInitializers("packed", parts, partial=True)(model)

    assert model.graph.inputs[-1].shape == (15,)
    assert not PARTS.keys() & model.graph.initializers.keys()
    assert before <= model.graph.initializers.keys()


@RUNNERS
def test_partial_graph_reads_its_own_parts_only(runner, tmp_path):
    """One set of feeds serves all graphs, so the places of other graphs' parts are skipped."""
    model = graph()
    parts = {
        "gone": Slot("zeroth", 0, 4, (2, 2)),
        **shifted(PARTS, 4),
        "more": Slot("last", 15, 1, (1,)),
    }
    PackInitializers("packed", parts, partial=True)(model)
    fed = np.random.default_rng(0).normal(size=16).astype(np.float32)

    found = run(runner, model, tmp_path, packed=fed)

    a, w, b = fed[4:7], fed[7:13].reshape(3, 2), fed[13:15]
    np.testing.assert_allclose(found, (X * a * a) @ w + b, rtol=1e-5)


def test_graph_without_any_part_gets_no_input():
    model = graph()
    before = ir.to_onnx_text(model)

    result = PackInitializers("packed", {"gone": Slot("zeroth", 0, 4, (4,))}, partial=True)(model)

    assert not result.modified
    assert ir.to_onnx_text(model) == before


def test_part_of_another_shape_is_refused_in_a_partial_graph_too():
    before = ir.to_onnx_text(graph())
    model = graph()
    parts = {"gone": Slot("zeroth", 0, 4, (4,)), "a": Slot("first", 4, 4, (4,))}

    with pytest.raises(ir.passes.PreconditionError, match=r"a: has shape .* its slot"):
        PackInitializers("packed", parts, partial=True)(model)

    assert ir.to_onnx_text(model) == before


def test_gap_before_a_part_of_another_graph_is_refused():
    parts = {"a": PARTS["a"], "gone": Slot("zeroth", 4, 4, (4,))}

    with pytest.raises(ir.passes.PreconditionError, match="gone: has shape None and offset 3"):
        PackInitializers("packed", parts, partial=True)(graph())


def shifted(parts, by):
    return {name: replace(slot, offset=slot.offset + by) for name, slot in parts.items()}
