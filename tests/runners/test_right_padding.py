"""A decoder whose rows are padded at their end gives what each row alone gives."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.errors import UsageError
from propulsion_export.runners.decoding import generate, go_on, greedy, recomputing, replaying
from propulsion_export.runners.padding import last_of_rows, pad_left, pad_right
from propulsion_export.runners.right_padding import RightPaddedModel

CHOOSER = np.random.default_rng(7)
TABLE = CHOOSER.normal(size=(13, 3))
HEAD = CHOOSER.normal(size=(3, 13))
PLAIN = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("past_key_values.0.key", "float64", ("batch", 1, "past", 3)),
)
STATE = (*PLAIN, TensorSpec("past.0.conv", "float64", ("batch", 3, 2)))
ROWS = [np.array([3, 8, 1, 5, 9, 12, 4]), np.array([7, 2]), np.array([11, 6, 6, 10, 5])]
DRAWN = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=14), min_size=1, max_size=4)


def attending(feeds):
    """As GroupQueryAttention: a row's length is its mask's sum, new tokens are appended to it.

    Padding is not masked at all: it only comes behind everything else. With a convolution, the
    state is that of the last two positions, padding or not.
    """
    tokens, mask, past = (
        feeds[name] for name in ("input_ids", "attention_mask", "past_key_values.0.key")
    )
    batch, new = tokens.shape
    total = mask.shape[1]
    assert new == total or new == 1 or batch == 1, "several tokens of several rows"
    keys = np.zeros((batch, total, 3))
    keys[:, : past.shape[2]] = past[:, 0, :total]
    logits = np.zeros((batch, new, 13))
    for row in range(batch):
        start = 0 if new == total else int(mask[row].sum()) - new
        for index in range(new):
            keys[row, start + index] = TABLE[tokens[row, index]] * np.cos(start + index)
            logits[row, index] = np.sin(keys[row, : start + index + 1].sum(0)) @ HEAD
    logits *= feeds.get("scales", np.ones((batch, 1, 1)))
    return {LOGITS: logits, "present.0.key": keys[:, None]}


def convolving(feeds):
    outputs, state = attending(feeds), feeds["past.0.conv"]
    made = np.concatenate([state, TABLE[feeds["input_ids"]].transpose(0, 2, 1)], axis=2)
    sums = sum(made[:, :, shift : shift + feeds["input_ids"].shape[1]] for shift in range(3))
    logits = outputs[LOGITS] + np.sin(3 * sums).transpose(0, 2, 1) @ HEAD
    return outputs | {LOGITS: logits, "present.0.conv": made[:, :, -2:]}


MODELS = {
    "attention": RightPaddedModel(attending, PLAIN),
    "convolution": RightPaddedModel(convolving, STATE),
}
each_model = pytest.mark.parametrize("name", MODELS)


def row_alone(model, tokens):
    tokens = np.array([tokens])
    return recomputing(model)({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[LOGITS]


def visible(values, batch):
    return values[batch["attention_mask"] == 1]


@each_model
@settings(deadline=None, max_examples=60, derandomize=True)
@given(rows=DRAWN, left=st.booleans())
def test_stepping_and_recomputing_agree_with_rows_alone_wherever_padding_is(name, rows, left):
    model = MODELS[name]
    batch = (pad_left if left else pad_right)([np.array(row) for row in rows], 0)
    expected = np.concatenate([row_alone(model, row)[0] for row in rows])

    for run in (replaying(model), recomputing(model)):
        found = run(batch)[LOGITS]

        assert found.shape == (*batch["input_ids"].shape, 13)
        np.testing.assert_allclose(visible(found, batch), expected, rtol=0, atol=1e-12)


@each_model
def test_padding_inside_a_row_is_taken_out(name):
    model = MODELS[name]
    mask = np.array([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    tokens = np.array([[3, 8, 9, 9, 1], [7, 2, 11, 6, 5]])

    found = recomputing(model)({"input_ids": tokens, "attention_mask": mask})[LOGITS]

    np.testing.assert_allclose(found[0, [0, 1, 4]], row_alone(model, [3, 8, 1])[0], atol=1e-12)
    assert (found[0, [2, 3]] == 0).all()
    assert not model.reads_gaps


@each_model
def test_generated_tokens_are_those_of_one_pass_over_all_tokens_so_far(name):
    model = MODELS[name]
    going = generate(model, model.pad(ROWS, 0), greedy)

    made = np.stack(list(itertools.islice(going, 9)), axis=1)

    for row, tokens in zip(ROWS, made, strict=True):
        logits = row_alone(model, [*row, *tokens])
        assert logits[0, len(row) - 1 : -1].argmax(-1).tolist() == tokens.tolist()
    assert len(np.unique(made)) > 3


@each_model
def test_rows_go_on_after_others_have_stopped(name):
    model = MODELS[name]
    alone = [
        list(itertools.islice(generate(model, model.pad([row], 0), greedy), 12)) for row in ROWS
    ]
    room, made = (4, 12, 7), []

    def stopped():
        return np.array([len(made) >= most for most in room])

    for tokens in go_on(model.open(model.pad(ROWS, 0)), greedy, stopped):
        made.append(tokens)

    assert len(made) == 12
    for row, most in enumerate(room):
        found = [int(tokens[row]) for tokens in made[:most]]
        assert found == [int(tokens[0]) for tokens in alone[row][:most]]


def test_each_row_keeps_its_adapter_where_rows_are_read_apart():
    seen = []

    def run(feeds):
        seen.append((feeds["input_ids"].shape, feeds["adapter_ids"].tolist()))
        return convolving(feeds)

    model = RightPaddedModel(run, STATE)
    ids = np.array([4, 5, 6])
    rows = [ROWS[0], ROWS[1], ROWS[0]]

    going = generate(model, {**model.pad(rows, 0), "adapter_ids": ids}, greedy)
    list(itertools.islice(going, 2))

    assert seen == [((2, 7), [4, 6]), ((1, 2), [5]), ((3, 1), [4, 5, 6])]


def test_single_number_is_the_adapter_of_all_rows_that_are_read_apart():
    seen = []

    def run(feeds):
        seen.append(feeds["adapter_ids"].tolist())
        return convolving(feeds)

    model = RightPaddedModel(run, STATE)

    recomputing(model)({**model.pad(ROWS, 0), "adapter_ids": np.array([4])})

    assert seen == [[4]] * 3


def test_rows_of_plain_attention_are_read_in_one_call():
    seen = []

    def run(feeds):
        seen.append(feeds["input_ids"].shape)
        return attending(feeds)

    model = RightPaddedModel(run, PLAIN)
    recomputing(model)(model.pad(ROWS, 0))

    assert seen == [(3, 7)]


def test_row_without_tokens_is_refused():
    tokens = np.zeros((2, 3), np.int64)
    mask = np.array([[1, 1, 0], [0, 0, 0]])

    with pytest.raises(UsageError, match="row 2: has no tokens"):
        MODELS["attention"].open({"input_ids": tokens, "attention_mask": mask})


def test_logits_behind_a_row_are_not_its_last():
    logits = np.arange(24.0).reshape(2, 4, 3)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])

    assert last_of_rows(logits, mask).tolist() == [logits[0, 1].tolist(), logits[1, 3].tolist()]
    assert last_of_rows(logits, mask[:, ::-1]).tolist() == logits[:, 3].tolist()
