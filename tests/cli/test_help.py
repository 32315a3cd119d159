"""Each command explains itself, with an example that can be called."""

import shlex

import click
import pytest

from propulsion_export.cli.app import COMMANDS, app
from propulsion_export.environment import machine

LEAVES = [[name] for name in COMMANDS if name != "adapter"] + [
    ["adapter", name] for name in ("add", "remove", "list")
]


def command_of(words):
    command = app
    for word in words:
        command = command.get_command(click.Context(command), word)
    return command


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
