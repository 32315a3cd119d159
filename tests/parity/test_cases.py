"""Each case lets a right candidate pass and catches the mistake it is for."""

import numpy as np
import pytest

from propulsion_export.parity.cases import Subject, judge

WEIGHT = np.array([[1.0, -2.0], [0.5, 3.0]])
INPUTS = (
    {
        "input_ids": np.array([[1, 2, 3], [2, 0, 0]]),
        "attention_mask": np.array([[1, 1, 1], [1, 0, 0]]),
    },
    {"input_ids": np.array([[4, 5]]), "attention_mask": np.array([[1, 1]])},
)
SCALES = {"one": np.array([2.0, -1.0]), "two": np.array([0.5, 4.0])}


def model(feeds, *, masked=True, error=0.0):
    """Mean over the visible tokens, a product, the scales; and a value for every position."""
    ids, mask = feeds["input_ids"].astype(np.float64), feeds["attention_mask"]
    visible = mask if masked else np.ones_like(mask)
    mean = (ids * visible).sum(1) / visible.sum(1)
    scales = feeds.get("scales", np.ones(2))
    logits = np.stack([mean, mean + 1], 1) @ WEIGHT * scales
    # A position sees its row, as in attention.
    return {"logits": logits + error, "hidden": ids * mean[:, None] * scales.sum() + error}


def subject(name, *, effect=True):
    feeds = {"scales": SCALES[name]} if name in SCALES else {}
    oracle = tuple(model({**batch, **feeds}) for batch in INPUTS)
    reference = tuple(
        {key: value.astype(np.float32).astype(np.float64) for key, value in batch.items()}
        for batch in oracle
    )
    unscaled = tuple(model(batch) for batch in INPUTS) if effect and feeds else None
    return Subject(name, oracle, reference, unscaled, feeds)


def verdicts(checks):
    return {(check.case, check.adapter): check.passed for check in checks}


def candidate(feeds):
    return {key: value.astype(np.float32) for key, value in model(feeds).items()}


def judged(run, *names, dtype="float32"):
    return judge([subject(name) for name in names], INPUTS, run, dtype)


def failed(checks):
    return {(check.case, check.adapter) for check in checks if not check.passed}


def test_right_candidate_passes_every_case_that_applies():
    checks = judged(candidate, "base", "one", "two")

    assert verdicts(checks) == {
        ("parity", "base"): True,
        ("padding", "base"): True,
        ("parity", "one"): True,
        ("effect", "one"): True,
        ("padding", "one"): True,
        ("parity", "two"): True,
        ("effect", "two"): True,
        ("padding", "two"): True,
    }


def test_inputs_without_a_mask_have_no_padding_case():
    inputs = ({"x": np.ones((2, 2))},)
    oracle = ({"y": np.ones((2, 2))},)

    checks = judge(
        [Subject("base", oracle, oracle, None, {})], inputs, lambda _: oracle[0], "float32"
    )

    assert verdicts(checks) == {("parity", "base"): True}


def test_candidate_that_ignores_the_adapter_fails_parity_and_effect():
    checks = judged(lambda feeds: candidate({**feeds, "scales": np.ones(2)}), "base", "one")

    assert ("parity", "base") not in failed(checks)
    assert {("parity", "one"), ("effect", "one")} <= failed(checks)


def test_candidate_with_a_wrong_order_of_scales_fails():
    def swapped(feeds):
        return candidate({**feeds, "scales": feeds.get("scales", np.ones(2))[::-1]})

    assert ("parity", "one") in failed(judged(swapped, "base", "one"))


def test_adapter_without_effect_fails():
    without = subject("one")
    oracle = without.oracle
    same = Subject("one", oracle, without.reference, oracle, without.feeds)

    (check,) = [c for c in judge([same], INPUTS, candidate, "float32") if c.case == "effect"]

    assert not check.passed
    assert "the effect is 0 times PyTorch's own error" in check.detail
    assert check.effect_over_error == 0


def weak(kept, *, size=2.0, seed=0):
    """Whether `effect` holds of a candidate that has kept so much of an adapter's effect.

    The effect is `size` times PyTorch's own error, which the candidate's equals.
    """
    chooser = np.random.default_rng(seed)
    inputs = ({"x": np.ones((16, 4))},)
    effect, own, error = (chooser.uniform(-1, 1, (16, 4)) for _ in range(3))
    for values in (effect, own, error):
        values /= np.abs(values).max()
    unscaled = np.ones((16, 4))
    oracle = unscaled + size * effect
    subject = Subject("one", ({"y": oracle},), ({"y": oracle + own},), ({"y": unscaled},), {})
    found = {"y": unscaled + kept * size * effect + error}
    (check,) = [c for c in judge([subject], inputs, lambda _: found, "float32")
                if c.case == "effect"]  # fmt: skip
    return check


@pytest.mark.parametrize("seed", range(20))
def test_a_weak_effect_passes_though_the_candidate_errs_half_as_much(seed):
    assert weak(1, seed=seed, size=4).passed


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kept", [0, 0.5, -1, 1.5])
def test_a_weak_effect_that_is_lost_in_part_or_doubled_fails(kept, seed):
    assert not weak(kept, seed=seed).passed


@pytest.mark.parametrize(
    ("kept", "passes"), [(0.92, True), (1.08, True), (0.88, False), (1.12, False)]
)
def test_a_tenth_of_a_strong_effect_may_be_lost_or_added(kept, passes):
    check = weak(kept, size=1000)

    assert check.passed == passes
    assert check.detail.startswith(f"{kept:.0%}"[:2])
    assert check.effect_over_error == pytest.approx(1000)


def test_an_effect_below_the_error_tells_nothing_and_fails():
    check = weak(1, size=0.9)

    assert not check.passed
    assert check.detail.startswith("0.0% of what the scales change")


def test_effect_that_is_not_finite_does_not_count():
    one = subject("one")
    broken = tuple({k: v * np.nan for k, v in batch.items()} for batch in one.oracle)

    checks = judge(
        [Subject("one", one.oracle, one.reference, broken, one.feeds)], INPUTS, candidate, "float32"
    )

    assert ("effect", "one") in failed(checks)


def test_padding_case_catches_a_candidate_that_ignores_the_mask():
    """Its numbers for padded rows were right in the oracle's eyes: only rows alone differ."""

    def padded_right_alone_wrong(feeds):
        alone = feeds["input_ids"].shape[0] == 1 and feeds["input_ids"].shape[1] != 2
        return candidate(feeds | {"input_ids": feeds["input_ids"] + alone})

    assert failed(judged(padded_right_alone_wrong, "base")) == {("padding", "base")}


def test_candidate_that_ignores_the_mask_fails():
    def maskless(feeds):
        return {key: v.astype(np.float32) for key, v in model(feeds, masked=False).items()}

    assert ("parity", "base") in failed(judged(maskless, "base"))


def test_oracle_without_a_mask_is_caught_by_rows_alone():
    """A mistake in the inputs that oracle and candidate share shows only without padding."""
    oracle = tuple(model(batch, masked=False) for batch in INPUTS)

    checks = judge(
        [Subject("base", oracle, oracle, None, {})],
        INPUTS,
        lambda feeds: model(feeds, masked=False),
        "float32",
    )

    assert failed(checks) == {("padding", "base")}


def test_padding_case_names_the_row_and_output():
    def wrong_alone(feeds):
        error = 1.0 if feeds["input_ids"].shape == (1, 1) else 0.0
        return model(feeds, error=error)

    (check,) = [c for c in judged(wrong_alone, "base") if c.case == "padding"]

    assert not check.passed
    assert "row 1, " in check.detail


def test_not_a_number_in_a_row_alone_fails():
    def nan_alone(feeds):
        return model(feeds, error=np.nan if feeds["input_ids"].shape == (1, 1) else 0.0)

    assert failed(judged(nan_alone, "base")) == {("padding", "base")}


def test_candidate_that_returns_another_shape_for_a_row_alone_fails():
    def fixed(feeds):
        outputs = model(feeds)
        if feeds["input_ids"].shape == (1, 1):
            outputs["logits"] = np.repeat(outputs["logits"], 2, 0)
        return outputs

    (check,) = [c for c in judged(fixed, "base") if c.case == "padding"]

    assert not check.passed
    assert "row 1 alone: logits: the oracle has shape [1, 2]" in check.detail


def test_class_scores_as_many_as_the_first_batchs_positions_are_not_cut():
    def scores(feeds):
        mask = feeds["attention_mask"]
        sums = (feeds["input_ids"] * mask).sum(1, keepdims=True)
        return {"logits": sums * np.array([[1.0, 2.0, 3.0]])}

    oracle = tuple(scores(batch) for batch in INPUTS)
    checks = judge([Subject("base", oracle, oracle, None, {})], INPUTS, scores, "float32")

    assert not failed(checks)


def test_missing_output_fails_and_the_other_subjects_are_still_judged():
    def incomplete(feeds):
        outputs = candidate(feeds)
        return outputs if "scales" in feeds else {"logits": outputs["logits"]}

    checks = judge([subject("base"), subject("one")], INPUTS, incomplete, "float32")

    assert failed(checks) == {("parity", "base")}
    assert "the candidate ['logits']" in checks[0].detail
    assert ("parity", "one") in verdicts(checks)


def test_other_shape_in_any_batch_fails():
    def short(feeds):
        outputs = candidate(feeds)
        if feeds["input_ids"].shape == (1, 2):
            outputs["hidden"] = outputs["hidden"][:, :1]
        return outputs

    (check, *_) = judged(short, "base")

    assert (check.case, check.passed) == ("parity", False)
    assert "hidden: the oracle has shape [1, 2]" in check.detail


def test_detail_tells_of_the_worst_output_and_of_not_a_number_first():
    def broken(feeds):
        outputs = model(feeds)
        return {"logits": outputs["logits"] + 1, "hidden": outputs["hidden"] * np.nan}

    (check, *_) = judged(broken, "base")

    assert not check.passed
    assert check.detail.startswith("hidden: error nan")
