"""One formula decides, nothing not finite passes, and what the mask hides does not count."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.parity.comparison import (
    DECADES,
    FACTOR,
    UNIT_ROUNDOFF,
    compare,
    hidden_positions,
    mismatch,
)

MASK = np.array([[1, 1, 1], [1, 0, 0]])
FEEDS = ({"attention_mask": MASK}, {"attention_mask": MASK[:, :2]})


def batches(*values, name="logits", dtype=np.float64):
    return tuple({name: np.array(value, dtype)} for value in values)


def judge(oracle, reference, candidate, inputs=({}, {}), dtype="float32"):
    (errors,) = compare(inputs[: len(oracle)], oracle, reference, candidate, dtype)
    return errors


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    oracle=st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3),
    own=st.floats(0, 1e-3),
    error=st.floats(0, 5e-3),
    place=st.integers(0, 2),
    dtype=st.sampled_from(sorted(UNIT_ROUNDOFF)),
)
def test_passes_exactly_when_the_error_is_within_the_formula(oracle, own, error, place, dtype):
    expected = np.array([oracle])
    reference, candidate = expected.copy(), expected.copy()
    reference[0, (place + 1) % 3] += own
    candidate[0, place] -= error
    made = np.abs(candidate - expected).max()
    own = np.abs(reference - expected).max()

    errors = judge(batches(expected), batches(reference), batches(candidate), dtype=dtype)

    allowed = 4 * max(own, UNIT_ROUNDOFF[dtype] * np.abs(expected).max())
    assert errors.passed == (made <= allowed)
    assert errors.allowed == allowed
    assert errors.error == made
    assert errors.reference_error == own


def test_factor_and_roundoffs_are_those_of_the_formats():
    assert FACTOR == 4
    for dtype, roundoff in UNIT_ROUNDOFF.items():
        digits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
        assert roundoff == 2.0**-digits


def test_reference_without_error_does_not_condemn_a_rounding():
    oracle = batches([[1.0, 2.0]])

    within = judge(oracle, oracle, batches([[1.0, 2.0 + 2**-22]]))
    beyond = judge(oracle, oracle, batches([[1.0, 2.0 + 2**-20]]))

    assert within.passed
    assert not beyond.passed


def test_errors_are_pooled_over_all_batches():
    oracle = batches([[1.0]], [[1.0]])
    reference = batches([[1.0]], [[1.01]])

    assert judge(oracle, reference, batches([[1.03]], [[1.0]])).passed
    assert not judge(oracle, reference, batches([[1.05]], [[1.0]])).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)], ids=["visible", "hidden"])
def test_anything_not_finite_fails_wherever_it_stands(value, batch, place):
    values = [np.ones((2, 3)), np.ones((2, 3))]
    oracle = batches(*values)
    inputs = (FEEDS[0], FEEDS[0])
    values[batch] = values[batch].copy()
    values[batch][place] = value

    errors = judge(oracle, oracle, batches(*values), inputs)

    assert not errors.passed
    assert math.isnan(errors.error)
    assert errors.non_finite == 1
    assert errors.worst.startswith(f"[{batch}, {place[0]}, {place[1]}]: oracle 1,")


def test_reference_that_is_not_finite_lets_nothing_pass():
    oracle = batches([[1.0]])

    errors = judge(oracle, batches([[np.nan]]), oracle)

    assert not errors.passed
    assert math.isnan(errors.margin)


def test_errors_at_hidden_positions_do_not_count():
    oracle = batches(np.ones((2, 3, 4)), np.ones((2, 2, 4)))
    wrong_at = {"hidden": (1, 2, 3), "visible": (1, 0, 3)}
    passed = {}
    for where, place in wrong_at.items():
        values = np.ones((2, 3, 4))
        values[place] = 9.0
        candidate = batches(values, np.ones((2, 2, 4)))
        passed[where] = judge(oracle, oracle, candidate, FEEDS).passed

    assert passed == {"hidden": True, "visible": False}


def test_what_the_oracle_holds_at_hidden_positions_widens_nothing():
    hidden_large = np.ones((2, 3))
    hidden_large[1, 2] = 1e6
    oracle = batches(hidden_large, np.ones((2, 2)))

    errors = judge(oracle, oracle, oracle, FEEDS)

    assert errors.scale == 1
    assert errors.allowed == 4 * 2.0**-24


def test_class_scores_as_many_as_one_batchs_positions_are_all_compared():
    oracle = batches(np.ones((2, 3)), np.ones((2, 3)))  # the second batch has 2 positions
    wrong = np.ones((2, 3))
    wrong[1, 2] = 9.0

    assert not judge(oracle, oracle, batches(wrong, np.ones((2, 3))), FEEDS).passed
    assert not np.any([mask.any() for mask in hidden_positions("logits", FEEDS, oracle)])


def test_worst_is_where_the_largest_error_is():
    oracle = batches([[1.0, 2.0]], [[3.0, 4.0]])

    errors = judge(oracle, oracle, batches([[1.5, 2.0]], [[3.0, 2.75]]))

    assert errors.worst == "[1, 0, 1]: oracle 4, candidate 2.75"
    assert errors.error == 1.25
    assert errors.elements == 4


def test_half_precision_outputs_are_compared_in_float64():
    oracle = batches([[1.0 + 2**-20]])
    candidate = batches([[1.0]], dtype=np.float16)

    errors = judge(oracle, oracle, candidate, dtype="float16")

    assert errors.error == 2**-20


def test_margin_is_the_share_of_the_allowed_error_that_is_left():
    oracle, reference = batches([[1.0]]), batches([[1.25]])

    assert judge(oracle, reference, batches([[1.25]])).margin == 0.75
    assert judge(oracle, reference, batches([[3.0]])).margin == -1.0
    zero = batches([[0.0]])
    assert judge(zero, zero, zero).margin == 1.0
    assert judge(zero, zero, batches([[1e-30]])).margin == -math.inf


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    exponents=st.lists(st.floats(-20, 8), max_size=40),
    others=st.lists(st.sampled_from([0.0, np.nan, np.inf, 1e-16, 1e-9, 1e4, 1e5]), max_size=9),
)
def test_histograms_are_numpys(exponents, others):
    errors = np.array([*(10.0**each for each in exponents), *others, 1.0])
    oracle = batches(np.zeros_like(errors))

    found = judge(oracle, batches(errors), batches(errors)).histogram

    edges = 10.0 ** np.array(DECADES, float)
    counted = errors[np.isfinite(errors) & (errors > 0)]
    expected, _ = np.histogram(np.clip(counted, edges[0], edges[-1]), bins=edges)
    assert found == tuple(expected)


def test_histograms_count_errors_by_decade():
    oracle = batches([[0.0, 0.0, 0.0]])

    errors = judge(oracle, batches([[5e-3, 0.0, 0.0]]), batches([[2e-5, 3e-5, 1e-30]]))

    bins = {DECADES[i]: n for i, n in enumerate(errors.histogram) if n}
    assert bins == {-5: 2, DECADES[0]: 1}
    assert errors.reference_histogram[DECADES.index(-3)] == 1


def test_every_output_is_judged_by_itself():
    oracle = ({"a": np.ones((1, 2)), "b": np.ones((1, 2))},)
    candidate = ({"a": np.ones((1, 2)), "b": np.full((1, 2), 2.0)},)

    errors = compare(({},), oracle, oracle, candidate, "float32")

    assert [(e.output, e.passed) for e in errors] == [("a", True), ("b", False)]


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"a": np.ones((2, 3))}, "candidate ['a']"),
        ({"a": np.ones((2, 3)), "b": np.ones(2), "c": np.ones(2)}, "candidate ['a', 'b', 'c']"),
        ({"a": np.ones((3, 2)), "b": np.ones(2)}, "a: the oracle has shape [2, 3]"),
        ({"a": np.ones((2, 3)), "b": np.ones((2, 1))}, "b: the oracle has shape [2]"),
    ],
    ids=["missing", "additional", "transposed", "more-dimensions"],
)
def test_other_names_or_shapes_are_told(candidate, message):
    oracle = {"a": np.ones((2, 3)), "b": np.ones(2)}

    assert message in str(mismatch(oracle, candidate))
    assert mismatch(oracle, dict(reversed(oracle.items()))) is None
