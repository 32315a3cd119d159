"""Several adapters folded by one `onnx --from`, or several modes of one export: all or none."""

import json
import subprocess
import sys
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
    places = Places(tmp_path / "out", names, False, ())

    def fail():
        with places.staged() as staged:
            for place in staged.values():
                (place / "propulsion.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert not list(tmp_path.iterdir())


KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.fold_onnx import fold_onnx

source, first, second, count = *sys.argv[1:4], int(sys.argv[4])
out, wanted = Path("out"), ([first, second], [second, first])

def content(directory):
    names = sorted(path for path in directory.rglob("*") if path.is_file())
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in names}

right, seconds = [], []
for number, adapters in enumerate(wanted):
    named = [f"{name}={each}" for name, each in zip(("a", "b"), adapters)]
    wanted[number][:] = named
    start = time.monotonic()
    fold_onnx(named, Path(f"right-{number}"), from_artifact=source)
    seconds.append(time.monotonic() - start)
    right.append(content(Path(f"right-{number}")))

random.seed(0)
found = {"absent": 0, "complete": 0, "wrong": 0, "begun": 0}
for number in range(count):
    if number % 3 == 0:
        shutil.rmtree(out, ignore_errors=True)
    child = os.fork()
    if child == 0:
        fold_onnx(wanted[number % 2], out, from_artifact=source, force=True)
        os._exit(0)
    time.sleep(random.uniform(0, 1.2 * min(seconds)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found["begun"] += any(Path().glob(".out.partial-*"))
    if not out.exists():
        found["absent"] += 1
        continue
    for place in sorted(out.iterdir()):
        Artifact.read(place)
    found["complete" if content(out) in right else "wrong"] += 1
fold_onnx(wanted[0], out, from_artifact=source, force=True)
found["last"] = content(out) == right[0]
found["left"] = [path.name for path in Path().rglob(".*")]
print(json.dumps(found))
"""


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_after_each_kill_the_output_is_absent_or_right(count, world, switchable, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, *map(str, (switchable, world.three, world.five, count))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == 0
    assert found["absent"] + found["complete"] == count
    assert found["begun"] >= count // 10  # of these, files were half written
    assert found["last"]
    assert found["left"] == []
