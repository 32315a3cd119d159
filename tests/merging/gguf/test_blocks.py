"""Rows times factors in each type, judged by the package gguf's own dequantiser."""

import gguf
import numpy as np
import pytest
from gguf_files import quantised

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.gguf.block_types import BLOCK_TYPES
from propulsion_export.merging.gguf.blocks import FLOATS, can_scale_rows, plain_rows, scaled_rows

SCALED = [kind for kind, read in BLOCK_TYPES.items() if read.floats]
FACTORS = np.array([1.0, -1.0, 0.0, 0.3, -1.7, 3.1, 1 / 3, 1.0000001])[:, None]


def blocks_of(kind, scales=(1e-3, 1.0), rows=FACTORS.size, count=5, seed=0):
    """Random bytes, with float16 numbers of this size: every quant and every sub-scale occurs."""
    chooser = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    content = chooser.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for offset in BLOCK_TYPES[kind].floats:
        numbers = np.exp(chooser.uniform(*np.log(scales), (rows, count))).astype("<f2")
        content[:, :, offset : offset + 2] = numbers[..., None].view(np.uint8)
    return content


def numbers_of(content, kind):
    rows = content.reshape(content.shape[0], -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]).astype(np.float64)


def without_quants(content, kind):
    """The same blocks with all quants zero: what their minimum adds to every number."""
    kept = np.zeros(content.shape[-1], bool)
    for start, stop in BLOCK_TYPES[kind].scales:
        kept[start:stop] = True
    return np.where(kept, content, np.uint8(0))


@pytest.mark.parametrize("kind", SCALED)
def test_the_numbers_are_the_scaled_ones_to_one_rounding_of_each_scale(kind):
    content = blocks_of(kind)

    changed, lost = scaled_rows(content, FACTORS, kind)

    expected = FACTORS * numbers_of(content, kind)
    bound = np.abs(expected)
    if len(BLOCK_TYPES[kind].floats) == 2:
        minimum = np.abs(FACTORS * numbers_of(without_quants(content, kind), kind))
        bound = np.abs(expected) + 2 * minimum
    assert lost is None
    error = np.abs(numbers_of(changed, kind) - expected)
    assert (error <= (2.0**-11 + 2.0**-21) * bound + 2.0**-25 * 200).all()


@pytest.mark.parametrize("kind", SCALED)
def test_only_the_float16_numbers_change_and_each_is_rounded_once(kind):
    content = blocks_of(kind)

    changed, _ = scaled_rows(content, FACTORS, kind)

    floats = np.zeros(content.shape[-1], bool)
    for offset in BLOCK_TYPES[kind].floats:
        place = np.s_[:, :, offset : offset + 2]
        floats[offset : offset + 2] = True
        before, after = (each[place].copy().view("<f2")[..., 0] for each in (content, changed))
        expected = rounded(before.astype(np.float64) * FACTORS, np.float16)
        assert after.tobytes() == expected.tobytes()
    assert np.array_equal(changed[..., ~floats], content[..., ~floats])
    assert np.array_equal(changed[0], content[0])  # times one
    assert (changed[1:-1] != content[1:-1]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("kind", SCALED)
def test_a_product_beyond_float16_is_named_and_the_nearest_stands_there(kind):
    content = blocks_of(kind, scales=(0.5, 1.0))
    factors = np.ones_like(FACTORS)
    factors[3] = -2e5

    changed, lost = scaled_rows(content, factors, kind)

    assert (lost.row, lost.block) == (3, 0)
    assert "is beyond float16" in lost.problem
    first = BLOCK_TYPES[kind].floats[0]
    assert changed[3, 0, first : first + 2].view("<f2")[0] == -65504
    assert np.array_equal(changed[4], content[4])


def test_a_product_that_loses_precision_is_named():
    content = blocks_of("Q4_0", scales=(0.5, 1.0))
    factors = np.full_like(FACTORS, 1e-6)
    factors[0] = 1

    _, lost = scaled_rows(content, factors, "Q4_0")

    assert (lost.row, lost.block) == (1, 0)
    assert "loses precision" in lost.problem


@pytest.mark.parametrize("kind", ["Q5_K", "Q6_K", "IQ4_XS"])
def test_scales_as_small_as_llama_cpp_makes_them_are_no_loss(kind):
    """Of weights around 0.02 these types have scales below float16's normal range."""
    content = blocks_of(kind, scales=(1e-5, 1e-4))

    _, lost = scaled_rows(content, np.full_like(FACTORS, 0.9), kind)

    assert lost is None


def test_float16_numbers_are_rounded_once_wherever_they_lie():
    chooser = np.random.default_rng(1)
    halves = chooser.integers(0, 0x7C00, 1 << 16).astype("<u2").view("<f2")
    factors = chooser.uniform(-2, 2, halves.size).astype(np.float32).astype(np.float64)
    products = halves.astype(np.float64) * factors
    odd = np.flatnonzero(np.abs(products) < 60000)

    content, _ = plain_rows(products[None, odd], "F16")

    assert content.tobytes() == rounded(products[odd], np.float16).tobytes()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_plain_numbers_are_multiplied_in_float64_and_rounded_once(kind, along):
    chooser = np.random.default_rng(2)
    values = chooser.normal(size=(8, 40)).astype(FLOATS[kind])
    factors = FACTORS if along == "rows" else chooser.uniform(-2, 2, (1, 40))

    content, lost = scaled_rows(values.view(np.uint8), factors, kind)

    expected = rounded(values.astype(np.float64) * factors, FLOATS[kind])
    assert lost is None
    assert content.tobytes() == expected.tobytes()


def test_a_plain_number_beyond_its_type_is_named():
    values = np.full((2, 3), 60000, np.float16)

    content, lost = scaled_rows(values.view(np.uint8), np.array([[1.0], [-2.0]]), "F16")

    assert (lost.row, lost.block) == (1, 0)
    assert content.view(np.float16).tolist() == [[60000] * 3, [-65504] * 3]


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_scales_of_eight_bits_take_powers_of_two_and_no_other_factor(kind):
    values = np.random.default_rng(3).normal(size=(4, 128)).astype(np.float32)
    content = quantised(values, kind)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = content.reshape(4, -1, size)
    exact = np.array([[1.0], [2.0], [0.5], [4.0]])

    changed, lost = scaled_rows(blocks, exact, kind)
    refused = [scaled_rows(blocks, exact * factor, kind)[1] for factor in (1.1, -1.0)]

    assert lost is None
    assert np.array_equal(numbers_of(changed, kind), exact * numbers_of(blocks, kind))
    assert all(each is not None and f"no scale that {kind} has" in each.problem for each in refused)


def test_other_types_are_not_scaled():
    assert can_scale_rows("MXFP4")
    assert not can_scale_rows("IQ1_M")
    assert not can_scale_rows("Q8_K")
