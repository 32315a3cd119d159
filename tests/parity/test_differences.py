"""Minus infinity on both sides rules a token out; on one side, and any other infinity, it fails."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, LOGITS
from propulsion_export.parity import diagnosis, encoder_rows, extremes, failing
from propulsion_export.parity.bisect import matching
from propulsion_export.parity.cases import judge
from propulsion_export.parity.comparison import UNIT_ROUNDOFF, compare
from propulsion_export.parity.differences import (
    counted_errors,
    differences,
    rules_out,
    without_ruled_out,
)
from propulsion_export.parity.generation import continue_greedily, greedy_choice, judge_generation
from propulsion_export.parity.matrix import against
from propulsion_export.parity.mixing import mixed_rows
from propulsion_export.parity.own_error import ceiling_of
from propulsion_export.parity.pooling import largest_error
from propulsion_export.parity.price import Meaning, perplexity, price_of
from propulsion_export.parity.questions import logits_padded_inside
from propulsion_export.parity.reports.report import ParityReport
from propulsion_export.parity.subject import Continuation, Subject
from propulsion_export.runners.decoding import CausalModel, pad_left, recomputing, row_by_row

INF = math.inf
RULED_OUT = [2, 7]  # tokens
OTHER = 4  # a token that is not
VOCABULARY = 9
BATCH = pad_left([np.arange(1, 9), np.arange(1, 5)], 0)
NUMBERS = np.random.default_rng(0).normal(size=(2, 8, VOCABULARY))


def masked(logits, tokens=RULED_OUT):
    changed = np.array(logits)
    changed[..., tokens] = -INF
    return changed


# What an artifact may return where `masked(NUMBERS)` is expected, and what it may not.
ONE_MORE = masked(NUMBERS, [*RULED_OUT, OTHER])
ONE_FEWER = masked(NUMBERS, RULED_OUT[:1])


def with_value(value, place):
    changed = masked(NUMBERS)
    changed[(0, 3, place)] = value
    return changed


WRONG = {
    "one more": ONE_MORE,
    "one more, once": with_value(-INF, OTHER),
    "one fewer": ONE_FEWER,
    "one fewer, once": with_value(0.0, RULED_OUT[0]),
    "off beside": with_value(9.0, OTHER),
    "plus infinity": with_value(INF, OTHER),
    "plus for minus infinity": with_value(INF, RULED_OUT[0]),
    "NaN": with_value(np.nan, OTHER),
    "NaN for minus infinity": with_value(np.nan, RULED_OUT[0]),
}
wrong = pytest.mark.parametrize("found", WRONG.values(), ids=WRONG)


def test_two_minus_infinities_are_equal_and_nothing_else_that_is_not_finite():
    values = np.array([-INF, INF, np.nan, 1.5])

    apart = differences(values[:, None], values[None])

    assert apart[0, 0] == apart[3, 3] == 0
    finite = np.isfinite(apart)
    assert finite.sum() == 2
    assert (apart[0, [1, 3]] == INF).all()
    assert (apart[1, [0, 3]] == INF).all()
    assert np.isnan(apart[1, 1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_differences_are_float64_and_change_neither_side(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    found, expected = masked(NUMBERS).astype(kind), masked(NUMBERS)

    apart = differences(found, expected)

    assert apart.dtype == np.float64
    seen = np.isfinite(expected)
    np.testing.assert_array_equal(
        apart[seen], np.abs(found.astype(np.float64)[seen] - expected[seen])
    )
    assert (apart[~seen] == 0).all()
    assert rules_out(found)
    assert rules_out(expected)


def test_what_has_no_shape_has_differences_too():
    assert differences(np.float32(-INF), np.float64(-INF)) == 0
    assert differences(np.float32(-INF), np.float64(0)) == INF
    assert differences(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0, 3)


def test_ruled_out_values_have_no_size():
    assert np.abs(without_ruled_out(masked(NUMBERS))).max() < INF
    assert np.abs(without_ruled_out(with_value(INF, OTHER))).max() == INF
    assert without_ruled_out(NUMBERS) is NUMBERS
    assert not rules_out(np.zeros((0, 3)))


@pytest.mark.parametrize(
    ("found", "expected", "is_masked", "counted"),
    [
        (-INF, 0.0, True, 0.0),  # padding, of which the oracle has no logits
        (0.0, -INF, True, 0.0),
        (-INF, 0.0, False, np.nan),
        (INF, 0.0, True, np.nan),
        (np.nan, 0.0, True, np.nan),
        (np.nan, -INF, True, np.nan),
        (9.0, 0.0, False, 0.0),
    ],
)
def test_hidden_minus_infinity_counts_only_where_none_is_expected(
    found, expected, is_masked, counted
):
    hidden = np.array([[False], [True]])
    values = np.array([[1.0, 1.0], [1.0, found]]), np.array([[1.0, 1.0], [1.0, expected]])

    errors = counted_errors(*values, hidden, masked=is_masked)

    np.testing.assert_array_equal(errors, [[0, 0], [0, counted]])


# The verdict


def judged(found, *, dtype="float32", reference=None, ceiling=None):
    oracle = ({LOGITS: masked(NUMBERS)},)
    own = oracle if reference is None else ({LOGITS: reference},)
    (errors,) = compare([BATCH], oracle, own, [{LOGITS: found}], dtype, ceiling)
    return errors


def test_tokens_ruled_out_on_both_sides_pass_and_have_no_size():
    size = np.abs(NUMBERS[:, :, [n for n in range(VOCABULARY) if n not in RULED_OUT]])
    size = size[BATCH["attention_mask"] == 1].max()

    errors = judged(masked(NUMBERS))

    assert errors.passed
    assert (errors.error, errors.rms, errors.non_finite) == (0, 0, 0)
    assert errors.scale == pytest.approx(size)
    assert errors.allowed == pytest.approx(4 * UNIT_ROUNDOFF["float32"] * size)


def test_the_ceiling_of_pytorchs_own_error_stays_finite():
    config = type("Config", (), {"num_hidden_layers": 2})()

    errors = judged(masked(NUMBERS), ceiling=ceiling_of(config, "float32"))

    assert errors.is_explained
    assert 0 < errors.explained < INF


@wrong
def test_a_place_of_minus_infinity_that_is_not_the_oracles_fails(found):
    errors = judged(found)

    assert not errors.passed
    assert not judged(found, reference=masked(NUMBERS + 1e-3)).passed
    assert 0 < errors.allowed < INF


def test_pytorch_that_rules_out_other_tokens_lets_nothing_pass():
    errors = judged(masked(NUMBERS), reference=ONE_MORE)

    assert not errors.passed
    assert math.isnan(errors.reference_error)


def test_the_worst_place_is_where_minus_infinity_is_missing():
    errors = judged(WRONG["one fewer, once"])

    assert errors.worst == "[0, 0, 3, 2]: oracle -inf, candidate 0"
    assert errors.non_finite == 1


def test_padding_that_an_artifact_masks_too_is_no_failure():
    oracle = masked(NUMBERS)
    oracle[BATCH["attention_mask"] == 0] = 0.0

    (errors,) = compare(
        [BATCH], [{LOGITS: oracle}], [{LOGITS: oracle}], [{LOGITS: masked(NUMBERS)}], "float32"
    )

    assert errors.passed


@wrong
def test_largest_error_of_what_is_seen(found):
    hidden = np.zeros(NUMBERS.shape, bool)
    expected = {LOGITS: masked(NUMBERS)}

    assert largest_error(LOGITS, hidden, expected, expected) == 0
    assert not largest_error(LOGITS, hidden, {LOGITS: found}, expected) < 5


def test_a_report_of_infinities_is_json_without_them():
    checks = tuple(failed_checks(ONE_MORE))
    report = ParityReport("here", "onnx", "float32", "onnxruntime", 2, 0, checks=checks)

    json.loads(report.to_json(), parse_constant=pytest.fail)


# The cases


def subject(oracle=NUMBERS, unscaled=None):
    without = None if unscaled is None else ({LOGITS: unscaled},)
    return Subject("one", ({LOGITS: oracle},), ({LOGITS: oracle},), without, {})


def checks_of(found, **sides):
    """The cases of an artifact that returns `found`, its rows alone too."""

    def run(feeds):
        rows, length = feeds["input_ids"].shape
        place = slice(2) if rows == 2 else slice(0, 1) if length == 8 else slice(1, 2)
        return {LOGITS: found[place, -length:]}

    return judge([subject(masked(NUMBERS), **sides)], [BATCH], run, "float32")


def failed_checks(found, **sides):
    return [check for check in checks_of(found, **sides) if not check.passed]


def test_effect_and_padding_leave_out_what_is_ruled_out():
    unscaled = masked(NUMBERS - np.sin(np.arange(VOCABULARY)))

    checks = checks_of(masked(NUMBERS), unscaled=unscaled)

    assert [check.case for check in checks] == ["parity", "effect", "padding"]
    assert [check.passed for check in checks] == [True] * 3
    assert "100.0%" in checks[1].detail


@wrong
def test_parity_and_padding_fail_where_tokens_are_ruled_out_otherwise(found):
    assert {check.case for check in failed_checks(found)} == {"parity", "padding"}


def test_a_token_with_an_effect_that_is_ruled_out_fails_the_effect():
    unscaled = masked(NUMBERS - np.sin(np.arange(VOCABULARY)))

    failed = failed_checks(ONE_MORE, unscaled=unscaled)

    assert {check.case for check in failed} == {"parity", "effect", "padding"}


def test_scales_that_rule_out_a_token_have_no_size_there():
    """The parity case compares where it is."""
    checks = checks_of(masked(NUMBERS), unscaled=NUMBERS - np.sin(np.arange(VOCABULARY)))

    assert all(check.passed for check in checks)


@wrong
def test_a_failing_run_has_the_share_of_its_error(found):
    counted = np.broadcast_to(BATCH["attention_mask"][..., None] == 1, NUMBERS.shape)
    oracle = masked(NUMBERS)

    assert failing._share(masked(NUMBERS), oracle, counted, 1.0) == 0
    assert failing._share(found, oracle, counted, 1.0) > 5


def mixing(found):
    feeds = {BANK_INPUT: np.zeros((1, 1)), IDS_INPUT: np.array([0])}
    judged = replace(subject(masked(NUMBERS)), feeds=feeds)
    keys = BATCH["input_ids"].sum(1).tolist()

    def run(feeds):
        return {LOGITS: found[[keys.index(row) for row in feeds["input_ids"].sum(1).tolist()]]}

    return mixed_rows([judged], [BATCH], run, {"one": {LOGITS: 1e-3}})


def test_mixed_rows_with_tokens_ruled_out_pass():
    assert mixing(masked(NUMBERS)).passed


@wrong
def test_mixed_rows_fail_where_tokens_are_ruled_out_otherwise(found):
    assert not mixing(found).passed


@wrong
def test_two_artifacts_agree_where_both_rule_out(found):
    hidden = [np.zeros(NUMBERS.shape, bool)]
    right = masked(NUMBERS)

    assert against._distance([(right, right)], hidden) == 0
    assert not against._distance([(found, right)], hidden) < 5
    assert not against._distance([(right, found)], hidden) < 5


def test_rows_with_the_smallest_outputs_are_not_those_with_tokens_ruled_out():
    values = np.array([[0.0, -1.0, -INF], [3.0, -5.0, -INF], [-2.0, 2.0, 1.0]])

    most, least = extremes._ends({LOGITS: values})

    assert most.tolist() == [0, 3, 2]
    assert least.tolist() == [1, 5, 2]


def test_rows_alone_with_tokens_ruled_out_have_a_padding_effect_that_is_a_number():
    feeds = {"attention_mask": np.array([[1, 1, 1], [1, 0, 0]])}
    rows = encoder_rows.grouped_rows([feeds], together=True)
    alone = {LOGITS: masked(NUMBERS[:, :3])}
    padded = {LOGITS: masked(NUMBERS[:, :3] + 0.5)}

    with pytest.raises(encoder_rows.PaddingChangesRowsError) as caught:
        rows._check(alone, padded, {LOGITS}, 0)

    assert caught.value.effect == pytest.approx(0.5)


# Generation


def decoder(change=masked):
    """Logits of the tokens read so far, with tokens ruled out by `change`."""
    table = np.random.default_rng(1).normal(size=(20, VOCABULARY))

    def step(feeds):
        tokens, mask = feeds["input_ids"], feeds["attention_mask"]
        past = feeds.get("past_key_values.0.key", np.zeros((len(tokens), 1, 0, VOCABULARY)))
        keys = np.concatenate([past[:, 0], table[tokens]], axis=1)
        sums = np.sin(5 * (keys * mask[:, :, None]).cumsum(1))[:, -tokens.shape[1] :]
        return {LOGITS: change(sums), "present.0.key": keys[:, None]}

    return CausalModel(step, ())


def cases_of_generation(candidate, told=None):
    right = told or decoder()
    oracle = row_by_row(recomputing(right))(BATCH)
    oracle[LOGITS][BATCH["attention_mask"] == 0] = 0.0
    prompt = pad_left([np.array([1, 3, 5])], 0)
    going = Continuation(prompt, *continue_greedily(right, prompt, 12))
    going = replace(going, reference=going.tokens)
    one = Subject("one", (oracle,), (oracle,), None, {}, going)
    return {check.case: check for check in judge_generation(one, BATCH, candidate, allowed=1e-6)}


def test_a_decoder_that_rules_out_tokens_passes_its_cases():
    assert all(check.passed for check in cases_of_generation(decoder()).values())


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: masked(logits, [*RULED_OUT, OTHER]),
        lambda logits: masked(logits, RULED_OUT[:1]),
        lambda logits: np.where(np.arange(VOCABULARY) == OTHER, INF, masked(logits)),
    ],
    ids=["one more", "one fewer", "plus infinity"],
)
def test_a_decoder_that_rules_out_others_fails_its_cases(change):
    cases = cases_of_generation(decoder(change))

    assert not cases["recomputing"].passed
    assert not cases["right padding"].passed


def test_a_margin_is_infinite_where_one_token_is_left_and_nan_where_none_is():
    rows = np.array(
        [[1.0, -INF, -INF], [-INF] * 3, [INF, 0.0, 0.0], [np.nan, 0.0, 1.0], [2.0, 1.5, -INF]]
    )

    _, margins = greedy_choice(rows)

    np.testing.assert_array_equal(margins, [INF, np.nan, np.nan, np.nan, 0.5])


def test_one_token_that_is_left_is_greedily_chosen_without_a_finding():
    only = [n for n in range(VOCABULARY) if n != OTHER]
    candidate = decoder(lambda logits: masked(logits, only))

    assert cases_of_generation(candidate, told=candidate)["greedy"].passed


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        (masked, True),
        (lambda logits: np.full_like(logits, -INF), False),
        (lambda logits: np.full_like(logits, np.nan), False),
        (lambda logits: masked(logits) + INF, False),
    ],
    ids=["some tokens", "all tokens", "NaN", "plus infinity"],
)
def test_padding_inside_is_judged_where_a_token_is_left(change, asked):
    with np.errstate(invalid="ignore"):  # minus infinity and infinity
        answer = logits_padded_inside(BATCH).read([{LOGITS: change(NUMBERS)}])

    assert (answer is not None) == asked


# Prices, diagnosis, bisection


def test_a_token_ruled_out_on_both_sides_costs_nothing():
    same = [{LOGITS: masked(NUMBERS)}]

    (price,) = price_of("one", Meaning("text-generation"), [BATCH], same, same)

    assert (price.kl, price.kl_largest, price.agreement) == (0, 0, 1)


def test_the_price_is_that_of_the_other_tokens():
    kept = [n for n in range(VOCABULARY) if n not in RULED_OUT]
    moved = NUMBERS + 0.3 * np.cos(np.arange(VOCABULARY))
    meaning = Meaning("text-generation")
    pairs = [(masked(NUMBERS), masked(moved)), (NUMBERS[..., kept], moved[..., kept])]

    prices = [
        price_of("one", meaning, [BATCH], [{LOGITS: plain}], [{LOGITS: quantised}])[0]
        for plain, quantised in pairs
    ]

    assert prices[0].kl > 0
    assert prices[0].kl == pytest.approx(prices[1].kl)


def test_a_token_that_only_the_quantised_model_rules_out_costs_everything():
    meaning = Meaning("text-generation")
    sides = ({LOGITS: masked(NUMBERS)}, {LOGITS: ONE_MORE})

    (price,) = price_of("one", meaning, [BATCH], [sides[0]], [sides[1]])

    assert price.kl == INF


def test_perplexity_of_a_text_with_a_token_that_is_ruled_out_is_infinite():
    assert perplexity([BATCH], [{LOGITS: masked(NUMBERS)}]) == INF
    assert perplexity([BATCH], [{LOGITS: masked(NUMBERS, [0])}]) < INF


def test_a_module_that_masks_in_float64_too_has_not_overflowed():
    torch = pytest.importorskip("torch")
    exact = {"model": torch.zeros(1, 3), "head": torch.tensor([[1.0, -INF, 2.0]])}
    found = {"model": torch.zeros(1, 3), "head": torch.tensor([[1.0, -INF, INF]])}

    assert diagnosis._first_overflow(exact, exact) is None
    assert diagnosis._first_overflow(exact, found) == "head"


def test_bisection_finds_a_masked_output_and_not_one_with_another_mask():
    expected = masked(NUMBERS)
    samples = matching._Samples.of(expected, None)
    errors = {name: matching._errors(values[0], expected[0]) for name, values in WRONG.items()}

    assert samples.are_near(expected)
    assert not samples.are_near(expected + 5)
    assert 0 < samples.size < INF
    assert matching._errors(expected[0], expected[0]).error == 0
    assert all(not each.error < 5 for each in errors.values())
    assert all(np.isfinite(each.squares).all() for each in errors.values())
