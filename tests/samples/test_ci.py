"""The workflow names commands, options and files that exist, and *not run* is never green."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from propulsion_export import pytest_plugin
from propulsion_export.cli.app import COMMANDS

CI = Path(__file__).parents[2] / "samples" / "ci"
JOBS = yaml.safe_load((CI / "parity.yml").read_text())["jobs"]
LINES = [
    line
    for job in JOBS.values()
    for step in job["steps"]
    for line in step.get("run", "").splitlines()
]
GITLAB = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (CI / "README.md").read_text(), re.S)[1])


def calls(lines, program):
    """The arguments of each call of a program, wherever it is installed."""
    parts = [shlex.split(part) for line in lines for part in line.split("&&")]
    return [words[1:] for words in parts if words and Path(words[0]).name == program]


def unknown(arguments):
    """What our command line would not take: its command, and options with values it refuses."""
    if arguments[0] not in COMMANDS:
        return [arguments[0]]
    command = importlib.import_module(f"propulsion_export.cli.{arguments[0]}").command
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    wrong = [word for word in arguments[1:] if word.startswith("-") and word not in known]
    if not wrong:
        command.make_context(arguments[0], arguments[1:])
    return wrong


def test_commands_and_options_exist():
    ours = calls([*LINES, *GITLAB["parity"]["script"]], "propulsion-export")

    assert len(ours) == 5
    assert [unknown(arguments) for arguments in ours] == [[]] * 5


@pytest.mark.parametrize("line", ["parity x --reports y", "judge x"])
def test_a_wrong_command_would_be_found(line):
    assert unknown(shlex.split(line))


def test_options_of_pytest_are_the_plugin_s():
    source = Path(pytest_plugin.__file__).read_text()
    options = {
        word for words in calls(LINES, "pytest") for word in words if word.startswith("--parity")
    }

    assert options == {"--parity-report", "--parity-must-run"}
    assert all(f'"{option}"' in source for option in options)


def test_files_that_are_named_are_there():
    named = set(re.findall(r"[\w-]+\.(?:txt|py)\b", "\n".join(LINES)))

    assert named == {"requirements.txt", "requirements-gpu.txt", "test_parity.py"}
    assert all((CI / name).is_file() for name in named)


def test_no_verdict_may_fail_silently():
    assert "continue-on-error" not in (CI / "parity.yml").read_text()
    assert not [line for line in LINES if "|| true" in line]
    [gpu_tests] = [words for words in calls(LINES, "pytest") if "parity/tests" in words][1:]
    assert "--parity-must-run" in gpu_tests


@pytest.mark.parametrize("name", JOBS)
def test_reports_are_uploaded_after_a_failure_too(name):
    steps = JOBS[name]["steps"]
    upload = steps[-1]

    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["if"] == "${{ !cancelled() }}"
    reports = list(calls([s.get("run", "") for s in steps], "propulsion-export"))
    for words in reports:
        if "--report" in words:
            assert words[words.index("--report") + 1].startswith(f"{upload['with']['path']}/")


def test_the_gpu_lane_needs_a_labelled_runner_and_a_label():
    assert {"self-hosted", "gpu"} <= set(JOBS["gpu"]["runs-on"])
    assert "'gpu'" in JOBS["gpu"]["if"]
    assert "if" not in JOBS["cpu"]
