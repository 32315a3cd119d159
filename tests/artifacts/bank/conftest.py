"""A bank that holds three adapters and a row that is free."""

import pytest

from propulsion_export.artifacts.bank import Bank

from . import numbers, put


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "artifact"


@pytest.fixture
def bank(directory):
    """Holds a, b and c; the row of another one is between them and free."""
    made = Bank.create(directory, numbers(0))
    for seed, name in enumerate(["a", "dropped", "b", "c"], 1):
        put(made, name, seed)
    made.remove("dropped")
    return made
