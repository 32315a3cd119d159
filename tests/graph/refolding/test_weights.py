"""Scales folded into the weights of a graph, against the multiplies and against exact products."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from propulsion_export.errors import AdapterError
from propulsion_export.graph.refolding.weights import FoldWeights, multiplied
from quantised_graphs import SCALES, draw_scales, make_graph, multiply_by, operators, run


def fold(model, scales, others=None):
    folding = FoldWeights(scales, others)
    folding(model)
    return folding


def initializer(model, name):
    return model.graph.initializers[name].const_value.numpy()


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def scaled(text):
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_weight_is_its_exact_product_rounded_once_and_no_multiply_is_left(dtype):
    model, scales = make_graph(dtype), draw_scales()
    before = {
        name: initializer(model, name).astype(np.longdouble) for name in model.graph.initializers
    }

    folding = fold(model, scales)

    assert folding.left == []
    assert not SCALES.keys() & model.graph.initializers.keys()
    columns = {"up": scales["up_scale"][:, None], "down": scales["down_scale"][:, None]}
    rows = {"table": "table_scale", "norm": "norm_scale", "conv": "conv_scale", "bias": "up_scale"}
    factors = columns | {name: scales[scale] for name, scale in rows.items()}
    for name, factor in factors.items():
        expected = (before[name] * factor).astype(dtype)
        np.testing.assert_array_equal(initializer(model, name), expected, err_msg=name)


def test_the_outputs_are_those_of_the_multiplies_and_of_no_other_scales():
    model, scales = make_graph(), draw_scales()
    expected = run(multiply_by(model.clone(), scales))

    fold(model, scales)

    assert error(run(model), expected) < 2.0**-20  # a few roundings of float32
    assert error(run(model), run(multiply_by(make_graph(), draw_scales(seed=2)))) > 0.1


def test_scales_of_one_leave_the_weights_alone():
    model, count = make_graph(), operators(make_graph()).count("Mul")
    before = {name: initializer(model, name) for name in ("up", "down", "conv", "table")}

    folding = fold(model, {name: np.ones(width) for name, width in SCALES.items()})

    assert folding.folded == set()
    assert operators(model).count("Mul") == count - len(SCALES)
    assert all(initializer(model, name) is values for name, values in before.items())


def test_a_trained_bias_is_multiplied_before_it_is_rounded():
    bias = np.linspace(-1, 1, 64) / 3  # no float32 has these values
    model, scales = make_graph(), draw_scales()

    fold(model, scales, {"bias": bias})

    np.testing.assert_array_equal(
        initializer(model, "bias"), (bias * scales["up_scale"]).astype(np.float32)
    )


INPUT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x) => (float[batch, 2] y, float[batch, 2] z)
<float[2] "m.propulsion_input_scale" = {1.0, 1.0}, float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> {
    in = Mul (x, "m.propulsion_input_scale")
    y = MatMul (in, w)
    z = OTHER
}
"""
INPUT_NAME = "m.propulsion_input_scale"


def test_an_input_scale_goes_into_the_rows_that_read_it():
    model = scaled(INPUT.replace("OTHER", "Relu (x)"))

    folding = fold(model, {INPUT_NAME: np.array([2.0, -0.5])})

    assert folding.left == []
    np.testing.assert_array_equal(initializer(model, "w"), [[2, 4], [-1.5, -2]])


def test_an_input_that_something_else_reads_scaled_is_not_folded():
    model = scaled(INPUT.replace("OTHER", "Relu (in)"))

    assert fold(model, {INPUT_NAME: np.array([2.0, -0.5])}).left == [INPUT_NAME]


EXPERTS = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[2, batch, 2] x) => (float[2, batch, 2] y)
<float[2, 2] s = {1.0, 1.0, 1.0, 1.0}, int64[1] axis = {AXIS},
 float[2, 2, 2] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}> {
    wide = Unsqueeze (s, axis)
    scaled = Mul (w, wide)
    y = MatMul (x, scaled)
}
"""


@pytest.mark.parametrize("axis", [1, 2])
def test_a_scale_of_experts_goes_into_their_weight(axis):
    scale = np.array([[2.0, -1.0], [0.0, 0.5]])
    model = scaled(EXPERTS.replace("AXIS", str(axis)))
    before = initializer(model, "w")

    fold(model, {"s": scale})

    assert operators(model) == ["MatMul"]
    np.testing.assert_array_equal(initializer(model, "w"), before * np.expand_dims(scale, axis))


GEMMA = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x) => (float[batch, 2] y, float[batch, 2] z)
<float[2] s = {1.0, 1.0}, double[2] w = {0.3, -0.2}, float one = {1.0}> {
    wide = Cast <to = 1> (w)
    weight = Add (wide, one)
    normed = Mul (x, weight)
    y = Mul (normed, s)
    z = OTHER
}
"""


@pytest.mark.parametrize("other", ["Relu (x)", "Mul (x, weight)"], ids=["alone", "shared"])
def test_a_norm_of_one_and_w_keeps_the_sum(other):
    model, scale = scaled(GEMMA.replace("OTHER", other)), np.array([3.0, -1 / 3])
    before = initializer(model, "w").astype(np.float64)

    fold(model, {"s": scale})

    (weight,) = {name for name in model.graph.initializers if name.startswith("w")} - (
        {"w"} if "weight" in other else set()
    )
    expected = (1 + before) * scale - 1
    np.testing.assert_array_equal(initializer(model, weight), expected)
    if "weight" in other:  # the other norm keeps the old one
        np.testing.assert_array_equal(initializer(model, "w"), before)


TIED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (int64[n] ids) => (float[n, 3] y)
<float[2] s = {1.0, 1.0}, float[3, 2] table = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> {
    rows = Gather (table, ids)
    scaled = Mul (rows, s)
    turned = Transpose <perm = [1, 0]> (table)
    y = MatMul (scaled, turned)
}
"""


def test_a_tied_weight_gets_a_copy_and_is_told():
    model = scaled(TIED)
    before = initializer(model, "table")

    folding = fold(model, {"s": np.array([2.0, 3.0])})

    assert folding.copied == {"table": before.nbytes}
    np.testing.assert_array_equal(initializer(model, "table"), before)
    np.testing.assert_array_equal(initializer(model, "table.folded"), before * [2, 3])


def test_a_product_beyond_the_type_is_refused():
    with pytest.raises(
        AdapterError, match="up_scale: folded, up would hold values too large for float16"
    ):
        fold(make_graph(np.float16), {"up_scale": np.full(64, 1e6)})


FLOATS = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FLOATS, min_size=6, max_size=6),
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=3, max_size=3),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_products_are_rounded_once(weights, factors, dtype):
    with np.errstate(over="ignore", under="ignore"):
        stored = np.array(weights, np.float32).astype(dtype).reshape(2, 3)
    by = np.array(factors)

    found = multiplied(stored, by[None, :], 0.0, np.dtype(dtype)).astype(np.float64)

    exact = stored.astype(np.longdouble) * by.astype(np.longdouble)
    finite = np.isfinite(found)
    below, above = (np.abs(each - exact)[finite] for each in _neighbours(found, dtype))
    # The product in float64 is itself within half of its last digit.
    slack = np.abs(exact[finite]) * 2.0**-52
    off = np.abs(found - exact)[finite]
    assert (off <= below + slack).all()
    assert (off <= above + slack).all()


def _neighbours(values, dtype):
    """The next values of a type below and above."""
    with np.errstate(over="ignore", invalid="ignore"):
        return [
            np.nextafter(values.astype(dtype), np.array(end, dtype)).astype(np.longdouble)
            for end in (-np.inf, np.inf)
        ]
