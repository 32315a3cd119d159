"""Inputs that a tracer cannot misread, and that show what an artifact does."""

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification, DistilBertModel, RobertaConfig

from propulsion_export.sampling import input_names, parity_inputs, text_inputs, trace_inputs

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
