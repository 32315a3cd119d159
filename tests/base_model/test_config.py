"""The configuration of a model directory is read, and refused when it is damaged."""

import pytest

from propulsion_export.base_model.config import read_settings
from propulsion_export.errors import ArtifactError


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[1]", "is a list, expected settings by name")]
)
def test_a_damaged_configuration_is_an_error_and_none_is_not(tmp_path, text, message):
    assert read_settings(tmp_path) == {}

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_settings(tmp_path)
