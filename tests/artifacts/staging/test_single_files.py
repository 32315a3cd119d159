"""Single files are replaced as a whole."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from propulsion_export.artifacts import staging as output
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.errors import UsageError


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


def test_only_a_file_of_the_same_kind_is_written_over(tmp_path):
    (tmp_path / "mine.json").write_text('{"keep": "me"}')
    (tmp_path / "old.xml").write_text('<?xml version="1.0"?><testsuites/>')

    output.check_replaceable_file(tmp_path / "new.xml", holds=b"<testsuite")
    output.check_replaceable_file(tmp_path / "old.xml", holds=b"<testsuite")
    with pytest.raises(UsageError, match=r"mine\.json: exists and does not hold <testsuite"):
        output.check_replaceable_file(tmp_path / "mine.json", holds=b"<testsuite")
