"""Weights that a session computes with are those that the manifest recorded, or it refuses."""

import os
import shutil

import numpy as np
import pytest

from propulsion_export.artifacts.watched_file import WatchedFile
from propulsion_export.errors import ArtifactError
from propulsion_export.serving.session import Session

TOKENS = np.random.default_rng(0).integers(5, 99, (2, 7))
INPUTS = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}


@pytest.fixture(scope="session")
def merged(world, shared):
    pytest.importorskip("torch", reason="runs a checkpoint")
    from propulsion_export.pipeline.merge import merge

    return shared("world-merged", lambda root: merge(world.three, root / "three")) / "three"


@pytest.fixture(params=["switchable", "merged"])
def served(request, tmp_path):
    """A session that has answered, its file of weights, and what it answered."""
    source = request.getfixturevalue(request.param)
    directory = shutil.copytree(source, tmp_path / "artifact")
    session = Session(directory)
    file = directory / ("model.safetensors" if request.param == "merged" else "model.onnx")
    return session, file, logits_of(session)


def logits_of(session):
    return [reply.outputs["logits"] for reply in session(INPUTS, session.adapters[0])]


def test_weights_that_are_written_to_are_refused_and_right_once_they_are_back(served):
    session, file, before = served
    content, stat = file.read_bytes(), file.stat()
    file.write_bytes(bytes(len(content)))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    for _ in range(2):
        with pytest.raises(ArtifactError, match=f"{file.name}: was changed while it is being serv"):
            session(INPUTS)

    file.write_bytes(content)
    np.testing.assert_array_equal(logits_of(session), before)


def test_weights_that_were_refused_stay_refused_once_they_are_deleted(served):
    session, file, _ = served
    stat = file.stat()
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ArtifactError, match="was changed while it is being served"):
        session(INPUTS)

    shutil.rmtree(file.parent)
    with pytest.raises(ArtifactError, match="was changed while it is being served"):
        session(INPUTS)


def test_weights_that_others_take_the_place_of_are_still_computed_with(served, monkeypatch):
    session, file, before = served
    other = file.with_name("other")
    other.write_bytes(b"another model")
    other.replace(file)
    monkeypatch.delattr(WatchedFile, "digest")  # a file of gigabytes is not read for it

    np.testing.assert_array_equal(logits_of(session), before)


def test_a_file_that_is_written_to_and_then_replaced_is_refused(served):
    session, file, _ = served
    file.write_bytes(bytes(file.stat().st_size - 1))
    file.unlink()

    with pytest.raises(ArtifactError, match="was changed while it is being served"):
        session(INPUTS)


def test_weights_are_read_once_after_something_else_about_them_has_changed(served, monkeypatch):
    session, file, _ = served
    digest, read = WatchedFile.digest, []
    monkeypatch.setattr("propulsion_export.artifacts.watched_file._CLOCK_TICK", 0)
    monkeypatch.setattr(WatchedFile, "digest", lambda self: read.append(1) or digest(self))
    logits_of(session)
    read.clear()

    file.chmod(0o640)
    for _ in range(3):
        logits_of(session)

    assert read == [1]
