"""Inputs that a tracer cannot misread, and that show what an artifact does."""

import numpy as np
import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertModel,
    LlamaConfig,
    RobertaConfig,
    T5Config,
)

from propulsion_export.base_model.tokenizer.reading import text_inputs
from propulsion_export.graph.sample_inputs import (
    input_names,
    padded_left,
    trace_inputs,
    trace_prompt,
)
from propulsion_export.parity.inputs import decoder_inputs, parity_inputs, with_decoder_tokens

NAMES = ("input_ids", "attention_mask", "token_type_ids")
CONFIG = BertConfig(vocab_size=100, max_position_embeddings=40)


def sizes_in(config):
    return {value for value in config.to_dict().values() if isinstance(value, int)}


def assert_padded(batch, config):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape
    assert ((ids == config.pad_token_id) == (mask == 0)).all()
    assert ids.max() < config.vocab_size
    assert (np.diff(mask, axis=1) <= 0).all()


def test_names_are_those_the_model_reads(tiny_bert):
    assert input_names(BertForSequenceClassification, CONFIG) == NAMES
    assert input_names(DistilBertModel, CONFIG) == NAMES[:2]


def test_token_types_are_left_out_when_there_is_only_one():
    config = RobertaConfig(type_vocab_size=1)

    assert input_names(BertForSequenceClassification, config) == NAMES[:2]


def test_trace_inputs_are_padded_and_of_sizes_that_the_configuration_does_not_hold():
    config = BertConfig(vocab_size=100, num_hidden_layers=11, num_attention_heads=12)

    batch = trace_inputs(NAMES, config)

    assert_padded(batch, config)
    assert (batch["attention_mask"] == 0).any()
    assert batch["input_ids"].shape[1] not in sizes_in(config)
    assert min(batch["input_ids"].shape) > 1


def test_parity_inputs_are_16_rows_of_several_lengths_the_same_for_one_seed():
    made, again = parity_inputs(NAMES, CONFIG, seed=3), parity_inputs(NAMES, CONFIG, seed=3)
    other = parity_inputs(NAMES, CONFIG, seed=4)

    for batch in made:
        assert_padded(batch, CONFIG)
    assert sum(batch["input_ids"].shape[0] for batch in made) == 16
    assert len({batch["input_ids"].shape[1] for batch in made}) > 1
    assert all(
        np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again, strict=True)
    )
    assert not np.array_equal(made[0]["input_ids"], other[0]["input_ids"])


def test_parity_inputs_stay_within_the_positions_and_the_limit():
    longest = max(b["input_ids"].shape[1] for b in parity_inputs(NAMES, CONFIG, seed=1))
    limited = max(b["input_ids"].shape[1] for b in parity_inputs(NAMES, CONFIG, seed=1, longest=8))

    assert longest == 40
    assert limited <= 8


@pytest.mark.parametrize("padding", [0, 1, 99], ids=["first", "second", "last"])
def test_tokens_vary_wherever_the_padding_token_stands(padding):
    config = BertConfig(vocab_size=100, max_position_embeddings=40, pad_token_id=padding)

    for batch in parity_inputs(NAMES, config, seed=0):
        assert_padded(batch, config)
        assert len(np.unique(batch["input_ids"])) > 20


def test_texts_become_one_padded_batch_cut_at_the_limit(tiny_tokenizer):
    batch = text_inputs(NAMES, tiny_tokenizer, ["ba be bi", "ca " * 50], 6)

    assert batch["input_ids"].tolist()[0] == [2, 5, 6, 7, 3, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["input_ids"].dtype == np.int64


def test_texts_get_every_input_the_model_reads(tiny_tokenizer):
    # This tokenizer makes no token types unless it is asked for them.
    assert "token_type_ids" not in tiny_tokenizer(["ba"])

    assert tuple(text_inputs(NAMES, tiny_tokenizer, ["ba"], 6)) == NAMES
    assert tuple(text_inputs(NAMES[:2], tiny_tokenizer, ["ba"], 6)) == NAMES[:2]


# Generative models


def decoder_config(**settings):
    return LlamaConfig(vocab_size=100, pad_token_id=0, max_position_embeddings=64, **settings)


def assert_padded_left(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == np.int64
    assert ((ids == 0) == (mask == 0)).all()
    assert (np.diff(mask, axis=1) >= 0).all()
    assert (mask[:, -1] == 1).all()


def test_prompt_to_trace_behind_is_padded_on_the_left_and_of_sizes_of_its_own():
    config = decoder_config(num_attention_heads=11, hidden_size=132)

    prompt = trace_prompt(config)

    assert_padded_left(prompt)
    assert prompt.keys() == {"input_ids", "attention_mask"}
    assert (prompt["attention_mask"] == 0).any()
    assert len(prompt["input_ids"]) > 1
    assert prompt["input_ids"].shape[1] not in sizes_in(config)


def test_decoder_inputs_are_16_rows_padded_on_the_left_long_enough_to_step_through():
    made, again = (decoder_inputs(decoder_config(), seed=3) for _ in range(2))
    other = decoder_inputs(decoder_config(), seed=4)

    for batch, same in zip(made, again, strict=True):
        assert_padded_left(batch)
        assert batch["attention_mask"].sum(1).min() >= 7
        np.testing.assert_array_equal(batch["input_ids"], same["input_ids"])
    assert sum(len(batch["input_ids"]) for batch in made) == 16
    assert any((batch["attention_mask"] == 0).any() for batch in made)
    assert not np.array_equal(made[0]["input_ids"], other[0]["input_ids"])


def test_decoder_inputs_stay_within_the_positions_and_the_limit():
    def longest(**options):
        config = decoder_config()
        config.max_position_embeddings = options.pop("positions", 64)
        return max(b["input_ids"].shape[1] for b in decoder_inputs(config, seed=1, **options))

    assert 20 < longest() <= 48
    assert longest(longest=8) <= 8
    assert longest(positions=12) <= 12


@pytest.mark.parametrize("padding", [-1, 100, 40_000], ids=["minus-one", "size", "beyond"])
def test_padding_token_that_is_no_entry_of_the_vocabulary_is_not_fed(padding):
    """Some checkpoints say -1, some have a padding token that the table has no row for."""
    config = decoder_config()
    config.pad_token_id = padding

    for batch in decoder_inputs(config, seed=0):
        assert batch["input_ids"].min() >= 0
        assert batch["input_ids"].max() < 100
        assert_padded_left(batch)


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 0], [1, 1, 1]], [[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]]],
    ids=["right", "left", "inside"],
)
def test_padding_goes_to_the_left_wherever_it_was(mask):
    mask = np.array(mask)
    tokens = np.where(mask == 1, mask.cumsum(1) + 5, 0)

    moved = padded_left({"input_ids": tokens, "attention_mask": mask})

    assert moved["input_ids"].tolist() == [[0, 6, 7], [6, 7, 8]]
    assert moved["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_decoder_tokens_are_the_start_and_seven_random_ones_for_every_row():
    config = T5Config(vocab_size=100, pad_token_id=0, decoder_start_token_id=7)
    batches = parity_inputs(NAMES[:2], config, seed=3)

    made = with_decoder_tokens(batches, config, seed=3)
    other = with_decoder_tokens(batches, config, seed=4)

    for before, batch in zip(batches, made, strict=True):
        tokens = batch["decoder_input_ids"]
        assert tokens.shape == (len(batch["input_ids"]), 8)
        assert tokens.dtype == np.int64
        assert (tokens[:, 0] == 7).all()
        assert len(np.unique(tokens[:, 1:])) > 10
        assert tokens.max() < 100
        assert all(np.array_equal(batch[name], before[name]) for name in before)
    assert not np.array_equal(made[0]["decoder_input_ids"], other[0]["decoder_input_ids"])
    assert "decoder_input_ids" not in batches[0]
