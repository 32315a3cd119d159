"""Disks that are full, read-only or not ours: one line, and the old content stays."""

import errno
import subprocess

import numpy as np
import pytest
import safetensors.numpy
from outputs import ADAPTER, content_of, ours, refused

from propulsion_export.artifacts import staging as output
from propulsion_export.artifacts.staging import check_replaceable, replace_file, staged_directory
from propulsion_export.errors import ToolError, UsageError


@pytest.fixture
def small_disk(tmp_path):
    """One megabyte of real disk that can be full."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_read_only_disk_is_told_before_the_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(UsageError, match="no permission to write here"):
        check_replaceable(small_disk / "deep" / "out", force=False, marker=ADAPTER)
    with pytest.raises(UsageError, match="the file system is read-only"):
        replace_file(small_disk / "a", b"1")


def plain(directory):
    (directory / "weights").write_bytes(bytes(2_000_000))


def rust(directory):
    safetensors.numpy.save_file({"a": np.ones(500_000, np.float32)}, directory / "weights")


def numpy_file(directory):
    with (directory / "weights").open("wb") as file:
        np.ones(500_000, np.float32).tofile(file)


def onnx_graph(directory):
    import onnx_ir as ir

    value = ir.Value(name="a", const_value=ir.tensor(np.ones(500_000, np.float32), name="a"))
    graph = ir.Graph([], [value], nodes=[], initializers=[value], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    ir.save(model, directory / "model.onnx", external_data="data", size_threshold_bytes=0)


@pytest.mark.parametrize("write", [plain, rust, numpy_file, onnx_graph])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_full_disk_is_one_line_and_leaves_the_old_content(small_disk, write, replacing):
    out = small_disk / "out"
    if replacing:
        ours(out)
    before = content_of(small_disk)

    with (
        pytest.raises(UsageError) as caught,
        staged_directory(out, force=True, marker=ADAPTER) as staged,
    ):
        write(staged)

    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{out}: no space left on the device; nothing was written. "
        "Choose another place for the output."
    )
    assert content_of(small_disk) == before
    assert list(small_disk.iterdir()) == ([out] if replacing else [])


def test_a_full_disk_keeps_the_old_file(small_disk):
    file = small_disk / "propulsion.json"
    replace_file(file, b"old")

    with pytest.raises(UsageError, match="no space left"):
        replace_file(file, bytes(2_000_000))

    assert content_of(small_disk) == {"propulsion.json": b"old"}


@pytest.mark.parametrize("force", [False, True])
def test_a_mount_point_is_refused_before_the_work(small_disk, force):
    (small_disk / "adapter_config.json").write_text("{}")

    refused(small_disk, "is a mount point", force=force)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, "quota"), "quota is used up"),
        (OSError(errno.EROFS, "read-only"), "file system is read-only"),
        (RuntimeError("write failed: No space left on device"), "no space left"),
        (ToolError("model.onnx: I/O error (os error 28)"), "no space left"),
    ],
)
def test_disk_errors_are_told_in_words_whoever_says_them(tmp_path, error, words):
    with pytest.raises(UsageError, match=words), staged_directory(tmp_path / "out", marker=ADAPTER):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError("os error 280"),
        FileNotFoundError(errno.ENOENT, "No such file"),
    ],
)
def test_other_errors_of_the_work_keep_their_traceback(tmp_path, error):
    with pytest.raises(type(error)) as caught, staged_directory(tmp_path / "out", marker=ADAPTER):
        raise error

    assert caught.value is error


def test_no_permission_to_write_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(output.os, "access", lambda path, mode: path != tmp_path)

    with pytest.raises(UsageError, match=f"{tmp_path}: no permission to write here"):
        check_replaceable(tmp_path / "out", force=False, marker=ADAPTER)
    check_replaceable(tmp_path.parent / "out", force=False, marker=ADAPTER)
