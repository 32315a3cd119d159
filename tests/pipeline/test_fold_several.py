"""Several adapters folded by one `onnx --from`, or several modes of one export: all or none."""

import os
import random
import shutil
import signal
import time
import warnings
from functools import partial
from pathlib import Path

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.errors import UsageError
from propulsion_export.pipeline import fold_onnx as pipeline
from propulsion_export.pipeline.fold_onnx import fold_onnx
from propulsion_export.pipeline.places import Places


def contents(directory):
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def several(world):
    return [world.three, f"other={world.five}"]


def test_nothing_is_left_when_the_second_cannot_be_written(
    several, switchable, tmp_path, monkeypatch
):
    plain, calls = pipeline.write_graphs, []

    def full(programs, directory):
        calls.append(directory)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        plain(programs, directory)

    monkeypatch.setattr(pipeline, "write_graphs", full)
    with pytest.raises(UsageError, match="no space left on the device; nothing was written"):
        fold_onnx(several, tmp_path / "out", from_artifact=switchable)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", [1, 2, 3])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_rename_that_fails_leaves_what_was_there(
    which, earlier, several, switchable, tmp_path, monkeypatch
):
    if earlier:
        fold_onnx(several, tmp_path / "out", from_artifact=switchable)
    before, plain, calls = contents(tmp_path), Path.rename, []

    def refuse(path, target):
        if path.name.startswith((".out", "out", ".three", ".other")):
            calls.append(path)
            if len(calls) == which:
                raise PermissionError(13, "Permission denied")
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    try:
        fold_onnx(several, tmp_path / "out", from_artifact=switchable, force=True)
    except (UsageError, PermissionError):
        assert contents(tmp_path) == before
    else:
        assert len(calls) < which
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other", "three"]

    assert not [path for path in tmp_path.rglob(".*") if "partial" in path.name]


def test_what_appears_beside_it_meanwhile_is_kept(several, switchable, tmp_path, monkeypatch):
    plain = pipeline.write_graphs

    def beside(programs, directory):
        plain(programs, directory)
        (tmp_path / "out" / "other").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "other" / "mine.txt").write_text("mine")

    monkeypatch.setattr(pipeline, "write_graphs", beside)
    with pytest.raises(UsageError, match="exists and is not empty"):
        fold_onnx(several, tmp_path / "out", from_artifact=switchable)

    assert contents(tmp_path) == {"out/other/mine.txt": b"mine"}


def test_artifacts_beside_those_that_are_written_are_not_replaced(several, switchable, tmp_path):
    fold_onnx([several[0]], tmp_path / "out" / "mine", from_artifact=switchable)
    before = contents(tmp_path)

    with pytest.raises(UsageError, match="exists and is not empty"):
        fold_onnx(several, tmp_path / "out", from_artifact=switchable)
    with pytest.raises(UsageError, match=r"out: holds mine, expected nothing but three and other"):
        fold_onnx(several, tmp_path / "out", from_artifact=switchable, force=True)

    assert contents(tmp_path) == before


def test_each_is_an_artifact_where_it_says(several, switchable, tmp_path):
    for _ in range(2):
        made = fold_onnx(several, tmp_path / "out", from_artifact=switchable, force=True)

        assert {name: Artifact.read(tmp_path / "out" / name) for name in made} == made


@pytest.mark.parametrize("names", [["folded"], ["folded", "bank"]])
def test_a_failure_in_staging_leaves_no_directory(names, tmp_path):
    places = Places(tmp_path / "out", names, "onnx", False, ())

    def fail():
        with places.staged() as staged:
            for place in staged.values():
                (place / "propulsion.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert not list(tmp_path.iterdir())


def kill_after(seconds, call):
    """Call in a process of its own, which gets no further than some seconds allow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child needs none
        child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_after_each_kill_the_output_is_absent_or_right(count, world, switchable, tmp_path):
    """Adapters `a` and `b` are exchanged from one run to the next."""
    out, chooser, seconds, right = tmp_path / "out", random.Random(0), [], []
    wanted = [
        [f"a={one}", f"b={other}"]
        for one, other in ((world.three, world.five), (world.five, world.three))
    ]
    for number, adapters in enumerate(wanted):
        start = time.monotonic()
        fold_onnx(adapters, tmp_path / f"right-{number}", from_artifact=switchable)
        seconds.append(time.monotonic() - start)
        right.append(contents(tmp_path / f"right-{number}"))
    begun = 0

    for number in range(count):
        if number % 3 == 0:
            shutil.rmtree(out, ignore_errors=True)
        fold = partial(fold_onnx, wanted[number % 2], out, from_artifact=switchable, force=True)
        kill_after(chooser.uniform(0, 1.5 * min(seconds)), fold)

        begun += any(tmp_path.glob(".out.partial-*"))
        assert not out.exists() or contents(out) in right
        assert all(Artifact.read(place) for place in (out.iterdir() if out.exists() else ()))

    assert begun > count // 10  # of these, files were half written
    fold_onnx(wanted[0], out, from_artifact=switchable, force=True)
    assert contents(out) == right[0]
    assert not list(tmp_path.rglob(".*"))
