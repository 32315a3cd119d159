import errno
import functools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from propulsion_export.artifacts import staging as output
from propulsion_export.artifacts.staging import (
    MARKERS,
    check_replaceable,
    replace_file,
    staged_directory,
)
from propulsion_export.errors import ToolError, UsageError

ADAPTER = "adapter_config.json"


def content_of(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def ours(directory, content=b"old"):
    """A directory as this tool leaves it."""
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(b"{}")
    (directory / "weights").write_bytes(content)
    return directory


def dead_process():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Whole or nothing


def test_the_output_appears_only_when_it_is_whole(tmp_path):
    out = tmp_path / "new" / "out"

    with staged_directory(out, marker=ADAPTER) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        assert not out.exists()
        assert staged.parent == out.parent
        assert staged.name.startswith(".")

    assert content_of(out) == {"deep/a": b"1"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing_and_the_old_content(tmp_path, error, force):
    out = tmp_path / "out"
    if force:
        ours(out)
    before = content_of(tmp_path)

    def work():
        with staged_directory(out, force=force, marker=ADAPTER) as staged:
            (staged / "half").write_bytes(b"1")
            raise error

    with pytest.raises(error):
        work()

    assert content_of(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if force else [])


def test_an_interrupt_between_the_two_renames_gives_the_old_back(tmp_path, monkeypatch):
    out = ours(tmp_path / "out")
    real = Path.rename
    calls = []

    def rename(self, target):
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(KeyboardInterrupt),
        staged_directory(out, force=True, marker=ADAPTER) as staged,
    ):
        (staged / "new").write_bytes(b"1")

    assert calls[0] == "out"
    assert content_of(out) == {"adapter_config.json": b"{}", "weights": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_directory_is_filled_without_force(tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    with staged_directory(out, marker=ADAPTER) as staged:
        (staged / "a").write_bytes(b"1")

    assert content_of(tmp_path) == {"out/a": b"1"}


def test_a_link_to_a_directory_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")

    with staged_directory(tmp_path / "out", marker=ADAPTER) as staged:
        (staged / "a").write_bytes(b"1")

    assert content_of(tmp_path / "elsewhere") == {"a": b"1"}
    assert (tmp_path / "out").is_symlink()


def test_files_and_directories_have_ordinary_modes(tmp_path):
    old = os.umask(0o022)
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER) as staged:
            replace_file(staged / "a", b"1")
            (staged / "b").write_bytes(b"1")
    finally:
        os.umask(old)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "out/a", "out/b")]
    assert [oct(mode) for mode in modes] == ["0o755", "0o644", "0o644"]


def test_a_strict_umask_is_respected(tmp_path):
    old = os.umask(0o077)
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER) as staged:
            replace_file(staged / "a", b"1")
    finally:
        os.umask(old)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "out/a")]
    assert [oct(mode) for mode in modes] == ["0o700", "0o600"]


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    """Else a power cut could leave the name without the content."""
    out, flushed = tmp_path / "out", []

    def fsync(descriptor):
        assert not out.exists()
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(output.os, "fsync", fsync)
    with staged_directory(out, marker=ADAPTER) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        (staged / "link").symlink_to("gone")

    paths = [out, out / "deep", out / "deep" / "a"]
    assert sorted(flushed) == sorted(path.stat().st_ino for path in paths)


# What is refused, and what is replaced


@pytest.mark.parametrize("marker", MARKERS)
def test_force_replaces_what_this_tool_wrote(tmp_path, marker):
    out = tmp_path / "out"
    out.mkdir()
    (out / marker).write_text("{}")
    (out / "old").write_text("1")

    with staged_directory(out, force=True, marker=marker) as staged:
        (staged / "new").write_bytes(b"2")

    assert content_of(out) == {"new": b"2"}
    assert list(tmp_path.iterdir()) == [out]


def refused(destination, match, *, force):
    """The refusal comes from the check and from the context, before anything is written."""
    top = destination.parent
    before = content_of(top), sorted(top.iterdir())
    early = functools.partial(check_replaceable, destination, marker=ADAPTER, force=force)
    for attempt in (early, staged_directory(destination, force=force, marker=ADAPTER).__enter__):
        with pytest.raises(UsageError, match=match) as caught:
            attempt()
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    assert (content_of(top), sorted(top.iterdir())) == before


def test_an_existing_output_is_refused_without_force(tmp_path):
    refused(ours(tmp_path / "out"), "exists and is not empty.*--force", force=False)


def test_a_strangers_directory_is_refused_even_with_force(tmp_path):
    out = tmp_path / "photos"
    (out / "deep").mkdir(parents=True)
    (out / "holiday.png").write_bytes(b"1")
    # A marker deeper inside, or one that is a directory, does not make it ours.
    (out / "deep" / "propulsion.json").write_bytes(b"1")
    (out / "adapter_config.json").mkdir()

    refused(out, "expected nothing but an output of this command", force=True)


def test_one_output_is_not_replaced_by_several_nor_several_by_one(tmp_path):
    one, many = ours(tmp_path / "one"), tmp_path / "many"
    many.mkdir()
    ours(many / "a")
    ours(many / "b")
    before = content_of(tmp_path)

    with pytest.raises(UsageError, match="one: is a single output, expected a directory of sev"):
        check_replaceable(one, marker=ADAPTER, force=True, several=True)
    with pytest.raises(UsageError, match=r"several outputs \(a, b\), expected a single one"):
        check_replaceable(many, marker=ADAPTER, force=True)

    check_replaceable(one, marker=ADAPTER, force=True)
    check_replaceable(many, marker=ADAPTER, force=True, several=True)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("wanted", MARKERS)
@pytest.mark.parametrize("found", MARKERS)
def test_force_replaces_its_own_kind_only(tmp_path, wanted, found):
    out = tmp_path / "out"
    out.mkdir()
    (out / found).write_text("{}")

    if wanted == found:
        check_replaceable(out, marker=wanted, force=True)
        (out / min(set(MARKERS) - {found})).write_text("{}")  # of two kinds: nothing of ours
    with pytest.raises(UsageError, match="--force does not replace it") as caught:
        check_replaceable(out, marker=wanted, force=True)

    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "replaced"),
    [
        ('{"kind": "merged"}', True),
        ("damaged", True),
        ('{"kind": "onnx"}', False),
        ('{"kind": "triton"}', False),
    ],
)
def test_force_replaces_artifacts_of_the_kind_that_is_written(tmp_path, content, replaced):
    out = tmp_path / "out"
    out.mkdir()
    (out / "propulsion.json").write_text(content)
    check = functools.partial(
        check_replaceable, out, marker="propulsion.json", kind="merged", force=True
    )

    if replaced:
        check()
    else:
        with pytest.raises(UsageError, match=r"is of kind .*, not merged.*--force"):
            check()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("destination", "given", "words"),
    [
        ("a", "a", "is an input of this command"),
        ("a", "link", "is an input of this command"),
        ("link", "a", "is an input of this command"),
        ("a", "a/deep/data.csv", "holds .*data.csv, an input"),
        ("a", "link/deep", "holds .*deep, an input"),
        ("a/../a", "b/../a", "is an input of this command"),
    ],
)
def test_an_output_over_an_input_is_refused(tmp_path, destination, given, words, force):
    ours(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "data.csv").write_text("1")
    (tmp_path / "link").symlink_to("a")
    before = content_of(tmp_path)
    output, inputs = tmp_path / destination, [tmp_path / "b", str(tmp_path / given)]
    staged = staged_directory(output, marker=ADAPTER, force=force, inputs=inputs)

    with pytest.raises(UsageError, match=words):
        check_replaceable(output, marker=ADAPTER, force=force, inputs=inputs)
    with pytest.raises(UsageError, match=words):
        staged.__enter__()

    assert content_of(tmp_path) == before


def test_an_output_beside_its_inputs_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours(tmp_path / "a")
    ours(tmp_path / "ab")

    # The last two are no paths here: a model's name, and what no path can be.
    for given in ("a", "ab/weights.json", "", "some/model", "x" * 300, "a\0b"):
        check_replaceable(tmp_path / "ab", marker=ADAPTER, force=True, inputs=[given])


@pytest.mark.parametrize("place", ["/proc/x", "/proc/deep/x"])
def test_where_nothing_can_be_made_is_told_in_words(place):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")

    with (
        pytest.raises(UsageError, match=r"nothing (can be created|was written)|no permission"),
        staged_directory(Path(place), marker=ADAPTER),
    ):
        pass
    with pytest.raises(UsageError, match=r"nothing can be created here|no permission"):
        replace_file(Path(place), b"1")


@pytest.mark.parametrize("below", [".", "deep"])
def test_the_current_directory_is_never_replaced(tmp_path, monkeypatch, below):
    out = ours(tmp_path / "out")
    (out / "deep").mkdir()
    monkeypatch.chdir(out / below)

    refused(out, "the current directory lies inside", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_refused(tmp_path, force):
    (tmp_path / "out").write_bytes(b"1")

    refused(tmp_path / "out", "is a file", force=force)


@pytest.mark.parametrize("below", ["file/out", "file/deep/out"])
def test_a_path_through_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_bytes(b"1")

    with pytest.raises(UsageError, match="file: is a file, expected a directory"):
        check_replaceable(tmp_path / below, force=False, marker=ADAPTER)
    with pytest.raises(UsageError, match="a part of the path is a file"):
        replace_file(tmp_path / below, b"1")

    assert content_of(tmp_path) == {"file": b"1"}


@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_is_too_long_is_refused(tmp_path, force):
    with (
        pytest.raises(UsageError, match="the name is too long"),
        staged_directory(tmp_path / ("x" * 300), force=force, marker=ADAPTER),
    ):
        pass

    assert list(tmp_path.iterdir()) == []


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"

    def work():
        with staged_directory(out, marker=ADAPTER) as staged:
            (staged / "mine").write_bytes(b"1")
            ours(out, b"theirs")

    with pytest.raises(UsageError, match="not empty"):
        work()

    assert content_of(out) == {"adapter_config.json": b"{}", "weights": b"theirs"}
    assert list(tmp_path.iterdir()) == [out]


# Killed processes

WRITER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from propulsion_export.artifacts.staging import staged_directory

    with staged_directory(Path(sys.argv[1]), force=True, marker="adapter_config.json") as staged:
        (staged / "adapter_config.json").write_text("{}")
        with (staged / "weights").open("wb") as file:
            file.write(b"half")
            file.flush()
            print("writing", flush=True)
            time.sleep(60)
    """
)


@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path, replacing):
    out = tmp_path / "out"
    if replacing:
        ours(out)
    process = subprocess.Popen([sys.executable, "-c", WRITER, out], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    (left,) = [path for path in tmp_path.iterdir() if path != out]
    assert left.name == f".out.partial-{process.pid}"
    assert out.exists() == replacing
    if replacing:
        assert content_of(out)["weights"] == b"old"

    with staged_directory(out, force=True, marker=ADAPTER) as staged:
        (staged / "weights").write_bytes(b"whole")
    assert content_of(tmp_path) == {"out/weights": b"whole"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
def test_the_next_call_gives_back_what_a_killed_one_moved_aside(tmp_path, force):
    out, killed = tmp_path / "out", dead_process()
    ours(tmp_path / f".out.replaced-{killed}")
    (tmp_path / f".out.partial-{killed}").mkdir()
    (tmp_path / f".out.partial-{killed}" / "weights").write_bytes(b"maybe half")

    error = RuntimeError if force else UsageError
    with pytest.raises(error), staged_directory(out, force=force, marker=ADAPTER):
        raise RuntimeError

    assert content_of(tmp_path) == {"out/adapter_config.json": b"{}", "out/weights": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_the_early_check_gives_it_back_before_hours_of_work(tmp_path):
    ours(tmp_path / f".out.replaced-{dead_process()}")

    with pytest.raises(UsageError, match="not empty"):
        check_replaceable(tmp_path / "out", force=False, marker=ADAPTER)

    assert (tmp_path / "out" / "weights").read_bytes() == b"old"


def test_an_old_output_left_after_the_new_one_came_is_removed(tmp_path):
    out = ours(tmp_path / "out", b"new")
    ours(tmp_path / f".out.replaced-{dead_process()}", b"old")

    with pytest.raises(UsageError):
        check_replaceable(out, force=False, marker=ADAPTER)

    assert list(tmp_path.iterdir()) == [out]
    assert (out / "weights").read_bytes() == b"new"


def test_what_a_living_process_is_writing_is_not_swept(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    busy = tmp_path / f".out.partial-{other.pid}"
    busy.mkdir()
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER):
            pass
        assert busy.is_dir()
    finally:
        other.communicate(b"\n")


@pytest.mark.parametrize(
    "name",
    [
        ".outer.partial-PID",
        ".out.partial-PIDx",
        "out.partial-PID",
        ".out.backup-PID",
        ".out.partial-0",
        ".out.partial-99999999999999999999",
        ".outxpartial-PID",
    ],
)
def test_other_names_are_not_swept(tmp_path, name):
    kept = tmp_path / name.replace("PID", str(dead_process()))
    kept.mkdir()

    with staged_directory(tmp_path / "out", marker=ADAPTER):
        pass

    assert kept.is_dir()


# Single files


def test_replace_file_makes_directories_and_replaces(tmp_path):
    file = tmp_path / "reports" / "junit.xml"

    replace_file(file, b"one")
    replace_file(file, b"two")

    assert file.read_bytes() == b"two"
    assert list(file.parent.iterdir()) == [file]


def test_replace_file_refuses_a_directory(tmp_path):
    (tmp_path / "out").mkdir()

    with pytest.raises(UsageError, match="is a directory"):
        replace_file(tmp_path / "out", b"1")

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REPLACER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from propulsion_export.artifacts.staging import replace_file

    file, size = Path(sys.argv[1]), 400_000
    print("writing", flush=True)
    while True:
        for letter in b"ab":
            replace_file(file, bytes([letter]) * size)
    """
)


def test_a_process_killed_at_any_moment_leaves_old_or_new_content(tmp_path):
    file = tmp_path / "propulsion.json"
    file.write_bytes(b"a" * 400_000)
    whole = {b"a" * 400_000, b"b" * 400_000}
    seen = set()

    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", REPLACER, file], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"writing\n"
        until = time.monotonic() + 0.03 + 0.017 * attempt
        while time.monotonic() < until:
            seen.add(file.read_bytes())
        process.kill()
        process.wait()
        process.stdout.close()
        seen.add(file.read_bytes())

    assert seen == whole
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path != file)
    replace_file(file, b"new")
    assert list(tmp_path.iterdir()) == [file]


def test_another_threads_file_is_not_swept(tmp_path):
    busy = tmp_path / f".a.partial-{os.getpid()}-0123abcd"
    busy.write_bytes(b"1")

    replace_file(tmp_path / "a", b"2")

    assert busy.exists()


# A full disk


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


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_that_a_writer_made_private_are_opened_to_readers(umask, rights, tmp_path):
    before = os.umask(umask)
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER) as directory:
            safetensors.numpy.save_file({"scale": np.ones(2)}, directory / "one.safetensors")
            assert (directory / "one.safetensors").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)

    assert (tmp_path / "out" / "one.safetensors").stat().st_mode & 0o777 == rights


def test_an_output_inside_an_input_loses_nothing_and_is_allowed(tmp_path):
    ours(tmp_path / "a")
    before = content_of(tmp_path)

    with staged_directory(tmp_path / "a" / "new", marker=ADAPTER, inputs=[tmp_path / "a"]) as new:
        (new / "one").write_text("1")

    assert content_of(tmp_path) == before | {"a/new/one": b"1"}


def test_only_a_file_of_the_same_kind_is_written_over(tmp_path):
    (tmp_path / "mine.json").write_text('{"keep": "me"}')
    (tmp_path / "old.xml").write_text('<?xml version="1.0"?><testsuites/>')

    output.check_replaceable_file(tmp_path / "new.xml", holds=b"<testsuite")
    output.check_replaceable_file(tmp_path / "old.xml", holds=b"<testsuite")
    with pytest.raises(UsageError, match=r"mine\.json: exists and does not hold <testsuite"):
        output.check_replaceable_file(tmp_path / "mine.json", holds=b"<testsuite")
