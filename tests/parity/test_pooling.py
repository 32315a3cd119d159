"""Going through outputs in parts gives what the whole arrays give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.parity import pooling
from propulsion_export.parity.cases import effect_share
from propulsion_export.parity.comparison import OutputErrors, compare, hidden_positions
from propulsion_export.parity.pooling import PooledErrors, largest_error, parts_of
from propulsion_export.parity.subject import Subject

EDGES = (1e-3, 1e-2)
SHAPES = [(2, 3, 4), (2, 3), (3,), (1, 1, 7), (2, 3, 2, 2)]


@pytest.fixture(params=[1, 5, 2**16], autouse=True)
def _part_size(request, monkeypatch):
    monkeypatch.setattr(pooling, "_CACHED", request.param)


def drawn(seed, *shapes):
    chooser = np.random.default_rng(seed)
    return [{"logits": chooser.normal(size=shape)} for shape in shapes]


def hidden_in(shapes, seed=0):
    """A mask over the first two dimensions, as wide as the outputs."""
    chooser = np.random.default_rng(seed)
    flags = (chooser.random(shape[:2]) < 0.4 for shape in shapes)
    return [
        np.broadcast_to(each.reshape(*each.shape, *[1] * (len(shape) - each.ndim)), shape)
        for each, shape in zip(flags, shapes, strict=True)
    ]


def pooled(hidden, found, expected):
    errors = PooledErrors(EDGES)
    for part in parts_of("logits", hidden, found, expected):
        errors.add(part, *part.sides)
    return errors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_the_whole_once(shape):
    shapes = [shape, (5, *shape[1:])]
    outputs, hidden = drawn(0, *shapes), hidden_in(shapes)

    parts = list(parts_of("logits", hidden, outputs))

    for batch, output in enumerate(outputs):
        own = [part for part in parts if part.batch == batch]
        whole = np.concatenate([part.sides[0].reshape(-1) for part in own])
        assert np.array_equal(whole, output["logits"].reshape(-1))
        starts = np.cumsum([0, *(part.sides[0].size for part in own)])
        assert [part.start for part in own] == list(starts[:-1])
        flags = [np.broadcast_to(part.hidden, part.sides[0].shape).reshape(-1) for part in own]
        assert np.array_equal(np.concatenate(flags), hidden[batch].reshape(-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooled_errors_are_those_of_the_whole_arrays(shape):
    shapes = [shape, (5, *shape[1:])]
    found, expected, hidden = drawn(0, *shapes), drawn(1, *shapes), hidden_in(shapes)
    for each, other in zip(found, expected, strict=True):
        each["logits"] = other["logits"] + 0.01 * each["logits"]

    errors = pooled(hidden, found, expected)

    sides = zip(found, expected, hidden, strict=True)
    whole = [np.abs(one["logits"] - other["logits"]) * ~here for one, other, here in sides]
    every = np.concatenate([each.reshape(-1) for each in whole])
    assert errors.largest == every.max()
    assert errors.elements == every.size
    assert errors.root_mean_square == pytest.approx(np.sqrt((every**2).mean()), rel=1e-14)
    assert whole[errors.batch].reshape(-1)[errors.place] == every.max()
    assert errors.histogram == tuple(
        int(((every > low) & (every >= low) & (every < high)).sum())
        for low, high in [(0, EDGES[0]), EDGES, (EDGES[1], np.inf)]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_is_the_largest_in_whatever_part(value):
    found, expected = drawn(0, (2, 3, 4), (2, 3, 4)), drawn(0, (2, 3, 4), (2, 3, 4))
    found[0]["logits"][1, 1, 1] = 9.0
    found[1]["logits"][1, 2, 3] = value
    hidden = hidden_in([(2, 3, 4)] * 2)
    hidden[1] = np.ones((2, 3, 4), bool)

    errors = pooled(hidden, found, expected)

    assert np.isnan(errors.largest)
    assert np.isnan(errors.root_mean_square)
    assert (errors.batch, errors.place, errors.non_finite) == (1, 23, 1)


def test_largest_error_is_that_of_what_is_seen():
    (found,), (expected,) = drawn(0, (2, 3, 4)), drawn(0, (2, 3, 4))
    hidden = np.zeros((2, 3, 4), bool)
    hidden[1, 2] = True
    found["logits"][0, 1, 2] += 3
    found["logits"][1, 2, 3] = np.nan

    assert largest_error("logits", hidden, found, expected) == pytest.approx(3)
    assert np.isnan(largest_error("logits", ~hidden, found, expected))


def shares_of(seed, *, lost=0.0, spoil=None):
    """The share of an effect that has arrived, and the effect in times of the error of 0.001."""
    inputs = [{"attention_mask": np.array([[1, 1, 1], [1, 0, 0]])}]
    without, effect = (drawn(each, (2, 3, 4))[0]["logits"] for each in (seed, seed + 1))
    effect[0, 0, 1] = 0
    found = without + (1 - lost) * effect
    if spoil is not None:
        found[spoil] = np.nan
    subject = Subject("a", ({"logits": without + effect},), (), ({"logits": without},), {})
    nothing = compare(inputs, subject.oracle, subject.oracle, subject.oracle, "float32")
    allowed = [OutputErrors(**{**vars(each), "allowed": 0.004}) for each in nothing]
    return effect, effect_share(subject, inputs, allowed, [{"logits": found}])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 10**6), lost=st.floats(-1, 2))
def test_share_of_an_effect_is_what_was_not_lost(seed, lost):
    effect, (share, times) = shares_of(seed, lost=lost)

    seen = np.abs(effect)[[0, 0, 0, 1], [0, 1, 2, 0]]
    assert share == pytest.approx(1 - lost, abs=1e-9)
    assert times == pytest.approx(seen.max() / 0.001)


@pytest.mark.parametrize(
    ("place", "finite"),
    [((1, 2, 0), True), ((0, 0, 1), True), ((0, 0, 0), False)],
    ids=["hidden", "without effect", "with effect"],
)
def test_what_is_not_a_number_counts_only_where_there_is_an_effect(place, finite):
    _, (share, _) = shares_of(3, spoil=place)

    assert np.isfinite(share) == finite


def test_mask_hides_positions_only_where_the_output_has_them():
    oracle = drawn(0, (2, 3, 4))
    inputs = [{"attention_mask": np.array([[1, 1, 1], [1, 0, 0]])}]

    parts = list(parts_of("logits", hidden_positions("logits", inputs, oracle), oracle))

    assert sum(int(part.hidden.sum()) for part in parts) == 2
