import pytest
from written_artifacts import write_folded, write_several, write_switchable


@pytest.fixture
def several(tmp_path):
    """An artifact of three graphs."""
    return write_several(tmp_path / "onnx").directory


@pytest.fixture
def folded(tmp_path):
    return write_folded(tmp_path / "onnx").directory


@pytest.fixture
def switchable(tmp_path):
    return write_switchable(tmp_path / "onnx").directory
