"""What commands say, and where: results, notes, progress, sizes and verdicts."""

import io
import json
import logging
import sys

import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.cli.console import Console, human_size, size_of
from propulsion_export.cli.run import shown
from propulsion_export.cli.verdict import exit_code
from propulsion_export.parity.reports.line import verdict_line
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport

# Results


def test_inspect_describes_an_adapter(run, adapter):
    code, out, err = run("inspect", adapter)

    assert (code, err) == (0, "")
    assert out.startswith(f"{adapter} (")
    assert "  dense: 2 output scales in [-3, 2.5]\n" in out
    assert f"digest: {Adapter.read(adapter).digest}\n" in out

    code, out, err = run("inspect", adapter, "--json")

    assert (code, err, out.count("\n")) == (0, "", 1)
    value = json.loads(out)
    assert value["modules_scaled"] == {
        "dense": {"side": "output", "shape": [2], "smallest": -3.0, "largest": 2.5}
    }
    assert (value["kind"], value["scales"], value["base_fingerprint"]) == ("adapter", 2, True)


def test_inspect_describes_an_artifact(run, artifact):
    code, out, err = run("inspect", artifact)

    assert (code, err) == (0, "")
    assert "mode: switchable\n" in out
    assert "input propulsion_scales: float32 [2], optional\n" in out
    assert "propulsion_scales: 1 slots\n" in out

    code, out, err = run("inspect", artifact, "--json")

    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["layout"][SCALES_INPUT][0]["path"] == "dense"


def test_doctor_says_what_is_here(run):
    code, out, err = run("doctor", "--json")

    assert (code, err, out.count("\n")) == (0, "", 1)
    assert {"capabilities", "gpus", "versions"} == json.loads(out).keys()
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert out.split()[:2] == ["here", "step"]


@pytest.mark.parametrize("words", [["inspect"], ["adapter", "list"]], ids=" ".join)
def test_quiet_says_nothing(run, artifact, words):
    assert run(*words, artifact, "-q") == (0, "", "")
    assert run(*words, artifact)[1] != ""


def test_quiet_keeps_the_json_that_was_asked_for(run, artifact):
    code, out, err = run("adapter", "list", artifact, "-q", "--json")

    assert (code, err) == (0, "")
    assert json.loads(out)


def test_json_has_null_for_what_is_not_a_number(capsys):
    Console(json=True, quiet=False).result({"a": [float("nan"), (float("inf"), 1.5)]}, "text")

    assert capsys.readouterr() == ('{"a": [null, [null, 1.5]]}\n', "")


@pytest.mark.parametrize(
    ("prediction", "told"),
    [
        ({"label": "cat", "score": 0.8765}, "cat (87.6%)"),
        (
            {"tokens": [{"word": w, "label": n, "score": 1.0} for w, n in ("aA", "bO")]},
            "a/A b/O",
        ),
        (
            {"answer": "a hill", "start": 3, "end": 9, "score": 0.5},
            "a hill (50.0%, characters 3 to 9)",
        ),
        ({"filled": ["a", "b"]}, "a, b"),
        ({"generated": "a\nb", "tokens": [1, 2, 3], "stopped": "end"}, "a\\nb"),
        (
            {"embedding": [0.25, -1.0, 0.5, 2.0, 3.0], "pooling": "cls+normalize"},
            "0.25 -1 0.5 2 ... (5 numbers, cls+normalize, --json has them all)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_prediction_is_told_in_words(prediction, told):
    assert shown(prediction) == told


def test_a_table_is_never_cut_and_reads_no_markup(capsys):
    long = "x" * 150

    table = Console(json=False, quiet=False).table(("name", "detail"), [("[red]", long)])

    assert "[red]" in table
    assert table.replace("\n", "").count("x") == 150
    assert all(line == line.rstrip() for line in table.splitlines())


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1400, "1.4 kB"),
        (2_500_000, "2.5 MB"),
        (7 * 10**12, "7.0 TB"),
    ],
)
def test_sizes_are_told_as_people_say_them(count, told):
    assert human_size(count) == told


def test_the_size_of_a_directory_is_that_of_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "deep" / "b").write_bytes(b"345")

    assert size_of(tmp_path) == 5
    assert size_of(tmp_path / "a") == 2


def report_of(*checks, not_run=()):
    return ParityReport(
        artifact="onnx",
        kind="onnx",
        dtype="float32",
        runner="onnxruntime",
        inputs=16,
        seed=0,
        tools={},
        checks=checks,
        not_run=not_run,
    )


def test_a_verdict_has_the_documented_exit_code_and_one_line():
    good = Check("parity", "topic", True, "fine")
    bad = Check("parity", "pos", False, "logits: out of tolerance")
    cases = {
        0: report_of(good),
        1: report_of(good, bad),
        3: report_of(not_run=(NotRun("onnxruntime on onnx", "not installed"),)),
    }

    for code, report in cases.items():
        assert exit_code(report) == code
        assert "\n" not in verdict_line(report)
    assert verdict_line(cases[1]) == (
        "parity: FAILED, 1 of 2 checks; parity of pos: logits: out of tolerance"
    )
    assert verdict_line(cases[3]) == "parity: not run (onnxruntime on onnx: not installed)"
    assert verdict_line(cases[0]).startswith("parity: passed, 1 checks on 16 inputs in onnxruntime")


# Notes and progress


def test_notes_go_to_stderr_unless_quiet(capsys):
    for as_json in (False, True):
        Console(json=as_json, quiet=False).note("by the way")
        Console(json=as_json, quiet=True).note("never")

    assert capsys.readouterr() == ("", "by the way\n" * 2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report_progress(console):
    with console.progress() as progress:
        progress(0.1, "loading")
        progress(0.1, "loading")
        progress(0.5, "tracing")


def test_there_are_bars_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    report_progress(Console(json=False, quiet=False))

    assert "\x1b[" in terminal.getvalue()
    assert "tracing" in terminal.getvalue()
    assert "[ 50%]" not in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_there_are_lines_elsewhere(capsys):
    report_progress(Console(json=True, quiet=False))

    assert capsys.readouterr() == ("", "[ 10%] loading\n[ 50%] tracing\n")


def test_counted_steps_are_told_every_5_percent_and_everything_else_always(capsys):
    with Console(json=False, quiet=False).progress() as progress:
        progress(0.1, "loaded")
        for step in range(1, 1001):
            progress(0.1 + 0.88 * step / 1000, f"step {step} of 1000")
            if step % 100 == 0:
                progress(0.1 + 0.88 * step / 1000, f"epoch {step // 100} of 10: accuracy 0.5")
        progress(1.0, "wrote out")

    lines = capsys.readouterr().err.splitlines()
    assert [lines[0], lines[-1]] == ["[ 10%] loaded", "[100%] wrote out"]
    assert sum("epoch" in line for line in lines) == 10
    assert 5 <= sum("step" in line for line in lines) <= 20


def test_quiet_has_no_progress_not_even_on_a_terminal(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    report_progress(Console(json=False, quiet=True))

    assert terminal.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_packages_that_transformers_imports_by_itself_only_report_errors(run):
    run("doctor")

    assert {logging.getLogger(name).level for name in ("torchao", "bitsandbytes")} == {
        logging.ERROR
    }
