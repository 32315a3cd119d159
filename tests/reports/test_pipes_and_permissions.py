"""A closed pipe, a narrow terminal or a forbidden file reads as a bug, or as a damaged model.

Whoever pipes into `head`, runs under a daemon without streams, or lacks the rights to a file gets
a quiet end or one line with the cause; exit code 1 stays that of a failed comparison.
"""

import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from propulsion_export.cli import main
from propulsion_export.cli.app import COMMANDS
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import ArtifactError, BaseModelError

PROGRAM = "from propulsion_export.cli import main; main()"


@pytest.fixture(scope="module", name="adapter")
def make_adapter(random_adapter, tiny_bert, write_adapter, positive_adapter, tmp_path_factory):
    """An adapter whose labels are in three scripts."""
    made = positive_adapter(
        tiny_bert(), 1, "three", head=True, labels=("né", "中文", "да"), task="text-classification"
    )
    return write_adapter(made, tmp_path_factory.mktemp("adapter") / "adapter")


def start(*words, **streams):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, words)], **streams)


def ended(process):
    """The exit code and what was printed, as bytes."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def without_reader(*words, **streams):
    """Start with a pipe whose other end is closed; a first pipe of `streams` names it otherwise."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return ended(start(*words, **({"stdout": writing} | streams)))
    finally:
        os.close(writing)


# Pipes


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "text"])
def test_a_pipe_without_a_reader_ends_it_quietly(options, adapter):
    code, _, err = without_reader("inspect", adapter, *options)

    assert (code, err) == (141, b"")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "--help"], ["doctor"]])
def test_so_does_what_the_program_itself_prints(words):
    code, _, err = without_reader(*words)

    assert (code, err) == (141, b"")


def test_a_failure_keeps_its_code_where_nobody_reads_it():
    reading, writing = os.pipe()
    os.close(reading)

    code, _, _ = ended(start("inspect", "/not/there", stdout=writing, stderr=writing))

    os.close(writing)
    assert code == 4


def test_a_reader_of_the_first_bytes_gets_them(adapter):
    process = start("inspect", adapter)

    assert process.stdout.read(1) == str(adapter).encode()[:1]
    process.stdout.close()
    assert process.wait(60) in (0, 141)
    assert process.stderr.read() == b""
    process.stderr.close()


def test_another_broken_pipe_is_a_bug_and_no_quiet_end(monkeypatch, capsys):
    from propulsion_export.cli.inspect import command

    def fail(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(command, "callback", fail)
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert exit_code(["inspect", "."]) == 70
    os.close(reading)

    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "text"])
def test_a_full_disk_behind_the_output_is_one_line(options, adapter):
    with Path("/dev/full").open("wb") as full:
        code, _, err = ended(start("inspect", adapter, *options, stdout=full))

    (line,) = err.decode().splitlines()
    assert code == 2
    assert "standard output: No space left on device, so the result was not printed" in line


def closed(*descriptors):
    def close():
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def test_a_closed_output_is_told_before_the_work(adapter):
    code, _, err = ended(start("inspect", adapter, preexec_fn=closed(1)))

    (line,) = err.decode().splitlines()
    assert code == 2
    assert "standard output: is closed" in line
    assert ended(start("inspect", adapter, "-q", preexec_fn=closed(1)))[0] == 0


def test_a_closed_error_output_changes_no_code(adapter):
    code, out, _ = ended(start("inspect", adapter, "--json", preexec_fn=closed(2)))

    assert code == 0
    assert json.loads(out)["labels"] == ["né", "中文", "да"]
    assert ended(start("inspect", "/not/there", preexec_fn=closed(2)))[0] == 4
    assert ended(start("inspect", adapter, preexec_fn=closed(0, 1, 2)))[0] == 2


def test_no_file_takes_the_place_of_a_closed_output(tmp_path):
    """What a library prints would otherwise go into the next file that is opened."""
    code = (
        "import os, sys; from propulsion_export.cli.streams import prepare_streams; "
        "prepare_streams(['-q']); file = open(sys.argv[1], 'wb'); os.write(1, b'noise'); "
        "sys.exit(file.fileno() < 3)"
    )
    file = tmp_path / "model"

    done = subprocess.run([sys.executable, "-c", code, file], preexec_fn=closed(0, 1), check=False)

    assert done.returncode == 0
    assert file.read_bytes() == b""


# Terminals


PRINTING = (
    "import sys; from propulsion_export.cli.streams import prepare_streams, print_result; "
    "prepare_streams([]); print_result(sys.argv[1])"
)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("latin-1", "né ?? ??"),
        ("cp1252", "né ?? ??"),
        ("koi8-r", "n? ?? да"),
        ("gbk", "né 中文 да"),
        ("utf-8", "né 中文 да"),
    ],
)
def test_what_a_terminal_cannot_show_is_a_question_mark(encoding, shown):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    words = [sys.executable, "-c", PRINTING, "né 中文 да"]

    done = subprocess.run(words, env=environment, capture_output=True, check=True)

    assert done.stdout.decode(encoding) == shown + "\n"
    assert done.stderr == b""


def test_json_loses_no_character_there(adapter):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}

    code, out, _ = ended(start("inspect", adapter, "--json", env=environment))

    assert code == 0
    assert json.loads(out.decode("latin-1"))["labels"] == ["né", "中文", "да"]


def test_a_chosen_way_to_show_characters_is_kept(monkeypatch):
    from propulsion_export.cli.streams import prepare_streams

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="xmlcharrefreplace")
    monkeypatch.setattr(sys, "stdout", out)
    prepare_streams([])

    assert out.errors == "xmlcharrefreplace"


# Permissions


class Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


class Rights(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@pytest.fixture
def no_root():
    """Without root's right to read everything, as an ordinary user is."""
    system = ctypes.CDLL(None)
    header, rights = Header(0x20080522, 0), (Rights * 2)()
    assert system.capget(ctypes.byref(header), rights) == 0
    before = rights[0].effective
    rights[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert system.capset(ctypes.byref(header), rights) == 0
    yield
    rights[0].effective = before
    assert system.capset(ctypes.byref(header), rights) == 0


def exit_code(words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture(name="there")
def make_there(adapter, tiny_checkpoint, tmp_path):
    """Copies of an adapter and a base model, data, texts, and the manifest of an artifact."""
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(tiny_checkpoint("bert", "feature-extraction"), tmp_path / "base")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "propulsion.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text(
        '{"text": "ba", "label": "x"}\n{"text": "ce", "label": "y"}\n' * 9
    )
    return tmp_path


WORK = {
    "inspect": [("adapter/adapter_model.safetensors", ["inspect", "adapter"])],
    "merge": [
        ("base/model.safetensors", ["merge", "-m", "base", "-a", "adapter", "-o", "out"]),
        ("adapter/adapter_config.json", ["merge", "-m", "base", "-a", "adapter", "-o", "out"]),
        ("adapter", ["merge", "-m", "base", "-a", "adapter", "-o", "out"]),
    ],
    "onnx": [("base/model.safetensors", ["onnx", "-m", "base", "-a", "adapter", "-o", "out"])],
    "export": [("base/config.json", ["export", "-m", "base", "-a", "adapter", "-o", "out"])],
    "train": [
        ("data.jsonl", ["train", "-m", "base", "-d", "data.jsonl", "-o", "out"]),
        ("base/model.safetensors", ["train", "-m", "base", "-d", "data.jsonl", "-o", "out"]),
    ],
    "trt": [("artifact/propulsion.json", ["trt", "artifact", "-o", "out"])],
    "parity": [("artifact", ["parity", "artifact"])],
    "run": [
        ("artifact", ["run", "artifact", "--text", "ba"]),
        ("artifact/propulsion.json", ["run", "artifact", "--text", "ba"]),
    ],
    "package": [("artifact", ["package", "artifact", "--layout", "triton", "-o", "out"])],
    "adapter": [("artifact", ["adapter", "list", "artifact"])],
}


def test_every_command_that_reads_is_here():
    assert WORK.keys() == COMMANDS.keys() - {"doctor"}


@pytest.mark.parametrize(
    ("file", "words"), [case for cases in WORK.values() for case in cases], ids=str
)
def test_an_unreadable_input_is_named_with_its_cause(
    file, words, there, no_root, monkeypatch, capsys
):
    monkeypatch.chdir(there)
    (there / file).chmod(0)
    code = exit_code(words)
    (there / file).chmod(0o700)

    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert code in (2, 4)
    assert file in line
    assert "no permission" in line or "Permission denied" in line
    assert "Traceback" not in captured.err
    assert "truncated" not in line
    assert not (there / "out").exists()


def test_a_damaged_file_that_can_be_read_is_still_called_damaged(there, no_root, capsys):
    (there / "adapter" / "adapter_model.safetensors").write_bytes(b"short")

    assert exit_code(["inspect", there / "adapter"]) == 4
    assert "is truncated or damaged" in capsys.readouterr().err


def test_permissions_are_checked_for_files_directories_and_what_is_inside(tmp_path, no_root):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")
    os.mkfifo(tmp_path / "deep" / "pipe")
    check_permission(tmp_path / "deep", ArtifactError)
    check_permission(tmp_path / "nothing", ArtifactError)
    check_permission("owner/name", ArtifactError)

    (tmp_path / "deep" / "file").chmod(0)
    with pytest.raises(BaseModelError, match="deep/file: no permission to read it"):
        check_permission(tmp_path / "deep", BaseModelError)
    (tmp_path / "deep").chmod(0o600)
    for path in ("deep", "deep/file"):
        with pytest.raises(ArtifactError, match=f"{path}.*: no permission to read it"):
            check_permission(tmp_path / path, ArtifactError)
    (tmp_path / "deep").chmod(0o700)


def test_without_a_temporary_directory_the_machine_cannot(monkeypatch, capsys):
    from propulsion_export.cli.inspect import command

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    monkeypatch.setattr(command, "callback", lambda *_, **__: tempfile.gettempdir())

    assert exit_code(["inspect", "."]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "No usable temporary directory" in line
    assert "TMPDIR" in line
