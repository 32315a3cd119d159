"""The graph as shipped is judged with the rounding that the base model has."""

import numpy as np
import pytest

from propulsion_export.parity.quantised.shipped import judge_shipped
from propulsion_export.parity.subject import Subject

NUMBERS = np.random.default_rng(0)
INPUTS = ({"x": np.ones((16, 4))},)
BASE = NUMBERS.uniform(-1, 1, (16, 40))
EFFECT = NUMBERS.uniform(-1, 1, (16, 40))
ROUNDING = 0.02 * NUMBERS.uniform(-1, 1, (16, 40))


def subject(name, values, unscaled=None):
    plain = ({"y": values},)
    return Subject(name, plain, plain, None if unscaled is None else ({"y": unscaled},), {})


def judged(found, *, size=1.0, base=BASE + ROUNDING, exact=None):
    adapted = subject("one", BASE + size * EFFECT, BASE)
    outputs = {"base": [{"y": base}], "one": [{"y": found}]}
    subjects = [adapted, subject("base", BASE)]
    return judge_shipped(subjects, INPUTS, outputs, "float32", exact or {})


def verdicts(verdict):
    return {check.case: check.passed for check in verdict.checks}


def test_an_error_as_large_as_the_base_models_passes():
    verdict = judged(BASE + EFFECT + ROUNDING[::-1])

    assert verdicts(verdict) == {"shipped parity": True, "shipped effect": True}
    assert not verdict.not_run


def test_the_rounding_of_the_base_model_is_told():
    verdict = judged(BASE + EFFECT, exact={("base", "y"): 1e-6})

    (rounding,) = verdict.rounding
    assert rounding.error == pytest.approx(np.sqrt(np.square(ROUNDING).mean()))
    assert (rounding.adapter, rounding.exact) == ("base", 1e-6)


@pytest.mark.parametrize("kept", [0, 0.5, -1, 1.5])
def test_an_adapter_that_is_lost_in_part_fails(kept):
    verdict = judged(BASE + kept * EFFECT + ROUNDING)

    assert verdicts(verdict) == {"shipped parity": False, "shipped effect": False}


def test_an_error_beyond_four_times_the_base_models_fails():
    assert not verdicts(judged(BASE + EFFECT + 9 * ROUNDING))["shipped parity"]


def test_one_token_at_which_the_adapter_amplifies_rounding_does_not_decide():
    amplified = ROUNDING.copy()
    amplified[3, 7] = 9 * np.abs(ROUNDING).max()

    assert verdicts(judged(BASE + EFFECT + amplified))["shipped parity"]


def test_a_wrong_row_decides():
    broken = EFFECT + ROUNDING
    broken[3] = -EFFECT[3]

    assert not verdicts(judged(BASE + broken))["shipped parity"]


@pytest.mark.parametrize("kept", [0, 1])
def test_an_effect_below_the_rounding_is_not_decided(kept):
    """Right or dropped, nobody can tell: it is said, and neither passed nor failed."""
    verdict = judged(BASE + kept * 0.03 * EFFECT + ROUNDING, size=0.03)

    (undecided,) = verdict.not_run
    assert "shipped effect" not in verdicts(verdict)
    assert undecided.what == "effect of one in the graph as shipped"
    assert undecided.reason.startswith("not decided")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_model_that_is_not_finite_fails(value):
    broken = BASE.copy()
    broken[3, 3] = value

    verdict = judged(BASE + EFFECT, base=broken)

    assert verdicts(verdict) == {"shipped parity": False}


def test_an_adapter_that_is_not_finite_fails():
    assert not verdicts(judged(np.full_like(BASE, np.nan)))["shipped parity"]


def test_other_outputs_fail():
    verdict = judge_shipped([subject("base", BASE)], INPUTS, {"base": [{"z": BASE}]}, "float32", {})

    assert verdicts(verdict) == {"shipped parity": False}


def test_a_folded_adapter_is_judged_by_its_effect_alone():
    adapted = subject("one", BASE + EFFECT, BASE)
    for kept, passes in ((1, True), (0, False)):
        found = {"one": [{"y": BASE + kept * EFFECT + ROUNDING}]}

        verdict = judge_shipped([adapted], INPUTS, found, "float32", {})

        assert verdicts(verdict).get("shipped effect", False) == passes
        assert verdict.rounding[0].adapter == "one"
