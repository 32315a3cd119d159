"""Every runtime in the table has its module, and the command line offers it."""

import importlib
from typing import get_args

import pytest
from click.testing import CliRunner

from propulsion_export import runners
from propulsion_export.artifacts.manifest import ArtifactKind
from propulsion_export.cli.app import app
from propulsion_export.runners.table import RUNNER_NAMES, RUNTIMES, runtimes_of

KINDS = get_args(ArtifactKind)


@pytest.mark.parametrize("name", RUNTIMES)
def test_module_of_a_runtime_has_what_its_kind_needs(name):
    runtime = RUNTIMES[name]
    module = importlib.import_module(f"{runners.__name__}.{runtime.module}")

    assert runtime.kind in KINDS
    assert runtime.device in ("cpu", "cuda")
    needed = ("open_checkpoint",) if runtime.kind == "merged" else ("open_graph", "place")
    assert all(callable(getattr(module, function, None)) for function in needed)


@pytest.mark.parametrize(
    ("kind", "default"), [("merged", "torch"), ("onnx", "onnxruntime"), ("engine", "tensorrt")]
)
def test_default_of_a_kind_is_its_first_runtime(kind, default):
    assert runtimes_of(kind)[0] == default
    assert all(RUNTIMES[name].kind == kind for name in runtimes_of(kind))


def test_every_kind_has_a_runtime_and_every_runtime_a_kind():
    assert sorted(name for kind in KINDS for name in runtimes_of(kind)) == sorted(RUNTIMES)


def test_runners_are_auto_and_every_runtime():
    assert list(RUNNER_NAMES) == ["auto", *RUNTIMES]


@pytest.mark.parametrize("command", ["run", "parity"])
def test_help_lists_every_runner(command):
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output

    assert all(name in shown for name in RUNNER_NAMES)
