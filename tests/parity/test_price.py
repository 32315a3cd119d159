"""The price of quantisation, against numbers that were computed by hand or in PyTorch."""

import math

import numpy as np
import pytest
import torch

from propulsion_export.parity.price import Meaning, perplexity, price_checks, price_of
from propulsion_export.parity.reports.report import Price

NUMBERS = np.random.default_rng(0)
TWO_ROWS = {
    "input_ids": np.array([[1, 2, 3], [0, 4, 5]]),
    "attention_mask": np.array([[1, 1, 1], [0, 1, 1]]),
}


def logits(*shape):
    return {"logits": NUMBERS.normal(size=shape).astype(np.float32)}


def divergence(plain, quantised):
    """Of each distribution, by PyTorch."""
    one, other = (torch.from_numpy(v).double().log_softmax(-1) for v in (plain, quantised))
    return torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)


def test_divergence_of_classes_is_pytorchs():
    plain, quantised = logits(2, 4), logits(2, 4)
    expected = divergence(plain["logits"], quantised["logits"])

    (price,) = price_of("one", Meaning("text-classification"), [TWO_ROWS], [plain], [quantised])

    assert price.kl == pytest.approx(expected.mean().item())
    assert price.kl_largest == pytest.approx(expected.max().item())
    assert price.compared == 2


def test_hidden_positions_are_left_out():
    plain, quantised = logits(2, 3, 5), logits(2, 3, 5)
    real = TWO_ROWS["attention_mask"] == 1
    expected = divergence(plain["logits"][real], quantised["logits"][real])

    (price,) = price_of("one", Meaning("text-generation"), [TWO_ROWS], [plain], [quantised])

    assert price.compared == 5
    assert price.kl == pytest.approx(expected.mean().item())


def test_logits_beyond_the_labels_are_left_out():
    plain, quantised = logits(2, 4), logits(2, 4)
    expected = divergence(plain["logits"][:, :3], quantised["logits"][:, :3])

    meaning = Meaning("text-classification", labels=3)
    (price,) = price_of("one", meaning, [TWO_ROWS], [plain], [quantised])

    assert price.kl == pytest.approx(expected.mean().item())


def test_equal_outputs_cost_nothing():
    same = logits(2, 3, 5)

    (price,) = price_of("one", Meaning("text-generation"), [TWO_ROWS], [same], [same])

    assert (price.kl, price.agreement) == (0, 1)


def test_agreement_counts_the_likeliest():
    plain = {"logits": np.array([[0.0, 1, 2], [2, 1, 0]])}
    quantised = {"logits": np.array([[0.0, 2, 1], [2, 1, 0]])}

    (price,) = price_of("one", Meaning("text-classification"), [TWO_ROWS], [plain], [quantised])

    assert price.agreement == 0.5


def test_several_labels_are_each_yes_or_no():
    plain, quantised = logits(2, 3), logits(2, 3)
    one, other = (torch.from_numpy(v["logits"]).double().sigmoid() for v in (plain, quantised))
    terms = one * (one / other).log() + (1 - one) * ((1 - one) / (1 - other)).log()

    meaning = Meaning("text-classification", problem_type="multi_label_classification")
    (price,) = price_of("one", meaning, [TWO_ROWS], [plain], [quantised])

    assert price.kl == pytest.approx(terms.sum(-1).mean().item())


def test_a_number_has_a_difference_and_no_divergence():
    plain, quantised = {"logits": np.array([[1.0], [2]])}, {"logits": np.array([[1.5], [2]])}

    meaning = Meaning("text-classification", problem_type="regression")
    (price,) = price_of("one", meaning, [TWO_ROWS], [plain], [quantised])

    assert (price.kl, price.difference) == (None, 0.25)


def test_a_span_is_a_distribution_over_the_visible_positions():
    names = ("start_logits", "end_logits")
    plain, quantised = ({name: NUMBERS.normal(size=(2, 3)) for name in names} for _ in range(2))
    parts = [
        divergence(plain["start_logits"][row, first:], quantised["start_logits"][row, first:])
        for row, first in ((0, 0), (1, 1))
    ]

    start, _ = price_of("one", Meaning("question-answering"), [TWO_ROWS], [plain], [quantised])

    assert start.kl == pytest.approx(np.mean([part.item() for part in parts]))


def test_embeddings_have_a_cosine_distance():
    plain, quantised = ({"sentence_embedding": NUMBERS.normal(size=(2, 8))} for _ in range(2))
    one, other = (torch.from_numpy(v["sentence_embedding"]) for v in (plain, quantised))

    (price,) = price_of("one", Meaning("feature-extraction"), [TWO_ROWS], [plain], [quantised])

    expected = 1 - torch.nn.functional.cosine_similarity(one, other)
    assert price.cosine_distance == pytest.approx(expected.mean().item())


def test_perplexity_is_the_exponential_of_pytorchs_loss():
    found = logits(2, 3, 7)
    tokens = torch.from_numpy(TWO_ROWS["input_ids"])
    values = torch.from_numpy(found["logits"])
    # Positions whose own token and next token are real: 0 and 1 of the first row, 1 of the second.
    loss = torch.nn.functional.cross_entropy(
        torch.stack([values[0, 0], values[0, 1], values[1, 1]]),
        torch.stack([tokens[0, 1], tokens[0, 2], tokens[1, 2]]),
    )

    assert perplexity([TWO_ROWS], [found]) == pytest.approx(math.exp(loss.item()), rel=1e-6)


@pytest.mark.parametrize(("kl", "passes"), [(0.01, True), (0.03, False), (math.nan, False)])
def test_a_limit_is_a_check_that_can_fail(kl, passes):
    (check,) = price_checks([Price("one", "logits", 4, kl=kl)], 0.02)

    assert check.passed == passes


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_has_no_price_and_fails_the_limit(value):
    plain, quantised = logits(2, 3, 5), logits(2, 3, 5)
    quantised["logits"][0, 1] = value

    prices = price_of("one", Meaning("text-generation"), [TWO_ROWS], [plain], [quantised])

    assert math.isnan(prices[0].kl)
    assert [check.passed for check in price_checks(prices, 1e6)] == [False]
