"""A packed input that is taken apart leaves what was packed."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.artifacts.manifest import Slot
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.graph.refolding.unpacking import UnpackInput
from quantised_graphs import SCALES, draw_scales, make_graph, multiply_by, operators, run

WIDTH = sum(SCALES.values())


def slots(names=tuple(SCALES)):
    offset, found = 0, {}
    for name in names:
        found[name] = Slot(name, offset, SCALES[name], (SCALES[name],))
        offset += SCALES[name]
    return found


def packed():
    model = make_graph()
    PackInitializers("propulsion_scales", slots())(model)
    optimise(model)
    SetDefaults({"propulsion_scales": np.ones(WIDTH, np.float32)})(model)
    return model


def test_a_graph_that_was_packed_and_optimised_computes_the_same_with_its_parts():
    scales = draw_scales()
    values = np.concatenate([scales[name] for name in SCALES])

    unpacking = UnpackInput("propulsion_scales", values, slots())
    model = unpacking(packed()).model

    assert {name: list(part) for name, part in unpacking.parts.items()} == {
        name: list(part) for name, part in scales.items()
    }
    assert [value.name for value in model.graph.inputs] == ["ids"]
    assert "Split" not in operators(model)
    np.testing.assert_array_equal(run(model), run(multiply_by(make_graph(), scales)))


def test_parts_of_several_slots_are_named_by_their_offset():
    joined = slots(("table_scale", "norm_scale"))  # the others have no slot of their length

    unpacking = UnpackInput("propulsion_scales", np.arange(float(WIDTH)), joined)
    unpacking(packed())

    others = {"propulsion_scales.96", "propulsion_scales.160", "propulsion_scales.208"}
    assert unpacking.parts.keys() == {"table_scale", "norm_scale"} | others
    assert unpacking.parts["propulsion_scales.160"][0] == 160


def test_values_of_another_width_are_refused():
    with pytest.raises(ir.passes.PreconditionError, match=r"has shape \[256\], its values \[255\]"):
        UnpackInput("propulsion_scales", np.ones(WIDTH - 1), slots())(packed())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4))
def test_tensors_of_several_axes_get_their_shape_back(height, width):
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        graph (float[n, {width}] x, float[{height}, {width}] head) => (float[n, {height}] y) {{
            turned = Transpose <perm = [1, 0]> (head)
            y = MatMul (x, turned)
        }}"""
    )
    head = model.graph.inputs.pop()
    values = np.arange(1.0, height * width + 1).reshape(height, width)
    head.const_value = ir.tensor(values.astype(np.float32), name="head")
    model.graph.register_initializer(head)
    parts = {"head": Slot("head", 0, values.size, values.shape)}
    PackInitializers("propulsion_modules", parts)(model)
    optimise(model)

    UnpackInput("propulsion_modules", values.reshape(-1), parts)(model)

    np.testing.assert_array_equal(model.graph.initializers["head"].const_value.numpy(), values)
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul"]
