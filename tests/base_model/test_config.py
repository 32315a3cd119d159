"""The configuration of a model directory is read, and refused when it is damaged."""

import pytest

from propulsion_export.base_model.config import read_config, read_settings
from propulsion_export.errors import ArtifactError, BaseModelError


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[1]", "is a list, expected settings by name")]
)
def test_a_damaged_configuration_is_an_error_and_none_is_not(tmp_path, text, message):
    assert read_settings(tmp_path) == {}

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_settings(tmp_path)


def test_a_configuration_with_an_impossible_value_is_one_line(tmp_path):
    pytest.importorskip("transformers", reason="it reads configurations")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')

    with pytest.raises(
        BaseModelError, match=r"config\.json is refused by transformers \(.*hidden_size"
    ):
        read_config(str(tmp_path))
