"""Rows of a causal model run together where that costs less than a pass for each."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from propulsion_export.parity.alone import grouped

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=60)


@given(LENGTHS)
def test_every_row_with_tokens_runs_once_and_little_padding_runs_with_it(lengths):
    rows = [np.ones(length, np.int64) for length in lengths]

    groups = grouped(rows).groups

    assert sorted(row for group in groups for row in group) == [
        row for row, length in enumerate(lengths) if length
    ]
    for group in groups:
        sizes = [lengths[row] for row in group]
        assert sizes == sorted(sizes)
        assert len(group) == 1 or len(group) * sizes[-1] <= 256
        padding = len(group) * sizes[-1] - sum(sizes)
        assert padding <= 32 * len(group)


def test_a_long_row_does_not_pad_short_ones():
    rows = [np.ones(length, np.int64) for length in (148, 40, 38, 41)]

    assert grouped(rows).groups == [[2, 1, 3], [0]]


def test_short_rows_run_in_few_passes():
    rows = [np.ones(6 + row % 5, np.int64) for row in range(33)]

    assert len(grouped(rows).groups) <= 3
