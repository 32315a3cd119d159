"""No text is longer than the positions that a model has for it."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, GPT2Config, MPNetConfig, RobertaConfig, T5Config
from transformers.models.auto import configuration_auto, modeling_auto

from propulsion_export.base_model.positions import BEHIND_PADDING, longest_input


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
