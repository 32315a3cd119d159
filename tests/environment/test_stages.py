"""Stages are measured where somebody measures; collection is paused and goes on."""

import gc
import time

import pytest

from propulsion_export.environment.collection import no_collection
from propulsion_export.environment.stages import measured, stage


def spend(seconds):
    began = time.process_time()
    while time.process_time() < began + seconds:
        pass


def test_a_stage_that_runs_twice_adds_up_and_one_inside_is_in_both():
    with measured() as stages:
        for _ in range(2):
            with stage("outer"), stage("inner"):
                spend(0.02)
        with stage("waiting"):
            time.sleep(0.03)

    assert list(stages.seconds) == ["outer", "inner", "waiting"]
    for name in ("outer", "inner"):
        assert min(stages.seconds[name]) >= 0.04
    wall, cpu = stages.seconds["waiting"]
    assert wall >= 0.03 > cpu
    assert [line.split()[0] for line in stages.lines()] == ["outer", "inner", "waiting"]


def test_a_stage_that_fails_is_measured_too():
    with measured() as stages, pytest.raises(ValueError, match="no"), stage("failing"):
        raise ValueError("no")

    assert list(stages.seconds) == ["failing"]


def test_nothing_is_kept_where_nobody_measures():
    with stage("before"):
        pass
    with measured() as stages:
        pass
    with stage("after"):
        pass

    assert stages.seconds == {}
    assert stages.lines() == []


def test_collection_is_as_before_after_a_pause():
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()

    with pytest.raises(ValueError, match="no"), no_collection():
        raise ValueError("no")
    assert gc.isenabled()
