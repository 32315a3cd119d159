"""Sessions and artifacts that several modules here ask or change."""

from functools import cache
from types import SimpleNamespace

import pytest

from propulsion_export.serving.session import Session


@pytest.fixture(scope="session")
def merged(world, shared):
    pytest.importorskip("torch", reason="runs a checkpoint")
    from propulsion_export.pipeline.merge import merge

    return shared("world-merged", lambda root: merge(world.three, root / "three")) / "three"


@pytest.fixture(scope="session")
def opened(request):
    """`opened(kind)`: a session of it that all tests share; none changes its adapters."""
    return cache(lambda kind: Session(request.getfixturevalue(kind)))


@pytest.fixture(scope="session")
def make_task(make_world, exported, shared):
    """`make_task(task)`: a bank of two adapters, and `merged(name)`, a checkpoint of each."""

    def make(task):
        world = make_world("bert", task)

        def fill(root):
            from propulsion_export.pipeline.merge import merge

            for name in ("one", "two"):
                merge(world.root / name, root / name, untie=task == "fill-mask")

        def merged(name):
            return shared(f"merged-bert-{task}", fill) / name

        return SimpleNamespace(bank=exported("bert", "bank", task=task), merged=merged)

    return make


@pytest.fixture(scope="session")
def generative(make_world, exported):
    """`generative(kind)`: a session of a bank of two adapters, with what it was made of."""

    @cache
    def make(kind):
        bank = exported(kind, "bank")
        return SimpleNamespace(session=Session(bank), world=make_world(kind), directory=bank)

    return make
