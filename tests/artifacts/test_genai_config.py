import json

import pytest

from propulsion_export.artifacts.genai_config import with_cache_sizes
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.errors import ArtifactError


def cache(layer, width, length="past_sequence_length"):
    shape = ("batch", 2, length, width)
    return TensorSpec(f"past_key_values.{layer}.key", "float32", shape)


TOKENS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
CONVOLUTION = TensorSpec("past.0.conv", "float32", ("batch", 64, 2))
WINDOW = {"window_size": 8, "layers": [1], "cache_slack": 3}


def write(directory, **decoder):
    (directory / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    return directory


def test_width_and_windows_are_filled_in(tmp_path):
    directory = write(tmp_path, head_size=16, sliding_window=WINDOW)
    inputs = (TOKENS, *(cache(layer, "kv_cache_dim") for layer in (0, 1, 11)), CONVOLUTION)

    found = with_cache_sizes(inputs, directory)

    assert found == (
        TOKENS,
        cache(0, 16),
        cache(1, 16, length=11),
        cache(11, 16),
        CONVOLUTION,
    )


def test_cache_without_a_window_is_empty_at_first(tmp_path):
    directory = write(tmp_path, head_size=16)

    assert with_cache_sizes([cache(1, "kv_cache_dim")], directory) == (cache(1, 16),)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"model": {"decoder": {"head_size": "wide"}}}'],
)
def test_damaged_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "genai_config.json").write_text(content)

    with pytest.raises(ArtifactError, match=r"genai_config\.json: "):
        with_cache_sizes([TOKENS], tmp_path)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"genai_config\.json: cannot be read"):
        with_cache_sizes([TOKENS], tmp_path)
