"""Reading with a cache, without one, and row by row is the same; a decoder that errs is noticed."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.errors import ArtifactError
from propulsion_export.runners.decoding import (
    CausalModel,
    Decoder,
    EncoderDecoder,
    alone,
    generate,
    greedy,
    pad_left,
    pieces_of,
    positions,
    recomputing,
    replaying,
    row_by_row,
)

PADDING = 0
CHOOSER = np.random.default_rng(7)
TABLE = CHOOSER.normal(size=(13, 3))
HEAD = CHOOSER.normal(size=(3, 13))
INPUTS = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("past_key_values.0.key", "float64", ("batch", 1, "past_sequence", 3)),
    TensorSpec("propulsion_scales", "float64", (13,), optional=True),
)
ROWS = [np.array([3, 8, 1, 5, 9, 12, 4]), np.array([7, 2]), np.array([11, 6, 6, 10, 5])]
# Rows shorter and longer than the steps of `replaying`.
DRAWN = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=14), min_size=1, max_size=4)


def fake(*, forgetful=False, maskless=False, counting=False):
    """A decoder whose logits depend on each visible token so far and where it stood.

    Its mistakes: to use new tokens only, to see padding, to count positions itself.
    """

    def run(feeds):
        tokens, mask, past = (
            feeds[name] for name in ("input_ids", "attention_mask", "past_key_values.0.key")
        )
        batch, new = tokens.shape
        assert mask.shape == (batch, past.shape[2] + new)
        places = np.arange(mask.shape[1])[-new:] if counting else feeds["position_ids"]
        made = TABLE[tokens] * np.cos(places + np.arange(3)[:, None, None]).transpose(1, 2, 0)
        keys = np.concatenate([past[:, 0], made], axis=1)
        seen = np.ones_like(mask) if maskless else mask
        weighted = keys * seen[:, :, None]
        if forgetful:
            weighted[:, : past.shape[2]] = 0
        sums = np.sin(weighted.cumsum(1)[:, -new:])
        scales = feeds.get("propulsion_scales", np.ones(13))
        return {LOGITS: sums @ HEAD * scales, "present.0.key": keys[:, None]}

    return run


def causal(**mistakes):
    return CausalModel(fake(**mistakes), INPUTS)


def encoding(feeds):
    hidden = TABLE[feeds["input_ids"]] * feeds["attention_mask"][:, :, None]
    # A table of positions, counted from the left.
    return {"last_hidden_state": hidden * np.cos(np.arange(hidden.shape[1]))[None, :, None]}


def crossing(seen):
    """A decoder that makes something of the encoder's output once, and never gives it back."""

    def run(feeds):
        seen.append(set(feeds))
        tokens, visible = feeds["input_ids"], feeds["encoder_attention_mask"]
        first = "past_key_values.0.encoder.key" not in feeds
        cross = feeds["encoder_hidden_states" if first else "past_key_values.0.encoder.key"]
        past = feeds.get("past_key_values.0.decoder.key", np.zeros((len(tokens), 0, 3)))
        keys = np.concatenate([past, TABLE[tokens]], axis=1)
        told = (cross * visible[:, :, None]).sum(1, keepdims=True)
        sums = np.sin(keys.cumsum(1)[:, -tokens.shape[1] :] + told)
        outputs = {LOGITS: sums @ HEAD, "present.0.decoder.key": keys}
        return outputs | ({"present.0.encoder.key": cross} if first else {})

    return run


def translator(seen=None):
    return EncoderDecoder(encoding, crossing([] if seen is None else seen), start=4)


def first_tokens(generator, feeds, count):
    return np.stack(list(itertools.islice(generate(generator, feeds, greedy), count)), axis=1)


def visible(values, batch):
    return values[batch["attention_mask"] == 1]


# Steps


def test_empty_cache_has_the_shape_and_dtype_of_the_inputs():
    inputs = [
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("past_key_values.1.value", "bfloat16", ("batch", 2, "past_sequence", 8)),
    ]

    state = Decoder(fake(), inputs).start(5)

    assert state.mask.shape == (5, 0)
    assert {name: values.shape for name, values in state.cache.items()} == {
        "past_key_values.1.value": (5, 2, 0, 8)
    }
    assert state.cache["past_key_values.1.value"].dtype == ml_dtypes.bfloat16


def test_step_feeds_the_whole_mask_and_the_positions_of_the_new_tokens():
    fed = []

    def run(feeds):
        fed.append(feeds)
        return fake()(feeds)

    decoder = Decoder(run, INPUTS)
    tokens, mask = np.array([[0, 3, 8], [7, 2, 5]]), np.array([[0, 1, 1], [1, 1, 1]])

    _, state = decoder.step(decoder.start(2), tokens, mask)
    _, state = decoder.step(state, np.array([[9], [9]]))

    assert fed[0]["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert fed[1]["position_ids"].tolist() == [[2], [3]]
    assert fed[1]["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert fed[1]["past_key_values.0.key"].shape == (2, 1, 3, 3)
    assert state.mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_padding_does_not_count_wherever_it_stands():
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]])

    assert positions(mask)[mask == 1].tolist() == [0, 1, 0, 1, 0, 1]
    assert (positions(mask) >= 0).all()


def test_greedy_is_the_first_of_the_likeliest():
    chosen = greedy(np.array([[0.5, 2.0, -1.0], [3.0, 3.0, 1.0]], np.float16))

    assert chosen.dtype == np.int64
    assert chosen.tolist() == [1, 0]


# Generating


def test_generated_tokens_are_those_of_one_pass_over_all_tokens_so_far():
    model = causal()
    prompt = model.pad(ROWS, PADDING)

    made = first_tokens(model, prompt, 9)

    for row, tokens in zip(ROWS, made, strict=True):
        whole = np.concatenate([row, tokens])[None]
        feeds = {"input_ids": whole, "attention_mask": np.ones_like(whole)}
        logits = recomputing(model)(feeds)[LOGITS]
        assert logits[0, len(row) - 1 : -1].argmax(-1).tolist() == tokens.tolist()
    assert len(np.unique(made)) > 3


@pytest.mark.parametrize("mistake", ["forgetful", "maskless", "counting"])
def test_generated_tokens_show_a_decoders_mistake(mistake):
    prompt = pad_left(ROWS, PADDING)

    wrong = first_tokens(causal(**{mistake: True}), prompt, 9)

    assert (wrong != first_tokens(causal(), prompt, 9)).any()


def test_token_is_chosen_before_the_next_step_is_taken():
    steps = []

    def run(feeds):
        steps.append(feeds["input_ids"].shape)
        return fake()(feeds)

    going = generate(CausalModel(run, INPUTS), pad_left(ROWS, PADDING), greedy)
    next(going)
    assert steps == [(3, 7)]
    next(going)
    assert steps == [(3, 7), (3, 1)]


def test_choice_is_the_callers():
    going = generate(causal(), pad_left(ROWS, PADDING), lambda logits: logits.argmin(-1))

    assert (next(going) != first_tokens(causal(), pad_left(ROWS, PADDING), 1)[:, 0]).all()


# Whole sequences in three ways


@settings(deadline=None, max_examples=60, derandomize=True)
@given(DRAWN)
def test_stepping_recomputing_and_rows_alone_agree(rows):
    batch = pad_left([np.array(row) for row in rows], PADDING)

    stepped = replaying(causal())(batch)[LOGITS]
    at_once = recomputing(causal())(batch)[LOGITS]
    apart = row_by_row(recomputing(causal()))(batch)[LOGITS]

    assert stepped.shape == at_once.shape == apart.shape == (*batch["input_ids"].shape, 13)
    np.testing.assert_allclose(stepped, at_once, rtol=0, atol=1e-12)
    np.testing.assert_allclose(visible(at_once, batch), visible(apart, batch), rtol=0, atol=1e-12)
    assert (apart[batch["attention_mask"] == 0] == 0).all()


def test_a_forgotten_cache_shows_only_when_stepping():
    batch = pad_left(ROWS, PADDING)
    right, wrong = causal(), causal(forgetful=True)

    np.testing.assert_array_equal(
        recomputing(wrong)(batch)[LOGITS], recomputing(right)(batch)[LOGITS]
    )
    assert not np.allclose(replaying(wrong)(batch)[LOGITS], replaying(right)(batch)[LOGITS])


@pytest.mark.parametrize("mistake", ["maskless", "counting"])
def test_a_mistake_with_padding_shows_against_rows_alone(mistake):
    batch, wrong = pad_left(ROWS, PADDING), causal(**{mistake: True})

    apart = row_by_row(recomputing(wrong))(batch)[LOGITS]

    # Without padding the same decoder is right.
    np.testing.assert_array_equal(apart, row_by_row(recomputing(causal()))(batch)[LOGITS])
    at_once = recomputing(wrong)(batch)[LOGITS]
    assert not np.allclose(visible(at_once, batch), visible(apart, batch))


@given(st.integers(1, 300))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_pieces_cover_every_position_once_and_in_order(length):
    pieces = pieces_of(length)

    assert [place for piece in pieces for place in range(*piece)] == list(range(length))
    assert all(start < end for start, end in pieces)
    sizes = [end - start for start, end in pieces]
    if length > 5:
        assert sizes == [length - 5, 2, 1, 1, 1]


# What an adapter feeds


def test_feeds_of_an_adapter_reach_every_step():
    scales = np.linspace(-2, 3, 13)
    batch = pad_left(ROWS, PADDING)

    scaled = replaying(causal())({**batch, "propulsion_scales": scales})[LOGITS]

    np.testing.assert_allclose(scaled, replaying(causal())(batch)[LOGITS] * scales)


def test_feeds_of_an_adapter_reach_the_encoder_and_every_step_of_the_decoder():
    seen, encoded = [], []

    def encode(feeds):
        encoded.append(set(feeds))
        return encoding(feeds)

    model = EncoderDecoder(encode, crossing(seen), start=4)
    feeds = {**model.pad(ROWS, PADDING), "propulsion_scales": np.ones(13)}

    first_tokens(model, feeds, 3)

    assert encoded == [{"input_ids", "attention_mask", "propulsion_scales"}]
    assert len(seen) == 3
    assert all("propulsion_scales" in step for step in seen)


def test_logits_with_batch_and_tokens_exchanged_are_refused():
    def exchanged(feeds):
        found = fake()(feeds)
        return {**found, LOGITS: found[LOGITS].swapaxes(0, 1)}

    model = CausalModel(exchanged, INPUTS)

    with pytest.raises(ArtifactError, match=r"logits have shape .* expected \[3, 2, vocabulary\]"):
        replaying(model)(model.pad(ROWS, PADDING))


# Encoder-decoders


def test_an_encoder_whose_output_has_another_name_is_refused():
    def renamed(feeds):
        return {"hidden": encoding(feeds)["last_hidden_state"]}

    model = EncoderDecoder(renamed, crossing([]), start=4)

    with pytest.raises(ArtifactError, match="returns hidden, expected last_hidden_state"):
        model.open(model.pad(ROWS, PADDING))


def test_encoder_decoder_opens_with_its_start_token_and_the_encoded_prompt():
    model = translator()
    prompt = model.pad(ROWS, PADDING)

    opening = model.open(prompt)

    assert opening.tokens.tolist() == [[4]] * 3
    assert opening.tokens.dtype == opening.mask.dtype == np.int64
    assert opening.mask.tolist() == [[1]] * 3
    feeds = opening.decoder.feeds
    assert feeds.keys() == {"encoder_hidden_states", "encoder_attention_mask"}
    np.testing.assert_array_equal(feeds["encoder_attention_mask"], prompt["attention_mask"])
    np.testing.assert_array_equal(
        feeds["encoder_hidden_states"], encoding(prompt)["last_hidden_state"]
    )


def test_encoder_decoder_reads_decoder_tokens_that_are_given():
    given_tokens = np.array([[4, 9, 1], [4, 2, 2], [4, 5, 12]])

    opening = translator().open(
        {**translator().pad(ROWS, PADDING), "decoder_input_ids": given_tokens}
    )

    np.testing.assert_array_equal(opening.tokens, given_tokens)
    assert (opening.mask == 1).all()
    assert "decoder_input_ids" not in opening.decoder.feeds


def test_what_was_made_of_the_encoders_output_is_kept_over_all_steps():
    seen = []
    model = translator(seen)

    first_tokens(model, model.pad(ROWS, PADDING), 4)

    assert ["past_key_values.0.encoder.key" in step for step in seen] == [False, True, True, True]


@pytest.mark.parametrize("decoded", [1, 2, 5, 7, 8])
def test_encoder_decoder_agrees_in_all_three_ways(decoded):
    """7 is also the length of the longest prompt: what the decoder reads is not the prompt's."""
    tokens = np.random.default_rng(decoded).integers(1, 13, (3, decoded))
    batch = {**translator().pad(ROWS, PADDING), "decoder_input_ids": tokens}

    stepped = replaying(translator())(batch)[LOGITS]
    apart = row_by_row(recomputing(translator()))(batch)[LOGITS]

    assert stepped.shape == (3, decoded, 13)
    np.testing.assert_allclose(stepped, recomputing(translator())(batch)[LOGITS], atol=1e-12)
    np.testing.assert_allclose(stepped, apart, rtol=0, atol=1e-12)


# Padding and rows


def test_prompts_are_padded_on_the_left_for_a_decoder_and_on_the_right_for_an_encoder():
    left, right = causal().pad(ROWS[:2], 9), translator().pad(ROWS[:2], 9)

    assert left["input_ids"][1].tolist() == [9, 9, 9, 9, 9, 7, 2]
    assert left["attention_mask"][1].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert right["input_ids"][1].tolist() == [7, 2, 9, 9, 9, 9, 9]
    assert right["attention_mask"][1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    for padded in (left, right):
        assert padded["input_ids"][0].tolist() == ROWS[0].tolist()
        assert {values.dtype for values in padded.values()} == {np.dtype(np.int64)}


def test_a_row_alone_is_without_what_the_mask_hides():
    batch = {
        "input_ids": np.array([[0, 3, 8], [7, 2, 5]]),
        "attention_mask": np.array([[0, 1, 1], [1, 1, 1]]),
        "scores": np.arange(8.0).reshape(2, 4),
    }

    row = alone(batch, 0)

    assert row["input_ids"].tolist() == [[3, 8]]
    assert row["attention_mask"].tolist() == [[1, 1]]
    assert row["scores"].tolist() == [[0, 1, 2, 3]]
    assert alone(batch, 1)["input_ids"].tolist() == [[7, 2, 5]]


def test_a_row_alone_keeps_all_that_its_decoder_reads():
    """Of as many tokens as the padded prompt, by chance."""
    batch = {
        "input_ids": np.array([[3, 8, 0], [7, 2, 5]]),
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
        "decoder_input_ids": np.array([[4, 1, 2], [4, 9, 9]]),
    }

    assert alone(batch, 0)["decoder_input_ids"].tolist() == [[4, 1, 2]]
