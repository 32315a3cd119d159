import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.errors import UsageError
from propulsion_export.serving.token_sampling import Sampling, probabilities, sampler

# Drawn on a grid, so that two are equal or well apart: between nearly equal ones two correct
# programs may cut differently.
LOGITS = st.lists(st.integers(-400, 400), min_size=2, max_size=30).map(
    lambda numbers: np.array([[number / 40 for number in numbers]])
)


def transformers_probabilities(logits, sampling):
    """What transformers' own processors leave of the logits, in the order that it applies them."""
    torch = pytest.importorskip("torch", reason="transformers computes with it")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(logits))
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p is not None:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1).numpy()


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    logits=LOGITS,
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_probabilities_are_those_of_transformers(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)

    found = probabilities(logits, sampling)

    expected = transformers_probabilities(logits, sampling)
    # Equal logits at the edge of top_p: which of them is left is a matter of sorting.
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-9, atol=1e-15)
    if len(set(logits[0])) == logits.size:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_each_option_changes_what_is_drawn():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]])

    plain = probabilities(logits, Sampling())
    hot = probabilities(logits, Sampling(temperature=2))
    two = probabilities(logits, Sampling(top_k=2))
    most = probabilities(logits, Sampling(top_p=0.8))

    assert hot[0, 3] > plain[0, 3] > 0
    assert np.count_nonzero(two) == 2
    assert np.count_nonzero(most) == 2  # the likeliest has 0.64
    assert np.count_nonzero(probabilities(logits, Sampling(top_p=0.6))) == 1


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log(np.array([[0.5, 0.0001, 0.3, 0.1999]]))
    choose = sampler(Sampling(top_k=3), [np.random.default_rng(0)])

    counts = np.bincount([int(choose(logits)[0]) for _ in range(4000)], minlength=4)

    np.testing.assert_allclose(counts / 4000, [0.5, 0, 0.3, 0.2], atol=0.03)


def test_a_row_is_drawn_as_it_would_be_alone():
    logits = np.random.default_rng(0).normal(size=(3, 50))
    together = sampler(Sampling(), [np.random.default_rng(seed) for seed in (1, 2, 3)])
    alone = sampler(Sampling(), [np.random.default_rng(2)])

    rows = [together(logits)[1] for _ in range(20)]

    assert rows == [alone(logits[1:2])[0] for _ in range(20)]
    assert len(set(rows)) > 5


def test_half_precision_logits_are_drawn_from_in_double_precision():
    logits = np.array([[60000, 59968]], np.float16)  # neighbours, whose exponentials overflow

    assert probabilities(logits, Sampling(temperature=32))[0, 1] == pytest.approx(
        1 / (1 + np.e), rel=1e-9
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"--temperature: 0, expected .* above 0\. Without it"),
        ({"temperature": -1}, "--temperature: -1"),
        ({"temperature": float("nan")}, "--temperature: nan"),
        ({"top_k": 0}, "--top-k: 0, expected at least 1"),
        ({"top_p": 0}, "--top-p: 0"),
        ({"top_p": 1.5}, "--top-p: 1.5"),
    ],
)
def test_a_number_out_of_range_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


def test_the_lowest_temperature_takes_the_likeliest_token():
    logits = np.array([[-3.0, 1000.0, -np.inf, 999.0]], np.float32)

    found = probabilities(logits, Sampling(temperature=1e-320))

    assert found.tolist() == [[0, 1, 0, 0]]
