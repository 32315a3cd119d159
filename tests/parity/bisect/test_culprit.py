"""Who is to blame, decided from numbers alone: three modules in a row in one around them."""

import numpy as np
import pytest

from propulsion_export.parity.bisect.culprit import find_culprit
from propulsion_export.parity.bisect.matching import Pooled
from propulsion_export.parity.bisect.modules import ModuleRun
from propulsion_export.parity.bisect.places import Place

NUMBERS = np.random.default_rng(5)
X, A, B, C = (NUMBERS.normal(size=(2, 3, 8)) for _ in range(4))
ORACLE = {
    ("block.first", 0): ModuleRun("Linear", X, A, None),
    ("block.mixing", 0): ModuleRun("Mixing", A, B, None),
    ("block.last", 0): ModuleRun("Linear", B, C, C / 2),
    ("block", 0): ModuleRun("Block", X, C, None),
    ("", 0): ModuleRun("Model", None, C, None),
}
PLACES = {("block.first", 0): (Place(("a",)),), ("block.last", 0): (Place(("half", "c")),)}
RIGHT = {"x": X, "a": A, "b": B, "half": C / 2, "c": C}


def reference(oracle=ORACLE):
    return {
        call: ModuleRun(run.kind, *(_near(part) for part in (run.read, run.output, run.unscaled)))
        for call, run in oracle.items()
    }


def _near(values):
    return None if values is None else values.astype(np.float32).astype(np.float64)


def found(*, mask=None, oracle=ORACLE, **changed):
    values = {n: v.astype(np.float32) for n, v in (RIGHT | changed).items() if v is not None}
    pooled = Pooled()
    pooled.add_(oracle, reference(oracle), values, PLACES, mask)
    return find_culprit(pooled, "float32")


def off(values, channel=3):
    wrong = values.copy()
    wrong[..., channel] *= 1.01
    return wrong


def test_nobody_is_to_blame_where_all_is_right():
    assert found() is None


def test_the_first_wrong_module_is_named_and_not_what_it_spoils():
    culprit = found(a=off(A), b=off(B), half=off(C / 2), c=off(C))

    assert (culprit.call, culprit.between) == (("block.first", 0), None)


def test_a_wrong_multiply_is_told_from_a_wrong_product():
    multiply, product = found(c=off(C)), found(half=off(C / 2), c=off(C))

    assert multiply.call == product.call == ("block.last", 0)
    assert multiply.scaled_from.is_met("float32")
    assert not product.scaled_from.is_met("float32")


def test_a_module_without_a_place_is_named_by_its_right_input():
    culprit = found(b=off(B), half=off(C / 2), c=off(C))

    assert (culprit.call, culprit.between) == (("block.mixing", 0), None)


def test_what_stands_between_modules_is_the_fault_of_the_one_around_them():
    oracle = {call: run for call, run in ORACLE.items() if call[0] != "block.mixing"}

    culprit = found(oracle=oracle, b=off(B), half=off(C / 2), c=off(C))

    assert (culprit.call, culprit.between) == (("block", 0), ("block.last", 0))


@pytest.mark.parametrize("hidden", [True, False])
def test_only_positions_that_count_are_looked_at(hidden):
    mask = np.ones((2, 3), np.int64)
    mask[1, 0] = 0 if hidden else 1
    wrong = A.copy()
    wrong[1, 0] += 1

    culprit = found(a=wrong, mask=mask)

    assert (culprit is None) == hidden


def test_nan_is_wrong():
    wrong = A.copy()
    wrong[0, 0, 0] = np.nan

    assert found(a=wrong, b=off(B), c=off(C), half=off(C)).call == ("block.first", 0)


def test_a_part_of_a_packed_value_is_compared_with_its_part_of_the_output():
    packed = np.concatenate([X, A], axis=-1)
    place = {("block.first", 0): (Place(("packed",), width=8, begin=8),)}
    pooled, wrong = Pooled(), Pooled()
    pooled.add_(ORACLE, reference(), {"x": X, "packed": packed, "b": B, "c": C}, place, None)
    packed = np.concatenate([X, off(A)], axis=-1)
    wrong.add_(ORACLE, reference(), {"x": X, "packed": packed, "b": B, "c": C}, place, None)

    assert find_culprit(pooled, "float32") is None
    assert find_culprit(wrong, "float32").call == ("block.first", 0)


def test_runs_of_other_lengths_are_pooled_where_channels_are_positions():
    call = ("bias", 0)
    place = {call: (Place(("v",)),)}
    pooled = Pooled()
    for length in (4, 7, 5):
        values = NUMBERS.normal(size=(1, 2, length, length))
        oracle = {call: ModuleRun("Bias", None, values, None)}
        wrong = values + (length == 7)
        pooled.add_(oracle, reference(oracle), {"v": wrong}, place, None)

    culprit = find_culprit(pooled, "float32")

    assert culprit.call == call
    assert culprit.target.own[0]["v"].largest.shape == (7,)
