from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.merging.quantised.float_grids import float4, float4_step, float8_step
from propulsion_export.merging.quantised.packing import packed_value
from quantised_checkpoints import packed, stored, unpacked


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32))
def test_single_integers_are_those_of_the_whole_line(tmp_path_factory, bits, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, (2, count))
    words = packed(values, bits)
    found = stored(tmp_path_factory.mktemp("packed"), {"words": torch.from_numpy(words)})

    line = [
        packed_value(found["words"], lambda word: (1, word), index, bits) for index in range(count)
    ]

    assert line == list(values[1])
    assert (unpacked(words, bits, count) == values).all()


def test_the_steps_of_float8_are_those_of_torch():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()

    for value, following in pairwise(every.tolist()):
        assert float8_step(value) == float8_step(-value) == following - value


def test_float4_has_the_values_and_steps_of_its_specification():
    every = [float4(bits) for bits in range(8)]

    assert every == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [float4(bits) for bits in range(8, 16)] == [-value for value in every]
    for value, following in pairwise(every):
        assert float4_step(value) == pytest.approx(following - value)
