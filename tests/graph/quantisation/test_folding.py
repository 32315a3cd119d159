"""Folding into a quantised graph against the multiplies that it replaces."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.graph.quantisation import FoldScales, QuantiseWeights, quantised_weights
from quantised_graphs import (
    SCALES,
    SCHEMES,
    draw_scales,
    make_graph,
    multiply_by,
    operators,
    run,
)

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
RTOL = 2.0**-20  # a few roundings of float32


def quantised(scheme, dtype=np.float32):
    return QuantiseWeights(scheme)(make_graph(dtype)).model


def fold(model, scales, others=None):
    folding = FoldScales(scales, others)
    return folding(model.clone()).model, folding.multiplied


def assert_equal(found, expected):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < RTOL, error


@every_scheme
def test_folding_computes_what_the_multiplies_do(scheme):
    model, scales = quantised(scheme), draw_scales()

    folded, _ = fold(model, scales)

    assert_equal(run(folded), run(multiply_by(model.clone(), scales)))
    other = run(multiply_by(model.clone(), draw_scales(seed=2)))
    with pytest.raises(AssertionError):
        assert_equal(run(folded), other)


@every_scheme
def test_integers_stay_byte_identical_and_scales_are_rounded_once(scheme):
    model, scales = quantised(scheme), draw_scales(signs=False, zeros=False)

    folded, multiplied = fold(model, scales)

    assert multiplied == []
    before, after = quantised_weights(model), quantised_weights(folded)
    assert before.keys() == after.keys()
    for parameter, name in (("up", "up_scale"), ("down", "down_scale"), ("conv", "conv_scale")):
        assert before[parameter].integers.tobytes() == after[parameter].integers.tobytes()
        exact = before[parameter].scales.astype(float) * scales[name][:, None]
        np.testing.assert_array_equal(after[parameter].scales, exact.astype(np.float32))


@given(
    st.sampled_from(sorted(SCHEMES)),
    st.lists(
        st.one_of(
            st.just(0.0),
            st.floats(2.0**-40, 2.0**40),
            st.floats(-(2.0**40), -(2.0**-40)),
        ),
        min_size=64,
        max_size=64,
    ),
)
@settings(max_examples=40, deadline=None)
def test_a_fold_is_the_multiply_to_one_rounding_of_the_scale(name, factors):
    """What the folded layer multiplies by, channel by channel, whatever the factors are."""
    model = quantised(SCHEMES[name])
    before = quantised_weights(model)["up"].scales.astype(np.float64)
    factors = np.array(factors)

    folded, _ = fold(model, {"up_scale": factors})

    after = quantised_weights(folded)["up"].scales.astype(np.float64)
    left = [value for key, value in folded.graph.initializers.items() if key == "up_scale.left"]
    rest = left[0].const_value.numpy().astype(np.float64) if left else np.ones(64)
    exact = before * factors[:, None]
    assert (np.abs(after * rest[:, None] - exact) <= np.abs(exact) * 2.0**-24).all()


@pytest.mark.parametrize("name", ["qdq-4", "qdq-8"])
def test_signs_and_zeros_stay_in_a_multiply_so_that_scales_are_positive(name):
    model, scales = quantised(SCHEMES[name]), draw_scales()

    folded, multiplied = fold(model, scales)

    assert multiplied == ["up_scale", "down_scale", "conv_scale"]
    for parameter in ("up", "down", "conv"):
        assert (quantised_weights(folded)[parameter].scales > 0).all()
        left = folded.graph.initializers[f"{parameter}_scale.left"].const_value.numpy()
        np.testing.assert_array_equal(left, np.sign(scales[f"{parameter}_scale"]))


@pytest.mark.parametrize("name", ["matmulnbits-4", "matmulnbits-8"])
def test_matmulnbits_takes_negative_and_zero_scales_without_a_multiply(name):
    model = quantised(SCHEMES[name])

    folded, multiplied = fold(model, draw_scales())

    assert multiplied == []
    assert operators(folded).count("Mul") == 1  # the norm's own
    assert not SCALES.keys() & folded.graph.initializers.keys()
    assert "up_scales" not in folded.graph.initializers  # what was replaced is gone


def test_a_channel_whose_scale_would_be_subnormal_keeps_its_multiply():
    """In float16 that is no rare value: 0.3 / 127 is 40 times the smallest normal number."""
    model = quantised(SCHEMES["matmulnbits-8"], np.float16)
    factors = np.ones(64)
    factors[7], factors[9] = 1e-3, 0.5

    folded, multiplied = fold(model, {"up_scale": factors})

    before, after = (quantised_weights(each)["up"].scales for each in (model, folded))
    np.testing.assert_array_equal(after[7], before[7])
    np.testing.assert_array_equal(after[9], (before[9].astype(float) * 0.5).astype(np.float16))
    left = folded.graph.initializers["up_scale.left"].const_value.numpy()
    assert left[7] == np.float16(1e-3)
    assert (np.delete(left, 7) == 1).all()
    assert multiplied == ["up_scale"]


def test_a_table_that_something_else_reads_keeps_its_multiply():
    model = quantised(SCHEMES["matmulnbits-4"])
    table = model.graph.initializers["table"]
    total = ir.node("ReduceSum", [table], {"keepdims": 0})
    last = next(node for node in model.graph if node.outputs[0].name == "out")
    plus = ir.node("Add", [last.outputs[0], total.outputs[0]])
    model.graph.insert_after(last, [total, plus])
    plus.outputs[0].name, last.outputs[0].name = "out", "before"
    plus.outputs[0].type, plus.outputs[0].shape = last.outputs[0].type, last.outputs[0].shape
    model.graph.outputs[0] = plus.outputs[0]
    scales = draw_scales()

    folded, multiplied = fold(model, scales)

    assert multiplied == ["table_scale"]
    assert folded.graph.initializers["table"].const_value is not None
    assert_equal(run(folded), run(multiply_by(model.clone(), scales)))


def test_a_value_that_is_also_read_unscaled_keeps_its_multiply():
    model = quantised(SCHEMES["matmulnbits-4"])
    wide = next(node for node in model.graph if node.outputs[0].name == "wide")
    active = next(node for node in model.graph if node.op_type == "Relu")
    plus = ir.node("Add", [active.outputs[0], wide.inputs[0]])
    model.graph.insert_after(active, plus)
    for user, index in list(active.outputs[0].uses()):
        if user is not plus:
            user.replace_input_with(index, plus.outputs[0])
    scales = draw_scales()

    folded, multiplied = fold(model, scales)

    assert multiplied == ["up_scale"]
    assert_equal(run(folded), run(multiply_by(model.clone(), scales)))


def test_a_trained_bias_is_scaled_before_it_is_rounded():
    model, scales = quantised(SCHEMES["qdq-8"], np.float16), draw_scales(zeros=False)
    bias = np.random.default_rng(5).normal(size=64)

    folded, _ = fold(model, scales, {"bias": bias})

    expected = (bias * np.abs(scales["up_scale"])).astype(np.float16)
    np.testing.assert_array_equal(
        folded.graph.initializers["bias.folded"].const_value.numpy(), expected
    )


def test_what_an_adapter_brings_besides_scales_is_set():
    model = quantised(SCHEMES["qdq-8"])
    new = np.random.default_rng(5).normal(size=(7, 48))

    folded, _ = fold(model, {}, {"table": new})

    np.testing.assert_array_equal(
        folded.graph.initializers["table"].const_value.numpy(), new.astype(np.float32)
    )


def test_one_plus_a_weight_is_folded_as_a_sum():
    """As Gemma's norms multiply: (1 + w) * s."""
    model = quantised(SCHEMES["qdq-8"])
    multiply = next(node for node in model.graph if node.outputs[0].name == "normed")
    one = ir.node("Constant", [], {"value_float": 1.0})
    plus = ir.node("Add", [model.graph.initializers["norm"], one.outputs[0]])
    plus.outputs[0].dtype = ir.DataType.FLOAT
    model.graph.insert_before(multiply, [one, plus])
    multiply.replace_input_with(0, plus.outputs[0])
    scales = draw_scales()

    folded, multiplied = fold(model, scales)

    assert "norm_scale" not in multiplied
    assert "norm" not in folded.graph.initializers
    assert_equal(run(folded), run(multiply_by(model.clone(), scales)))


def test_values_of_another_shape_are_refused_before_anything_is_changed():
    model = quantised(SCHEMES["qdq-8"])

    with pytest.raises(ir.passes.PreconditionError, match="up_scale"):
        FoldScales({"up_scale": np.ones(3)})(model)

    assert "up_scale" in model.graph.initializers
