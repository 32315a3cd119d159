"""A killed process leaves nothing that looks finished, and the next call puts it right."""

import signal
import subprocess
import sys
import textwrap

import pytest
from outputs import ADAPTER, content_of, ours

from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.errors import UsageError


def dead_process():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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
