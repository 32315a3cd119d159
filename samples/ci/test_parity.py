"""Every artifact of the repository, judged: `pytest test_parity.py`."""

import os
from pathlib import Path

import pytest

ARTIFACTS = Path(os.environ.get("ARTIFACTS", "artifacts"))
FOUND = sorted(path.parent for path in ARTIFACTS.rglob("propulsion.json"))


def test_there_are_artifacts():
    assert FOUND, f"{ARTIFACTS}: holds no artifact"


@pytest.mark.parametrize("artifact", FOUND, ids=str)
def test_it_computes_what_was_trained(artifact, assert_parity):
    assert_parity(artifact)
