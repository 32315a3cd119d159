"""An adapter that is added later computes what it did from the start, or the verdict fails."""

import shutil
import tempfile

import numpy as np
import pytest

from propulsion_export.artifacts import changing
from propulsion_export.artifacts.artifact import Artifact, digest_of
from propulsion_export.artifacts.tensor_names import IDS_INPUT, SCALES_INPUT
from propulsion_export.pipeline import parity
from propulsion_export.pipeline.parity import check_parity

MODES = ("switchable", "bank")


def failed(report):
    return {(check.case, check.adapter) for check in report.checks if not check.passed}


@pytest.mark.parametrize("mode", MODES)
def test_every_adapter_is_as_from_the_start(mode, export_world):
    report = check_parity(export_world(mode))

    added = {check.adapter: check for check in report.checks if check.case == "added"}
    assert set(added) == {"three", "five"}
    assert report.passed
    assert added["three"].detail.startswith("bit for bit")


@pytest.mark.parametrize("mode", MODES)
def test_the_artifact_stays_as_it_is_and_nothing_is_left_behind(
    mode, export_world, tmp_path, monkeypatch
):
    directory = shutil.copytree(export_world(mode), tmp_path / "artifact")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = digests(directory)

    check_parity(directory)

    assert digests(directory) == before
    assert list((tmp_path / "temporary").iterdir()) == []


def digests(directory):
    return {
        file.relative_to(directory).as_posix(): digest_of(file)
        for file in directory.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("mode", MODES)
def test_adapters_that_moved_are_added_as_they_were_judged(mode, world, export_world, tmp_path):
    moved = {
        name: shutil.copytree(world.root / name, tmp_path / name) for name in ("three", "five")
    }
    out = shutil.copytree(export_world(mode), tmp_path / "out")
    for name, place in moved.items():
        changing.add_adapter(out, f"{name}={place}", force=True)
        shutil.rmtree(place)
    assert Artifact.read(out).list_adapters()["three"].source == str(moved["three"])

    report = check_parity(out, adapter=[f"three={world.three}", f"five={world.five}"])

    assert {check.adapter for check in report.checks if check.case == "added"} == {"three", "five"}
    assert report.passed


@pytest.mark.parametrize("mode", MODES)
def test_slots_are_judged_by_adding_a_drawn_adapter(mode, export_slots):
    report = check_parity(export_slots(mode))

    assert report.passed
    assert ("added", "random") in {(check.case, check.adapter) for check in report.checks}


def test_a_folded_artifact_has_no_such_case(folded):
    assert "added" not in {check.case for check in check_parity(folded).checks}


def rounded_to_16_bits_first(feeds):
    scales = feeds[SCALES_INPUT]
    return {**feeds, SCALES_INPUT: scales.astype(np.float16).astype(scales.dtype)}


def one_channel_later(feeds):
    return {**feeds, SCALES_INPUT: np.roll(feeds[SCALES_INPUT], 1)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mistake", [rounded_to_16_bits_first, one_channel_later])
def test_an_adapter_that_is_packed_otherwise_later_fails(mode, mistake, export_world, monkeypatch):
    pack = changing.pack
    monkeypatch.setattr(changing, "pack", lambda *given: mistake(pack(*given)))

    assert failed(check_parity(export_world(mode))) == {("added", "three"), ("added", "five")}


def test_a_graph_that_takes_no_more_adapters_than_it_had_fails(banked, monkeypatch):
    """Ids beyond the last row of the export are those of the last row."""
    opened = parity.open_candidate

    def clamped(*arguments, **options):
        run = opened(*arguments, **options)
        return lambda feeds: run({**feeds, IDS_INPUT: np.minimum(feeds[IDS_INPUT], 2)})

    monkeypatch.setattr(parity, "open_candidate", clamped)

    assert {case for case, _ in failed(check_parity(banked))} == {"added", "mixed"}
