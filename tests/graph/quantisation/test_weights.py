import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.graph.quantisation.weights import (
    QuantisedWeight,
    dequantise,
    quantise_for_matmulnbits,
    quantise_positive,
    unpack_matmulnbits,
)


def random_matrix(outputs, inputs, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0, 0.2, (outputs, inputs)).astype(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 0], ids=["blocks", "channels"])
def test_each_weight_is_within_half_a_step_of_its_integer(bits, block):
    weight = random_matrix(5, 48)

    quantised = quantise_positive(weight, bits, block)

    steps = np.repeat(quantised.scales.astype(float), block or 48, axis=1)
    assert (np.abs(dequantise(quantised) - weight) <= steps * (0.5 + 1e-6)).all()
    assert np.abs(quantised.integers).max() == 2 ** (bits - 1) - 1
    assert (np.abs(dequantise(quantised) - weight) > steps * 0.4).any()


@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.sampled_from([np.float32, np.float16]))
@settings(max_examples=30, deadline=None)
def test_scales_are_positive_and_normal_whatever_the_weights_are(seed, bits, dtype):
    numbers = np.random.default_rng(seed)
    weight = (numbers.normal(size=(4, 32)) * 10.0 ** numbers.integers(-9, 3, (4, 1))).astype(dtype)
    weight[1] = 0

    quantised = quantise_positive(weight, bits, 16)

    assert (quantised.scales >= np.finfo(dtype).smallest_normal).all()
    assert quantised.scales.dtype == dtype
    assert not quantised.integers[1].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [48, 37], ids=["whole-blocks", "a-shorter-block"])
def test_the_runtimes_quantiser_is_read_back_within_a_step(bits, inputs):
    weight = random_matrix(5, inputs)

    packed, scales = quantise_for_matmulnbits(weight.T, bits, 16)
    quantised = QuantisedWeight(unpack_matmulnbits(packed, bits, inputs), scales, 16)

    steps = np.repeat(np.abs(scales), 16, axis=1)[:, :inputs]
    assert (np.abs(dequantise(quantised) - weight) <= steps).all()
    assert (quantised.integers < 0).any()
    assert (quantised.integers > 0).any()
    assert (scales < 0).any()  # why there is a quantiser of our own for TensorRT
