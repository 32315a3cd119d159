import json

import pytest

from propulsion_export.base_model.special_tokens import SpecialTokens
from propulsion_export.errors import ArtifactError


@pytest.fixture
def read(tmp_path):
    """`read(config, generation)`: the special tokens of a directory with these two files."""

    def make(config, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return SpecialTokens.read(tmp_path)

    return make


def test_a_model_may_have_several_end_tokens(read):
    found = read({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": [7, 8]})

    assert found == SpecialTokens(begin=1, end=(7, 8))


def test_without_a_generation_config_the_configuration_counts(read):
    assert read({"eos_token_id": 2, "pad_token_id": 0}) == SpecialTokens(end=(2,), pad=0)


def test_no_token_is_no_token(read):
    found = read({"eos_token_id": None, "pad_token_id": -1, "bos_token_id": 5}, {})

    assert found == SpecialTokens(begin=5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token's number"),
        ({"eos_token_id": [1, None]}, "eos_token_id is None"),
        ([1], "holds a list, expected an object"),
    ],
)
def test_what_is_no_number_is_told(config, message, read):
    with pytest.raises(ArtifactError, match=message):
        read(config)


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{")

    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read as JSON"):
        SpecialTokens.read(tmp_path)
