"""No text is longer than the positions that a model has for it."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, GPT2Config, MPNetConfig, RobertaConfig, T5Config
from transformers.models.auto import configuration_auto, modeling_auto

from propulsion_export.base_model.config import read_settings, save_config
from propulsion_export.base_model.positions import (
    BEHIND_PADDING,
    OTHER_NAMES,
    as_config,
    longest_input,
)


class Tokenizer:
    def __init__(self, limit):
        self.model_max_length = limit


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=5), 508),
        (MPNetConfig(max_position_embeddings=514, pad_token_id=0), 512),
        (GPT2Config(n_positions=300), 300),
        (T5Config(), 512),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_longest_input_is_what_the_position_table_leaves(config, expected):
    assert longest_input(config) == expected


def test_a_tokenizer_may_allow_less_but_never_more():
    assert longest_input(BertConfig(), Tokenizer(256)) == 256
    assert longest_input(BertConfig(), Tokenizer(int(1e30))) == 512
    assert longest_input(RobertaConfig(max_position_embeddings=514), Tokenizer(514)) == 512


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "deberta-v2", "electra", "albert"])
def test_a_model_takes_the_longest_input_and_with_fewer_positions_would_not(kind, tiny_model):
    model = tiny_model(kind, "feature-extraction")
    longest = longest_input(model.config)
    tokens = torch.full((1, longest + 1), 7)

    assert model(tokens[:, :-1]).last_hidden_state.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens)


@pytest.mark.parametrize(
    ("kind", "positions"), [("gpt2", 160), ("gptj", 160), ("t5", None), ("bloom", None)]
)
def test_a_saved_configuration_has_the_positions_of_transformers_own(
    kind, positions, tiny_model, tmp_path
):
    model = tiny_model(kind)
    save_config(model, tmp_path, "float32")

    read = as_config(read_settings(tmp_path))

    assert getattr(read, "max_position_embeddings", None) == positions
    assert getattr(model.config, "max_position_embeddings", None) == positions
    assert longest_input(read) == longest_input(model.config)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "deberta-v2", "electra", "albert"])
def test_a_saved_encoder_has_the_longest_input_of_transformers_own(kind, tiny_model, tmp_path):
    model = tiny_model(kind, "feature-extraction")
    save_config(model, tmp_path, "float32")

    read = as_config(read_settings(tmp_path))

    assert longest_input(read) == longest_input(model.config)
    assert getattr(read, "type_vocab_size", 0) == getattr(model.config, "type_vocab_size", 0)


def test_every_other_name_of_positions_is_known():
    mapping = configuration_auto.CONFIG_MAPPING
    maps = {kind: getattr(mapping[kind], "attribute_map", {}) for kind in mapping}
    name = "max_position_embeddings"

    assert {kind: names[name] for kind, names in maps.items() if name in names} == OTHER_NAMES
    assert not any("type_vocab_size" in names for names in maps.values())


def test_every_type_that_counts_from_behind_the_padding_is_known():
    tasks = ("MASKED_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")
    kinds = {
        kind for task in tasks for kind in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    }
    found = {kind for kind in kinds if pads_positions(kind)}

    assert {"roberta", "mpnet", "camembert"} <= found
    assert found <= BEHIND_PADDING
    assert {kind for kind in BEHIND_PADDING & kinds if not pads_positions(kind)} == set()
    assert all(AutoConfig.for_model(kind).model_type == kind for kind in BEHIND_PADDING & kinds)


def pads_positions(kind):
    """Whether the source of a model type makes its position embedding with a padding index."""
    name = configuration_auto.model_type_to_module_name(kind)
    folder = Path(importlib.import_module(f"transformers.models.{name}").__file__).parent
    made = re.compile(r"self\.position_embeddings = [\w.]+\([^)]*padding_idx=self\.padding_idx")
    return any(
        made.search(file.read_text(encoding="utf-8"))
        for file in folder.glob(f"modeling_{kind.replace('-', '_')}.py")
    )
