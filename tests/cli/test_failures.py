"""A known failure is one line and an exit code; a bug keeps its traceback."""

import errno
import json
import os
import subprocess
import sys

import click
import pytest
from dense_adapters import write_adapter

from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.cli import main
from propulsion_export.environment import machine
from propulsion_export.errors import AdapterError, UnavailableError, UsageError

OTHER_BASE = Fingerprint("float32", {"weight": (0.25,) * 8})


def failures(tmp_path):
    """Calls that must fail: by name, what is called and the exit code it ends with."""
    gone, out = tmp_path / "gone", tmp_path / "out"
    adapter, artifact = tmp_path / "topic", tmp_path / "onnx"
    stranger = write_adapter(tmp_path / "stranger", OTHER_BASE)
    elsewhere = write_adapter(tmp_path / "elsewhere", path="other")
    full = tmp_path / "photos"
    full.mkdir()
    (full / "holiday.png").write_bytes(b"1")
    return {
        "merge, no adapter": (["merge", "-a", gone, "-o", out], 4),
        "merge, no base named": (["merge", "-a", adapter, "-o", out], 2),
        "merge, no base there": (["merge", "-m", gone, "-a", adapter, "-o", out], 4),
        "merge, output is full": (["merge", "-a", adapter, "-o", full, "--force"], 2),
        "onnx, no adapter": (["onnx", "-a", gone, "-o", out], 4),
        "onnx, no adapter and no base": (["onnx", "-o", out], 2),
        "onnx, two of one name": (["onnx", "-a", adapter, "-a", adapter, "-o", out], 2),
        "onnx, reserved name": (["onnx", "-a", f"base={adapter}", "-o", out], 2),
        "trt, no artifact": (["trt", gone, "-o", out], 4),
        "trt, shapes of nothing": (["trt", artifact, "-o", out, "--min-shapes", "x"], 2),
        "trt, an adapter": (["trt", adapter, "-o", out], 4),
        "parity, no artifact": (["parity", gone], 4),
        "run, no artifact": (["run", gone, "--text", "a"], 4),
        "inspect, nothing there": (["inspect", gone], 4),
        "inspect, no directory of ours": (["inspect", full], 4),
        "list, no artifact": (["adapter", "list", gone], 4),
        "add, another base": (["adapter", "add", artifact, stranger], 4),
        "add, no slot": (["adapter", "add", artifact, elsewhere], 4),
        "add, no adapter": (["adapter", "add", artifact, gone], 4),
        "add, there already": (["adapter", "add", artifact, adapter], 2),
        "remove, not there": (["adapter", "remove", artifact, "tpoic"], 2),
    }


NAMES = [
    "merge, no adapter",
    "merge, no base named",
    "merge, no base there",
    "merge, output is full",
    "onnx, no adapter",
    "onnx, no adapter and no base",
    "onnx, two of one name",
    "onnx, reserved name",
    "trt, no artifact",
    "trt, shapes of nothing",
    "trt, an adapter",
    "parity, no artifact",
    "run, no artifact",
    "inspect, nothing there",
    "inspect, no directory of ours",
    "list, no artifact",
    "add, another base",
    "add, no slot",
    "add, no adapter",
    "add, there already",
    "remove, not there",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_known_failure_is_one_line_and_nothing_is_written(
    run, tmp_path, adapter, artifact, monkeypatch, name
):
    words, expected = failures(tmp_path)[name]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    code, out, err = run(*words)

    lines = [line for line in err.splitlines() if not line.startswith("[")]  # not the progress
    assert (code, out, len(lines)) == (expected, "", 1), err
    assert lines[0].startswith("propulsion-export: ")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    code, out, err = run(*words, "--json", "-q")

    assert code == expected
    assert json.loads(out) == {
        "error": lines[0].removeprefix("propulsion-export: "),
        "exit_code": expected,
    }
    assert err == f"{lines[0]}\n"


def test_the_list_of_failures_is_complete(tmp_path):
    assert list(failures(tmp_path)) == NAMES


def broken_doctor(monkeypatch, error):
    def capabilities():
        raise error

    monkeypatch.setattr(machine, "capabilities", capabilities)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UsageError("a: b", remedy="Do."), 2, "a: b. Do."),
        (UnavailableError("a: b"), 3, "a: b"),
        (AdapterError("a:\n b", "c: d"), 4, "a: b; c: d"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.exceptions.Abort(), 130, "interrupted"),
        (
            ModuleNotFoundError("No module", name="onnxruntime"),
            3,
            "onnxruntime is not installed. Run: pip install 'propulsion-export[cpu]'.",
        ),
        (
            ModuleNotFoundError("No module", name="tensorrt_rtx"),
            3,
            "tensorrt_rtx is not installed. Run: pip install 'propulsion-export[rtx]'.",
        ),
        (
            ModuleNotFoundError("No module", name="tensorrt"),
            3,
            "tensorrt is not installed. Run: pip install 'propulsion-export[tensorrt]'.",
        ),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_each_failure_has_its_code(run, monkeypatch, error, code, told):
    broken_doctor(monkeypatch, error)

    as_json = json.dumps({"error": told, "exit_code": code}) + "\n"
    for options, expected in (([], ""), (["-q"], ""), (["--json"], as_json)):
        found, out, err = run("doctor", *options)
        assert (found, out) == (code, expected)
        # After Ctrl-C click begins a new line, because the terminal shows ^C on the last one.
        assert err.lstrip("\n") == f"propulsion-export: {told}\n"


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_shows_the_traceback_and_keeps_the_rest(run, monkeypatch, flag):
    broken_doctor(monkeypatch, AdapterError("a: b"))

    code, out, err = run("doctor", flag, "--json")

    assert code == 4
    assert json.loads(out) == {"error": "a: b", "exit_code": 4}
    assert "Traceback (most recent call last)" in err
    assert err.endswith("\npropulsion-export: a: b\n")


@pytest.mark.parametrize("options", [[], ["--json"], ["-q"]], ids=str)
@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        ModuleNotFoundError("No module named 'torhc'", name="torhc"),
        RuntimeError("a bug"),
    ],
    ids=repr,
)
def test_a_bug_keeps_its_traceback_and_is_no_verdict(monkeypatch, capsys, error, options):
    broken_doctor(monkeypatch, error)

    with pytest.raises(SystemExit) as exit:
        main(["doctor", *options])

    told = capsys.readouterr()
    assert exit.value.code == 70
    assert told.out == ""
    assert told.err.startswith("Traceback")
    assert str(error) in told.err


def test_the_installed_program_ends_with_the_code(tmp_path):
    program = "from propulsion_export.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(tmp_path / "gone"), "--json"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 4
    assert json.loads(done.stdout)["exit_code"] == 4
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", [errno.ENAMETOOLONG, errno.EACCES, errno.EIO, errno.EFBIG])
def test_what_a_place_is_to_blame_for_is_one_line(monkeypatch, capsys, code):
    broken_doctor(monkeypatch, OSError(code, os.strerror(code), "/some/where"))

    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--json"])

    told = capsys.readouterr()
    assert exit.value.code == json.loads(told.out)["exit_code"] == 2
    assert told.err == f"propulsion-export: /some/where: {os.strerror(code)}\n"
