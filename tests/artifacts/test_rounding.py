import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.artifacts.rounding import numpy_dtype, rounded, rounded_to_odd

NARROW = [np.float16, ml_dtypes.bfloat16]
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=64)


def neighbours(dtype):
    """Every finite number of a 16-bit type, in order, as float64."""
    with np.errstate(invalid="ignore"):  # NaNs are among them
        every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


@pytest.mark.parametrize("dtype", NARROW)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.integers(0, 2**15), share=st.floats(0, 1), nudge=st.sampled_from([-1, 0, 1]))
def test_the_nearest_neighbour_is_chosen(dtype, place, share, nudge):
    every = neighbours(dtype)
    low, high = every[place % (every.size - 1) :][:2]
    middle = low / 2 + high / 2
    # On the middle, a float64 step beside it, or anywhere between.
    value = np.nextafter(middle, middle + nudge * np.inf) if nudge else low + share * (high - low)

    result = float(rounded(np.array([value]), dtype)[0])

    assert abs(result - value) <= min(abs(low - value), abs(high - value))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_value_beside_the_middle_goes_to_its_own_side(dtype):
    one = np.float64(1)
    step = float(np.spacing(np.array(1, dtype)))
    beside = one + step / 2 + 2.0**-40

    assert float(rounded(np.array([beside]), dtype)[0]) == 1 + step
    assert float(np.array([beside], np.float32).astype(dtype)[0]) == 1  # rounded twice


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=NUMBERS)
def test_odd_rounding_keeps_what_is_exact_and_marks_the_rest(value):
    result = rounded_to_odd(np.array([value]))

    with np.errstate(over="ignore"):
        exact = float(np.float32(value)) == value
    if exact:
        assert float(result[0]) == value
    else:
        assert result.view(np.int32)[0] & 1


def test_wide_types_and_odd_values_pass_through():
    values = np.array([1 / 3, np.inf, -np.inf, np.nan, 0.0, -0.0, 1e300])

    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    np.testing.assert_array_equal(rounded(values, np.float32), expected)
    half = rounded(values, np.float16)
    np.testing.assert_array_equal(half[1:], np.array([np.inf, -np.inf, np.nan, 0, -0.0, np.inf]))
    assert np.signbit(half[5])


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64"])
def test_numpy_has_a_type_for_every_dtype_of_a_manifest(name):
    assert numpy_dtype(name).name == name
