import pytest
from releases import KINDS, Releases


@pytest.fixture
def releases(switchable, banked, world, tmp_path):
    places = {"switchable": switchable, "banked": banked}
    return lambda kind: Releases(places[kind], tmp_path / kind, world.five)


@pytest.fixture(autouse=True)
def _root(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
