import itertools
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.base_model.tensor_files import DTYPES, StoredTensor
from propulsion_export.errors import AdapterError
from propulsion_export.merging import products as module
from propulsion_export.merging.changes import Scaled
from propulsion_export.merging.narrow_products import NarrowProducts
from propulsion_export.merging.products import Products
from propulsion_export.scaling.layer_rules import narrowed

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NARROW = ["BF16", "F16"]
# Factors of few bits and many, beside one, beside what float32 and float16 hold, of both signs.
FACTORS = np.array(
    [
        sign * factor
        for sign, factor in itertools.product(
            (1, -1),
            [
                0.0,
                *(2.0**power for power in (-160, -127, -126, -120, -30, -14, -1, 0, 1, 14, 100)),
                *(1 + 2.0**-power for power in (1, 2, 6, 7, 8, 9, 11, 16, 23, 24, 25, 31, 52)),
                *(1 - 2.0**-power for power in (1, 2, 7, 8, 9, 12, 17, 24, 25, 26, 53)),
                *np.random.default_rng(0).uniform(0.8, 1.2, 40) ** 15,
                *np.random.default_rng(1).lognormal(0, 6, 30),
                1e-30,
                1e-300,
                3e38,
                1e39,
            ],
        )
    ]
)


def every_value(dtype):
    """The 65,536 values of a 16-bit dtype; zero in place of what is not finite."""
    values = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    with np.errstate(invalid="ignore"):  # NaNs are among them
        finite = np.isfinite(values)
    values[~finite] = 0
    return values


def products_of(values, factors, dtype, to=None):
    stored = StoredTensor(Path("none"), 0, values.shape, dtype)
    return Products(Scaled(stored, np.asarray(factors, np.float64), to))


def folded(values, factors, dtype, to=None):
    """What the fold over torch computes."""
    stored = torch.from_numpy(values.reshape(-1).view(np.uint8)).view(TORCH[dtype])
    wide = stored.reshape(values.shape).double() * torch.from_numpy(factors)
    return narrowed(wide, TORCH[to or dtype]).contiguous()


def without_infinite_products(values, factors, dtype, to=None):
    """A copy in which zeros replace the values whose products are not finite."""
    return np.where(folded(values, factors, dtype, to).isfinite().numpy(), values, 0).astype(
        values.dtype
    )


def check(values, factors, dtype, to=None):
    """The products of the finite ones are those of the fold, bit for bit."""
    values = without_infinite_products(values, factors, dtype, to)

    found = products_of(values, factors, dtype, to).block(values.reshape(-1).view(np.uint8), 0)

    expected = folded(values, factors, dtype, to).view(torch.uint8).numpy().reshape(-1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("to", NARROW)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("part", range(10))
def test_every_value_times_many_factors(dtype, to, part):
    factors = FACTORS[part::10, None]
    check(np.tile(every_value(dtype), (len(factors), 1)), factors, dtype, to)


@pytest.mark.parametrize(
    ("dtype", "to", "bits"), [("BF16", "BF16", 16), ("F16", "F16", 13), ("F16", "BF16", 13)]
)
def test_every_value_times_factors_of_few_bits(dtype, to, bits):
    """Their products are exact as float32, and many are midpoints."""
    whole = np.random.default_rng(0).integers(1, 2**bits, 40)
    factors = np.concatenate([[0, 1, -1, 1.5, -0.75, 3, 2.0**-7], -whole / 2.0**bits])[:, None]
    longer, lower = np.array([[1 + 2.0**-bits]]), np.array([[2.0 ** -(bits + 1)]])

    assert NarrowProducts.of(dtype, to, factors, (len(factors), 9)).exact
    assert not NarrowProducts.of(dtype, to, longer, (1, 9)).exact
    assert not NarrowProducts.of(dtype, dtype, lower, (1, 9)).exact
    check(np.tile(every_value(dtype), (len(factors), 1)), factors, dtype, to)


@pytest.mark.parametrize("to", NARROW)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("power", [-53, -40, -29, -26, -25, -24, -23.4, -23, -22.7, -22, -21])
def test_products_beside_the_midpoint_of_two_numbers(dtype, to, power):
    chooser = np.random.default_rng(int(-power))
    values = np.tile(every_value(dtype), 4)
    lower = chooser.permutation(values.size).astype(np.uint16) & 0x7FFF
    with np.errstate(all="ignore"):
        below, above = (bits.view(DTYPES[to]).astype(np.float64) for bits in (lower, lower + 1))
        factors = (below + above) / 2 / values.astype(np.float64)
        factors *= 1 + chooser.choice([-1, 1], values.size) * 2.0**power
    tiny = np.finfo(np.float32).tiny
    factors = np.where(np.isfinite(factors) & (np.abs(factors) < 1e30), factors, 1)
    factors = np.where(np.abs(factors) * 2.0**-112 > tiny, factors, 1)

    assert NarrowProducts.of(dtype, dtype, factors, values.shape) is not None
    check(values, factors, dtype, to)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("to", [None, *TORCH])
def test_products_are_those_of_the_fold(dtype, to):
    chooser = np.random.default_rng(0)
    values = chooser.normal(size=(70, 333)).astype(DTYPES[dtype])

    check(values, chooser.normal(size=(70, 1)), dtype, to)


@pytest.mark.parametrize("to", NARROW)
def test_float32_beside_the_midpoint(to):
    chooser = np.random.default_rng(0)
    factors = chooser.uniform(0.5, 2, 100_000)
    lower = chooser.integers(0x3400, 0x4400, factors.size).astype(np.uint16)
    below, above = (bits.view(DTYPES[to]).astype(np.float64) for bits in (lower, lower + 1))

    check(((below + above) / 2 / factors).astype(np.float32), factors, "F32", to)


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(list(TORCH)), shape=SHAPES)
def test_runs_of_any_length_make_the_whole(data, dtype, shape):
    broadcast = tuple(data.draw(st.sampled_from((1, length))) for length in shape)
    chooser = np.random.default_rng(data.draw(st.integers(0, 99)))
    factors = chooser.normal(size=broadcast)
    values = np.asarray(chooser.normal(size=shape)).astype(DTYPES[dtype])
    cuts = sorted(data.draw(st.sets(st.integers(0, values.size))) | {0, values.size})
    products = products_of(values, factors, dtype)

    runs = [
        products.block(values.reshape(-1)[first:last].tobytes(), first).tobytes()
        for first, last in itertools.pairwise(cuts)
    ]

    assert (
        b"".join(runs)
        == folded(values, factors, dtype).view(-1).view(torch.uint8).numpy().tobytes()
    )


@pytest.mark.parametrize("dtype", TORCH)
def test_a_tensor_without_axes(dtype):
    one = products_of(np.array(1.25, DTYPES[dtype]), np.array(2.0), dtype)

    data = np.array([1.25], DTYPES[dtype]).tobytes()
    assert one.block(data, 0).tobytes() == np.array([2.5], DTYPES[dtype]).tobytes()


@pytest.mark.parametrize("dtype", TORCH)
def test_a_run_is_computed_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 100)
    chooser = np.random.default_rng(0)
    values = chooser.normal(size=(37, 41)).astype(DTYPES[dtype])

    check(values, chooser.normal(size=(37, 1)), dtype)
    check(values, chooser.normal(size=(1, 41)), dtype)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("stored", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, -1e-30])
def test_a_stored_value_that_is_not_finite_is_refused(dtype, stored, factor):
    values = np.ones((3, 4), DTYPES[dtype])
    values[2, 1] = stored

    with pytest.raises(AdapterError, match=r"^\[2, 1\]: -?(nan|inf) times"):
        products_of(values, np.full((3, 1), factor), dtype).block(values.tobytes(), 0)


@pytest.mark.parametrize("bits", [0x7C01, 0xFC01, 0x7FFF, 0xFFFF, 0x7C00, 0xFC00])
def test_every_kind_of_nan_in_float16_is_refused(bits):
    values = np.array([1, 1], np.float16)
    values.view(np.uint16)[1] = bits

    with pytest.raises(AdapterError, match=r"^\[1\]: "):
        products_of(values, [0.001], "F16").block(values.tobytes(), 0)


@pytest.mark.parametrize("dtype", TORCH)
def test_the_largest_value_times_less_than_one_is_written(dtype):
    values = np.array([DTYPES[dtype].type(module.np.finfo(np.float16).max)] * 2)

    check(values, np.array([1.0, 0.999]), dtype)


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("F16", "with --dtype"), ("BF16", "No dtype"), ("F32", "No dtype")]
)
def test_another_dtype_is_only_advised_where_it_helps(dtype, remedy):
    values = np.full(4, 3.0, DTYPES[dtype])
    change = Scaled(StoredTensor(Path("x"), 0, (4,), dtype), np.full(4, 3e38))

    with pytest.raises(AdapterError, match=f"not finite in .* {remedy}"):
        Products(change).block(values.tobytes(), 0)


def test_a_product_that_is_not_finite_is_refused_with_its_place():
    values = np.ones((3, 4), np.float16)
    values[1, 2] = 60000
    products = products_of(values, np.full((3, 1), 2.0), "F16")

    with pytest.raises(AdapterError, match=r"^\[1, 2\]: 60000.0 times the scale 2.0 is not finite"):
        products.block(values[1:].tobytes(), 4)


@pytest.mark.parametrize(
    ("dtype", "end", "below", "largest"),
    [
        ("F16", 65520.0, 65519.9, 65504.0),
        ("BF16", 2.0**128 - 2.0**119, 2.0**128 - 2.0**119 - 2.0**90, 2.0**128 - 2.0**120),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_dtype_ends_where_the_nearest_number_would_be_infinity(dtype, end, below, largest, sign):
    one = np.ones(1, DTYPES[dtype])

    found = products_of(one, [sign * below], dtype).block(one.tobytes(), 0)
    assert found.view(DTYPES[dtype]).astype(float) == sign * largest
    with pytest.raises(AdapterError):
        products_of(one, [sign * end], dtype).block(one.tobytes(), 0)


@pytest.mark.parametrize("dtype", TORCH)
def test_the_sign_of_a_zero_is_kept(dtype):
    values = np.array([0.0, -0.0, 0.0, -0.0, 1.0]).astype(DTYPES[dtype])
    factors = np.array([1.5, 1.5, -1.5, -1.5, -0.0])

    check(values, factors, dtype)
    found = products_of(values, factors, dtype).block(values.tobytes(), 0).view(DTYPES[dtype])
    np.testing.assert_array_equal(np.signbit(found), [False, True, True, False, True])


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("to", [None, "BF16"])
def test_changed_tells_whether_any_product_differs(dtype, to):
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(DTYPES[dtype])
    factors = np.array([[1.0], [1.0], [1.0], [2.0]])
    products = products_of(values, factors, dtype, to)

    products.block(values[:3].tobytes(), 0)
    assert not products.changed
    products.block(values[3:].tobytes(), 9)
    assert products.changed
    products.block(values[:3].tobytes(), 0)
    assert products.changed


def test_threads_share_an_object():
    values = np.random.default_rng(0).normal(size=(64, 4096)).astype(DTYPES["BF16"])
    factors = np.random.default_rng(1).normal(size=(64, 1))
    products = products_of(values, factors, "BF16")
    whole = np.empty(values.shape, np.uint16)

    def compute(start):
        for row in range(start, 64, 4):
            block = products.block(values[row].tobytes(), row * 4096)
            whole[row] = block.view(np.uint16)

    threads = [threading.Thread(target=compute, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    expected = folded(values, factors, "BF16").view(torch.uint8).numpy().reshape(-1)
    np.testing.assert_array_equal(whole.view(np.uint8).reshape(-1), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("factors", [(2048, 1), (1, 8192)])
def test_memory_does_not_grow_with_the_tensor(dtype, factors):
    shape, block = (2048, 8192), 1 << 17
    data = np.full(block, 1.25, DTYPES[dtype]).view(np.uint8)
    stored = StoredTensor(Path("none"), 0, shape, dtype)
    scales = np.random.default_rng(0).uniform(0.9, 1.1, factors)
    tracemalloc.start()

    products = Products(Scaled(stored, scales))
    for first in range(0, shape[0] * shape[1], block):
        products.block(data, first)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20  # the tensor has 32 MiB or 64
