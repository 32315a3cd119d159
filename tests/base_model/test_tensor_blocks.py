"""Stored tensors are read and compared in blocks."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from propulsion_export.base_model.tensor_files import stored_tensors
from propulsion_export.scaling.fold.stored import same_values

COUNT = 3_000_000


@pytest.fixture
def tensors(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, COUNT // 3)).astype(np.float32)
    last, wide = values.copy(), values.astype(np.float64)
    last[-1, -1] += 1
    stored = {"one": values, "same": values, "last": last, "wide": wide, "flat": values.ravel()}
    save_file(stored, tmp_path / "model.safetensors")
    return stored_tensors(tmp_path / "model.safetensors")


def test_blocks_are_the_values_in_order(tmp_path):
    values = np.arange(10).astype(ml_dtypes.bfloat16).reshape(2, 5)
    save_file({"a": values, "none": values[:0]}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path / "model.safetensors")

    blocks = list(stored["a"].blocks(4))

    assert [len(block) for block in blocks] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), values.ravel())
    assert not list(stored["none"].blocks(4))


@pytest.mark.parametrize(
    ("other", "same"), [("same", True), ("wide", True), ("last", False), ("flat", False)]
)
def test_values_are_compared_whatever_their_dtype(other, same, tensors):
    assert same_values(tensors["one"], tensors[other]) is same


def test_neither_tensor_is_in_memory_as_a_whole(tensors):
    tracemalloc.start()
    assert same_values(tensors["one"], tensors["same"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < tensors["one"].size / 2
