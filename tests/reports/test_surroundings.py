"""The locale, the current directory: what a command finds around it, and says in a line.

Text comes as bytes that the locale cannot read; the directory that a shell stands in is deleted.
"""

import os
import shutil
import subprocess
import sys

import pytest

from propulsion_export.cli import main
from propulsion_export.cli.app import COMMANDS
from propulsion_export.errors import UsageError
from propulsion_export.serving.session import Session

PROGRAM = "from propulsion_export.cli import main; main()"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
BLAMED = "holds bytes that the locale's encoding, ascii, cannot read, expected UTF-8"
REMEDY = "Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
GONE = "the current directory has been deleted, expected one that is there. Change to another"


def run_in_ascii(*words, program=PROGRAM, **options):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("LC_")}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment | ASCII,
        capture_output=True,
        check=False,
        **options,
    )


# The locale


@pytest.mark.parametrize(
    "words",
    [
        ["run", "onnx", "--text", "a café"],
        ["run", "onnx", "--text", "a", "--context", "é"],
        ["run", "onnx", "--chat", "--text", "a", "--system", "é"],
        ["run", "onnx", "--inputs", "café.txt"],
        ["run", "café", "--text", "a"],
        ["adapter", "add", "onnx", "café=there"],
        ["inspect", "café"],
    ],
    ids=" ".join,
)
def test_what_the_locale_cannot_read_blames_the_locale(words):
    done = run_in_ascii(*words)

    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    assert BLAMED in line
    assert line.endswith(REMEDY)
    assert "\\udcc3\\udca9" in line


def test_the_same_text_is_read_where_python_is_told_of_utf_8(banked):
    words = [sys.executable, "-c", PROGRAM, "run", banked, "--text", "a café", "--adapter", "three"]

    done = subprocess.run(
        words, env=os.environ | ASCII | {"PYTHONUTF8": "1"}, capture_output=True, check=True
    )

    assert done.stdout.decode().startswith("a café\tthree\t")


ASK = """
import sys
from propulsion_export import Session
from propulsion_export.errors import PropulsionExportError
try:
    Session(sys.argv[1])(["ba", sys.argv[2]], "three")
except PropulsionExportError as error:
    print(error, error.exit_code)
"""


def test_a_session_blames_the_locale_too(banked, tmp_path):
    asked = run_in_ascii(banked, "a café", program=ASK)
    shutil.copytree(banked, tmp_path / "café")
    opened = run_in_ascii(tmp_path / "café", "ba", program=ASK)
    here = run_in_ascii(".", "ba", program=ASK, cwd=tmp_path / "café")

    assert asked.stdout.decode() == f"text 2: {BLAMED}. {REMEDY[:-1]} 2\n"
    for done in (opened, here):
        assert f"{BLAMED}. {REMEDY} 2\n" in done.stdout.decode()
    assert done.stderr == b""


TALK = """
import sys
from propulsion_export.cli.chat import talk
from propulsion_export import Session
from propulsion_export.serving.chat import Chat
talk(Chat(Session(sys.argv[1]), "one"))
"""


def test_a_turn_that_is_typed_blames_the_locale_and_the_chat_goes_on(exported):
    artifact = exported("llama", "switchable")

    done = run_in_ascii(artifact, program=TALK, input="a café\n/help\n".encode())

    assert done.returncode == 0, done.stderr
    assert f"{BLAMED}. {REMEDY[:-1]}" in done.stderr.decode()
    assert done.stderr.decode().count("/reset forgets") == 2


def test_half_a_character_is_not_the_locales_fault(banked):
    with pytest.raises(UsageError, match="text 1: holds half a character"):
        Session(banked)("ba \udcc3", "three")


# The current directory


@pytest.fixture
def deleted(tmp_path, monkeypatch):
    """A current directory that has been deleted."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    yield
    os.chdir(tmp_path)


WORDS = {
    "train": ["-m", "base", "-d", "data.jsonl", "-o", "out"],
    "merge": ["-a", "adapter", "-o", "out"],
    "onnx": ["-a", "adapter", "-o", "out"],
    "trt": ["onnx", "-o", "out"],
    "parity": ["onnx"],
    "run": ["onnx", "--text", "a"],
    "package": ["onnx", "-o", "out"],
    "inspect": ["onnx"],
    "adapter": ["list", "onnx"],
    "export": ["-a", "adapter", "-o", "out"],
    "doctor": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_the_directory_was_deleted(command, deleted, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, *WORDS[command]])

    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"propulsion-export: {GONE}")


def test_help_is_shown_there(deleted, capsys):
    with pytest.raises(SystemExit) as done:
        main(["run", "--help"])

    assert done.value.code == 0
    assert "Predict with an artifact" in capsys.readouterr().out


def test_the_program_starts_there_and_says_so(tmp_path):
    (tmp_path / "gone").mkdir()
    program = f"import os; os.rmdir({str(tmp_path / 'gone')!r}); {PROGRAM}"

    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "onnx", "--json"],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith(f"propulsion-export: {GONE}")
    assert len(done.stderr.splitlines()) == 1
    assert GONE in done.stdout


def test_a_session_says_so_and_takes_an_absolute_path(deleted, banked):
    with pytest.raises(UsageError, match=GONE):
        Session("onnx")

    assert Session(banked)("ba be", "three")[0].adapter == "three"
