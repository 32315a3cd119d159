"""The graph as shipped may err as much as PyTorch does with activations in 8 bits."""

import numpy as np
import pytest
import torch

from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.parity.quantised.outputs import rounded_inputs
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
    rounded = {one.name: [{"y": one.oracle[0]["y"] + ROUNDING[::-1]}] for one in subjects}
    return judge_shipped(subjects, INPUTS, outputs, rounded, "float32", exact or {})


def verdicts(verdict, adapter="one"):
    return {check.case: check.passed for check in verdict.checks if check.adapter == adapter}


def test_an_error_as_large_as_rounded_activations_make_passes():
    verdict = judged(BASE + EFFECT + ROUNDING[::-1])

    assert verdicts(verdict) == {"shipped parity": True, "shipped effect": True}
    assert not verdict.not_run


def test_the_rounding_of_every_state_is_told():
    verdict = judged(BASE + EFFECT, exact={("base", "y"): 1e-6})

    own, rounding = verdict.rounding
    assert (own.adapter, own.error, own.exact) == ("one", 0, None)
    assert rounding.error == pytest.approx(np.sqrt(np.square(ROUNDING).mean()))
    assert (rounding.adapter, rounding.exact) == ("base", 1e-6)


@pytest.mark.parametrize("kept", [0, 0.5, -1, 1.5])
def test_an_adapter_that_is_lost_in_part_fails(kept):
    verdict = judged(BASE + kept * EFFECT + ROUNDING)

    assert verdicts(verdict) == {"shipped parity": False, "shipped effect": False}


def test_an_error_beyond_four_times_that_fails():
    assert not verdicts(judged(BASE + EFFECT + 9 * ROUNDING))["shipped parity"]


def test_a_base_model_that_is_another_fails():
    """It does not widen what its adapters may err."""
    broken = BASE + 9 * ROUNDING
    verdict = judged(broken + EFFECT, base=broken)

    assert verdicts(verdict, "base") == {"shipped parity": False}
    assert not verdicts(verdict)["shipped parity"]


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

    assert verdicts(verdict, "base") == {"shipped parity": False}


def test_an_adapter_that_is_not_finite_fails():
    assert not verdicts(judged(np.full_like(BASE, np.nan)))["shipped parity"]


def test_other_outputs_fail():
    found, plain = {"base": [{"z": BASE}]}, {"base": [{"y": BASE}]}

    verdict = judge_shipped([subject("base", BASE)], INPUTS, found, plain, "float32", {})

    assert verdicts(verdict, "base") == {"shipped parity": False}


@pytest.mark.parametrize("block", [0, 4, 3])
def test_inputs_in_8_bits_are_multiples_of_a_step_for_each_block(block):
    x = NUMBERS.normal(size=(5, 8)).astype(np.float32)
    layer = torch.nn.Linear(8, 8, bias=False)
    layer.weight = torch.nn.Parameter(torch.eye(8))
    entry = QuantizationEntry(4, "matmulnbits", block)
    model = torch.nn.Sequential(layer)

    with torch.no_grad(), rounded_inputs(model, ["0"], entry):
        found = model(torch.from_numpy(x)).numpy()

    length = block or 8
    for start in range(0, 8, length):
        part, own = x[:, start : start + length], found[:, start : start + length]
        steps = np.abs(part).max(axis=1, keepdims=True) / 127
        np.testing.assert_allclose(own / steps, np.rint(part / steps), atol=1e-3)
    with torch.no_grad():
        np.testing.assert_array_equal(model(torch.from_numpy(x)).numpy(), x)


def test_inputs_of_a_tensor_with_one_number_share_a_step():
    x = torch.tensor([[127.0, 0.4], [0.6, -2.2]])
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight = torch.nn.Parameter(torch.eye(2))

    entry = QuantizationEntry(8, "qdq", 0, activations="int8")
    with torch.no_grad(), rounded_inputs(layer, [""], entry):
        found = layer(x)

    assert found.tolist() == [[127, 0], [1, -2]]
