"""On an overlay file system --force fails with EXDEV, after all the work.

In a container, directories that came with the image cannot be renamed. Whoever replaces an output
there gets the new one, and a kill at any line leaves the old or the new one whole.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from propulsion_export.artifacts.replacing import replace_directory, sweep
from propulsion_export.artifacts.staging import check_replaceable, replace_file, staged_directory
from propulsion_export.errors import UsageError

MARKER = "adapter_config.json"
OLD = {MARKER: b"{}", "weights": b"old", "deep/more": b"old"}
NEW = {MARKER: b"{}", "weights": b"new"}


def fill(directory, content):
    for name, data in content.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return directory


def content_of(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def write_new(out, *, force=True):
    with staged_directory(out, marker=MARKER, force=force) as partial:
        fill(partial, NEW)


def mounted(*arguments):
    try:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture(name="image")
def make_image(tmp_path):
    """A real overlay: `out` and `empty` lie in its lower layer, as in a container's image."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for directory in (upper, work, merged, lower / "empty"):
        directory.mkdir(parents=True)
    fill(lower / "out", OLD)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted("-t", "overlay", "overlay", "-o", options, merged)
    yield merged
    subprocess.run(["umount", str(merged)], check=True)


def test_an_output_of_the_image_is_replaced(image):
    with pytest.raises(OSError, match="cross-device"):
        (image / "out").rename(image / "elsewhere")  # what this is about

    write_new(image / "out")

    assert content_of(image / "out") == NEW
    assert sorted(path.name for path in image.iterdir()) == ["empty", "out"]


def test_an_empty_directory_of_the_image_needs_no_force(image):
    write_new(image / "empty", force=False)

    assert content_of(image / "empty") == NEW
    assert content_of(image / "out") == OLD
    assert sorted(path.name for path in image.iterdir()) == ["empty", "out"]


def test_a_file_of_the_image_is_replaced(image):
    replace_file(image / "out" / "weights", b"new")

    assert content_of(image / "out") == OLD | {"weights": b"new"}


@pytest.fixture(name="no_renaming", params=[errno.EXDEV, errno.EBUSY], ids=["EXDEV", "EBUSY"])
def make_no_renaming(monkeypatch, request):
    """A stand-in for an overlay: the directory `out` cannot be renamed while it holds the old."""
    real = Path.rename

    def rename(self, target):
        if self.name == "out":
            raise OSError(request.param, os.strerror(request.param), str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_what_cannot_be_renamed_is_copied_aside(no_renaming, tmp_path):
    fill(tmp_path / "out", OLD)
    (tmp_path / "out" / "link").symlink_to("weights")

    write_new(tmp_path / "out")

    assert content_of(tmp_path / "out") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("when", ["copytree", "rmtree", "rename"])
def test_an_error_meanwhile_gives_the_old_back(no_renaming, when, tmp_path, monkeypatch):
    import shutil

    fill(tmp_path / "out", OLD)
    owner = Path if when == "rename" else shutil
    real = getattr(owner, when)
    at = tmp_path / f".out.restore-{os.getpid()}" if when == "rename" else tmp_path / "out"
    failed = []

    def fail(path, *arguments, **options):
        if Path(path) == at and not failed:
            failed.append(path)
            if when == "rmtree":
                (tmp_path / "out" / "weights").unlink()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(owner, when, fail)

    with pytest.raises(UsageError, match="no space left"):
        write_new(tmp_path / "out")

    assert failed
    assert content_of(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("no_renaming", [errno.EXDEV], indirect=True)
def test_a_kill_at_any_line_leaves_the_old_or_the_new(no_renaming, tmp_path):
    found = set()
    for count in range(10_000):
        root = tmp_path / str(count)
        fill(root / "out", OLD)
        fill(root / "new", NEW)
        killed = replace_and_die(root, count)
        sweep(root / "out")

        content = content_of(root / "out")
        assert content in (OLD, NEW), f"killed at line {count}"
        assert {path.name for path in root.iterdir()} <= {"out", "new"}
        found.add("new" if content == NEW else "old")
        if not killed:
            break
    assert found == {"old", "new"}
    assert count > 50


def replace_and_die(root, count):
    """Replace in a child that ends at the line of this number; False if it came to its end."""
    child = os.fork()
    if not child:
        left = [count]

        def trace(frame, event, argument):
            if frame.f_code.co_filename.endswith(("replacing.py", "shutil.py")):
                left[0] -= event == "line"
                if left[0] < 0:
                    os._exit(9)
                return trace
            return None

        sys.settrace(trace)
        replace_directory(root / "new", root / "out")
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_other_errors_of_renaming_are_no_reason_to_copy(tmp_path, monkeypatch):
    fill(tmp_path / "out", OLD)

    def refuse(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", refuse)

    with pytest.raises(OSError, match="Input/output"):
        write_new(tmp_path / "out")

    assert content_of(tmp_path / "out") == OLD


@pytest.mark.parametrize("at", ["out", "out/deep"])
def test_a_bind_mount_of_the_same_disk_is_refused_before_the_work(at, tmp_path):
    fill(tmp_path / "out", OLD)
    (tmp_path / "data").mkdir()
    fill(tmp_path / "volume", OLD)
    mounted("--bind", tmp_path / "volume", tmp_path / at)
    try:
        with pytest.raises(UsageError, match="mount point"):
            check_replaceable(tmp_path / "out", marker=MARKER, force=True)
    finally:
        subprocess.run(["umount", str(tmp_path / at)], check=True)

    check_replaceable(tmp_path / "out", marker=MARKER, force=True)
    assert content_of(tmp_path / "volume") == OLD
