import errno
import io
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    Manifest,
    Slot,
    TensorSpec,
)
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.cli import main
from propulsion_export.cli.app import COMMANDS, app
from propulsion_export.cli.console import Console, human_size, size_of
from propulsion_export.cli.run import shown
from propulsion_export.cli.verdict import exit_code
from propulsion_export.environment import machine
from propulsion_export.errors import AdapterError, UnavailableError, UsageError
from propulsion_export.parity.reports.line import verdict_line
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport

BASE = Fingerprint("float32", {"weight": (0.5,) * 8})
OTHER_BASE = Fingerprint("float32", {"weight": (0.25,) * 8})
LEAVES = [[name] for name in COMMANDS if name != "adapter"] + [
    ["adapter", name] for name in ("add", "remove", "list")
]


@pytest.fixture
def run(capsys):
    """Run the program; gives its exit code, standard output and standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return done.value.code, out, err

    return call


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "topic")


@pytest.fixture
def artifact(tmp_path):
    """A switchable artifact with two adapters, whose graph nobody runs here."""
    directory = tmp_path / "onnx"
    (directory / "adapters").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"graph")
    for name, values in (("base", [1, 1]), ("topic", [2, 3]), ("pos", [4, 5])):
        feeds = {SCALES_INPUT: np.array(values, np.float32)}
        save_file(feeds, directory / "adapters" / f"{name}.safetensors")
    entry = AdapterEntry("sha256:0123456789abcdef", "adapters/topic", 2, labels=("no", "yes"))
    manifest = Manifest(
        kind="onnx",
        mode="switchable",
        task="text-classification",
        dtype="float32",
        base=BaseEntry("some/base", BASE),
        adapters={
            name: replace(entry, file=f"adapters/{name}.safetensors") for name in ("topic", "pos")
        },
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec(SCALES_INPUT, "float32", (2,), optional=True),
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
        layout={SCALES_INPUT: (Slot("dense", 0, 2, (2,)),)},
        tools={"torch": "2.13.0"},
    )
    return Artifact.write(directory, manifest).directory


def write_adapter(directory, fingerprint=BASE, path="dense"):
    directory.mkdir()
    scales = {path: Scale(np.array([2.5, -3.0]))}
    Adapter(directory.name, scales, fingerprint=fingerprint).write(directory)
    return directory


def command_of(words):
    command = app
    for word in words:
        command = command.get_command(click.Context(command), word)
    return command


# Help


@pytest.mark.parametrize("words", [[name] for name in COMMANDS] + LEAVES, ids=" ".join)
def test_every_command_explains_itself_with_an_example(run, words):
    code, out, err = run(*words, "--help")

    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: propulsion-export {' '.join(words)} ")
    example = next(line for line in out.splitlines() if "Example: " in line)
    # On one line, so that it can be copied.
    assert example.strip() == command_of(words).epilog.removeprefix("\b\n")


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_example_can_be_called(words):
    command = command_of(words)
    example = shlex.split(command.epilog.partition("Example:")[2])

    assert example[: 1 + len(words)] == ["propulsion-export", *words]
    command.make_context(words[-1], example[1 + len(words) :])


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_the_common_options(words):
    options = {name for parameter in command_of(words).params for name in parameter.opts}

    assert options >= {"--json", "-q", "--quiet", "-v", "--verbose"}


@pytest.mark.parametrize(
    "words", [["train"], ["merge"], ["onnx"], ["trt"], ["package"], ["export"]], ids=str
)
def test_commands_that_write_can_replace(words):
    options = {name for parameter in command_of(words).params for name in parameter.opts}

    assert options >= {"-o", "--output", "--force"}


def test_the_list_of_commands_is_that_of_the_help(run):
    code, out, err = run("--help")

    assert (code, err) == (0, "")
    lines = out.partition("Commands:\n")[2].splitlines()
    starts = [line.split()[0] for line in lines if line[:2] == "  " and line[2:3].strip()]
    assert starts[: len(COMMANDS)] == list(COMMANDS)
    for name, text in COMMANDS.items():
        assert text.split()[0] in out, name


def test_the_version_is_that_of_the_package(run):
    code, out, err = run("--version")

    assert (code, err) == (0, "")
    assert out == f"propulsion-export, version {machine.package_version('propulsion-export')}\n"


# Usage


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tarin"], "No such command 'tarin'. Did you mean 'train'?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["inspect"], "Missing argument 'PATH'."),
        (["inspect", "a", "b"], "Got unexpected extra argument (b)"),
        (["inspect", "--jason", "a"], "No such option"),
        (["export", "-o", "out"], "Missing option '-a' / '--adapter'."),
        (["merge", "-a", "a"], "Missing option '-o' / '--output'."),
        (["merge", "-a", "a", "-o", "out", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["onnx", "-a", "a", "-o", "out", "--opset", "9"], "Invalid value for '--opset'"),
        (["trt", "a", "-o", "out", "--builder-optimization-level", "6"], "Invalid value"),
        (["adapter", "ad"], "No such command 'ad'."),
        (["adapter", "add", "a"], "Missing argument '[NAME=]ADAPTER'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_usage_error_ends_with_2_and_is_told_on_stderr(run, words, told):
    code, out, err = run(*words)

    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_no_command_at_all_shows_the_help_and_ends_with_2(run):
    code, out, err = run()

    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize("words", [["inspect"], ["tarin"], ["merge", "-a", "a"]], ids=" ".join)
def test_a_usage_error_is_json_on_stdout_when_asked(run, words):
    code, out, err = run(*words, "--json")

    assert code == 2
    assert json.loads(out)["exit_code"] == 2
    assert out.count("\n") == 1
    assert json.loads(out)["error"] in err


# Options that do nothing


def ignored(adapter, artifact, tmp_path):
    """Calls with options that would do nothing: by the options, the whole call and the message."""
    out, texts = tmp_path / "out", tmp_path / "texts.txt"
    texts.write_text("a\n")
    onnx, parity, run = ["onnx", "-a", adapter, "-o", out], ["parity", artifact], ["run", artifact]
    run += ["--text", "a"]
    export, trains = ["export", "-a", adapter, "-o", out], "which trains no head"
    train = ["train", "-m", "m", "-d", "d", "-o", out, "--task"]
    package = ["package", artifact, "-o", out, "--layout", "genai"]
    other_task = "for generating text, the artifact is for text-classification"
    return {
        "--untie": ([*onnx, "--mode", "bank"], "does nothing with --mode bank"),
        "--allow-range": (onnx, "does nothing with --mode folded"),
        "--placement all": ([*onnx, "--mode", "bank"], "is for slots without adapters"),
        "--max-labels 3": ([*onnx, "--mode", "bank"], "is for slots without adapters"),
        "--train-bias": ([*onnx, "--mode", "bank"], "is for slots without adapters"),
        "--runtime auto": ([*export, "--no-engine"], "does nothing with --no-engine"),
        "--target auto": ([*export, "--no-engine"], "does nothing with --no-engine"),
        "--force": (parity, "does nothing without --report"),
        "--seed 0": ([*parity, "--inputs", texts, "--quick"], "does nothing with --inputs"),
        "--max-new-tokens 128": (run, other_task),
        "--temperature 1": (run, other_task),
        "--top-k 1": (run, other_task),
        "--top-p 1": (run, other_task),
        "--seed 1": (run, other_task),
        "--head-learning-rate 0.01": ([*train, "text-generation"], trains),
        "--no-head-only": ([*train, "text2text-generation"], trains),
        "--packing": ([*train, "text-classification"], "expected none for --task"),
        "--model-name a": (package, "for --layout triton, found genai"),
        "--max-batch-size 32": (package, "for --layout triton, found genai"),
    }


@pytest.mark.parametrize(
    "option",
    [
        *("--untie", "--allow-range", "--placement all", "--max-labels 3", "--train-bias"),
        *("--runtime auto", "--target auto", "--force", "--seed 0"),
        *("--max-new-tokens 128", "--temperature 1", "--top-k 1", "--top-p 1", "--seed 1"),
        *("--head-learning-rate 0.01", "--no-head-only", "--packing"),
        *("--model-name a", "--max-batch-size 32"),
    ],
)
def test_an_option_that_does_nothing_is_refused_by_name(run, adapter, artifact, tmp_path, option):
    words, message = ignored(adapter, artifact, tmp_path)[option]

    code, out, err = run(*words, *option.split())

    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert option.split()[0].removeprefix("--") in err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_seed_without_sampling_is_refused(run, artifact):
    Artifact.write(artifact, replace(Artifact.read(artifact).manifest, task="text-generation"))

    code, out, err = run("run", artifact, "--text", "a", "--seed", 1)

    assert (code, out) == (2, "")
    assert "--seed: " in err
    assert "--temperature, --top-k or --top-p" in err


def test_a_seed_beside_inputs_is_taken_where_the_slots_have_no_adapter(run, artifact, tmp_path):
    Artifact.write(artifact, replace(Artifact.read(artifact).manifest, adapters={}))
    (tmp_path / "texts.txt").write_text("a\n")

    code, out, err = run("parity", artifact, "--inputs", tmp_path / "texts.txt", "--seed", 1)

    assert (code, out) == (4, "")  # nobody runs this graph
    assert "--seed" not in err


# One name for an adapter given by a link


def test_a_link_to_an_adapter_is_exported_and_compared_under_its_own_name(run, world, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(world.three)

    code, out, err = run("onnx", "-a", link, "-o", tmp_path / "onnx", "--json")

    assert code == 0, err
    assert json.loads(out)["adapters"] == ["latest"]
    assert json.loads(out)["parity"] == "passed"


def test_a_link_to_an_adapter_is_added_under_its_own_name(run, artifact, adapter, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(adapter)

    code, out, err = run("adapter", "add", artifact, link, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out) == {"adapters": ["latest", "pos", "topic"]}


# Known failures


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


# What is said, and where


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


def test_the_adapters_of_an_artifact_are_listed_added_and_removed(run, artifact, tmp_path):
    code, out, err = run("adapter", "list", artifact)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["name", "pos", "topic"]

    new = write_adapter(tmp_path / "new")
    code, out, err = run("adapter", "add", artifact, f"third={new}", "--json")
    assert (code, json.loads(out), err) == (0, {"adapters": ["pos", "third", "topic"]}, "")
    assert Artifact.read(artifact).feeds("third")[SCALES_INPUT].tolist() == [2.5, -3.0]

    code, out, err = run("adapter", "remove", artifact, "pos")
    assert (code, out, err) == (0, f"{artifact}: third, topic\n", "")

    code, out, err = run("adapter", "list", artifact, "--json")
    assert (code, err, list(json.loads(out)["adapters"])) == (0, "", ["third", "topic"])


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


# Small things


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


@pytest.fixture
def bank(artifact, tmp_path):
    """The artifact of the other tests as a bank of two adapters."""
    from propulsion_export.artifacts.bank import Bank
    from propulsion_export.artifacts.manifest import AdapterEntry, TensorSpec

    read = Artifact.read(artifact)
    width = sum(slot.length for slots in read.manifest.layout.values() for slot in slots)
    shutil.rmtree(artifact / "adapters")
    made = Bank.create(artifact, np.ones(width, np.float32))
    for number, name in enumerate(("topic", "pos"), 2):
        entry = AdapterEntry(f"sha256:{number}{'0' * 63}", f"adapters/{name}", width)
        made.add(name, np.full(width, number, np.float32), entry)
    inputs = tuple(spec for spec in read.manifest.inputs if spec.name != SCALES_INPUT)
    inputs += (
        TensorSpec("propulsion_bank", "float32", ("adapters", width)),
        TensorSpec("adapter_ids", "int64", ("batch",)),
    )
    Artifact.write(artifact, replace(read.manifest, mode="bank", adapters={}, inputs=inputs))
    return artifact


def test_the_adapters_of_a_bank_are_listed_with_their_ids_added_removed_and_compacted(
    run, bank, tmp_path
):
    code, out, err = run("adapter", "list", bank, "--json")
    assert (code, err) == (0, "")
    assert {name: told["id"] for name, told in json.loads(out)["adapters"].items()} == {
        "pos": 2,
        "topic": 1,
    }

    new = write_adapter(tmp_path / "new")
    code, out, err = run("adapter", "add", bank, f"third={new}", "--json")
    assert (code, json.loads(out), err) == (0, {"count": 3}, "")
    assert Artifact.read(bank).open_bank().values()[3].tolist() == [2.5, -3.0]
    code, out, err = run("adapter", "add", bank, f"third={new}")
    assert (code, out) == (2, "")
    assert "has an adapter 'third' already" in err

    code, out, err = run("adapter", "remove", bank, "topic")
    assert (code, out, err) == (0, f"{bank}: 2 adapters\n", "")
    code, out, err = run("adapter", "compact", bank)
    assert (code, out, err) == (0, f"{bank}: 8 bytes freed\n", "")

    code, out, err = run("adapter", "list", bank)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["name", "id"],
        ["pos", "1"],
        ["third", "2"],
    ]
    code, out, err = run("inspect", bank, "--json")
    assert json.loads(out)["adapters"] == {"count": 2, "width": 2, "file": "bank-1.bin"}


def test_only_a_bank_is_compacted(run, artifact):
    code, out, err = run("adapter", "compact", artifact)

    assert (code, out) == (4, "")
    assert "is switchable, expected a bank" in err


@pytest.mark.parametrize("code", [errno.ENAMETOOLONG, errno.EACCES, errno.EIO, errno.EFBIG])
def test_what_a_place_is_to_blame_for_is_one_line(monkeypatch, capsys, code):
    broken_doctor(monkeypatch, OSError(code, os.strerror(code), "/some/where"))

    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--json"])

    told = capsys.readouterr()
    assert exit.value.code == json.loads(told.out)["exit_code"] == 2
    assert told.err == f"propulsion-export: /some/where: {os.strerror(code)}\n"


@pytest.mark.parametrize(
    ("output", "options", "refused"),
    [
        ("merged.gguf", ["--share"], "--share: a merged GGUF file is one new file. Leave it out."),
        ("merged.gguf", ["--dtype", "float16"], "--dtype: every tensor of a GGUF file keeps its"),
        (
            "merged.gguf",
            ["-a", "other"],
            "a GGUF file takes one. Merge each into a file of its own",
        ),
        ("merged", ["--allow-range"], "--allow-range: is for GGUF files. Leave it out."),
    ],
)
def test_options_of_the_other_kind_of_merge_are_refused(output, options, refused, run, adapter):
    code, _, error = run("merge", "-a", adapter, "-o", adapter.parent / output, *options)

    assert (code, refused in error) == (2, True), error


def test_packages_that_transformers_imports_by_itself_only_report_errors(run):
    run("doctor")

    assert {logging.getLogger(name).level for name in ("torchao", "bitsandbytes")} == {
        logging.ERROR
    }
