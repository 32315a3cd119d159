from types import SimpleNamespace

import pytest

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.base_model.special_tokens import SpecialTokens
from propulsion_export.packaging.genai import genai_config

CONFIG = SimpleNamespace(hidden_size=64, num_attention_heads=8, vocab_size=100)
CACHE = tuple(
    TensorSpec(f"past_key_values.{layer}.{kind}", "float32", ("batch", 2, "past_sequence", 16))
    for layer in range(3)
    for kind in ("key", "value")
)
TEXT = tuple(
    TensorSpec(name, "int64", ("batch", "sequence"))
    for name in ("input_ids", "attention_mask", "position_ids")
)
SCALES = TensorSpec("propulsion_scales", "float32", (5,), optional=True)


def test_the_configuration_describes_the_cache_and_no_input_of_adapters():
    content = genai_config(
        (*TEXT, *CACHE, SCALES), CONFIG, SpecialTokens(1, (2, 7), 0), longest=160
    )

    decoder = content["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 3
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (2, 16)
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert content["model"]["eos_token_id"] == [2, 7]
    assert content["model"]["context_length"] == content["search"]["max_length"] == 160
    assert content["search"]["past_present_share_buffer"] is False


def test_a_graph_without_positions_is_not_fed_any():
    content = genai_config((*TEXT[:2], *CACHE), CONFIG, SpecialTokens(), longest=160)

    assert "position_ids" not in content["model"]["decoder"]["inputs"]


@pytest.mark.parametrize(
    ("special", "pad"),
    [(SpecialTokens(None, (5, 6), None), 5), (SpecialTokens(), 0), (SpecialTokens(pad=9), 9)],
)
def test_a_model_without_a_padding_token_is_padded_with_another(special, pad):
    content = genai_config((*TEXT, *CACHE), CONFIG, special, longest=160)

    assert content["model"]["pad_token_id"] == pad
