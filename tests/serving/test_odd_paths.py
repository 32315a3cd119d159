"""What is no path, or none that a runtime opens, and bytes that are no text: told in a line."""

import os
import shutil
from pathlib import Path

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import remove_adapter
from propulsion_export.cli import main
from propulsion_export.errors import UsageError
from propulsion_export.runners.opening import open_runner
from propulsion_export.serving.session import Session

READERS = [Session, Artifact.read, open_runner, lambda path: remove_adapter(path, "x")]
readers = pytest.mark.parametrize("read", READERS, ids=["session", "artifact", "runner", "remove"])


@readers
@pytest.mark.parametrize("path", [None, 0, b"here", ["here"]], ids=repr)
def test_what_is_no_path_is_refused(read, path):
    with pytest.raises(UsageError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path!r}: is no path, expected a str or")


@readers
@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(("path", "shown"), [("x\0y", r"x\\x00y"), ("x\ud800", r"x\\ud800")])
def test_what_no_path_can_hold_is_refused(read, kind, path, shown):
    with pytest.raises(
        UsageError, match=f"^'.*{shown}': holds a zero byte or half a character, expected a path$"
    ):
        read(kind(path))


@pytest.fixture
def latin(switchable, tmp_path):
    """An artifact in a directory whose name is Latin-1."""
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        return shutil.copytree(switchable, directory)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")


LATIN = (
    r"^'.*/caf\\udce9': the path is not UTF-8, which runtimes need to open it\. "
    r"Rename the directory\.$"
)


@readers
@pytest.mark.parametrize("way", ["straight", "a link", "the current directory"])
def test_a_directory_whose_name_is_no_utf_8_is_refused(read, way, latin, tmp_path, monkeypatch):
    path = latin
    if way == "a link":
        path = tmp_path / "current"
        path.symlink_to(latin)
    elif way == "the current directory":
        monkeypatch.chdir(latin)
        path = "."

    with pytest.raises(UsageError, match=LATIN):
        read(path)


@pytest.mark.parametrize("words", [["inspect"], ["run", "--text", "ba"], ["adapter", "list"]])
def test_a_command_refuses_it_in_one_line(words, latin, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, str(latin)])

    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not UTF-8" in line


def test_a_text_of_bytes_that_are_no_utf_8_is_told_as_that(switchable, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", str(switchable), "--adapter", "three", "--text", "x\udcff"])

    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "text 1" in line
    assert "or a byte that is no UTF-8, 0xff" in line


def test_half_a_character_that_is_no_byte_is_not(switchable):
    with pytest.raises(UsageError, match=r"\(the lone surrogate \\ud800 at 1\), expected whole"):
        Session(switchable)("x\ud800", "three")
