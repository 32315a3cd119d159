"""What serving loads: neither torch nor transformers, whether they are installed or not."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from propulsion_export.artifacts.artifact import digest_of

HEAVY = {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "datasets"}
PROBE = """
import json, shutil, sys
from pathlib import Path
from propulsion_export import Session, Settings

{statements}
print(json.dumps(sorted({heavy} & set(sys.modules))))
"""


def loaded_by(statements):
    """The heavy modules that a fresh interpreter has loaded after some statements."""
    script = PROBE.format(statements=textwrap.dedent(statements), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_texts_are_answered_and_adapters_changed_without_torch(mode, export_world, world, tmp_path):
    statements = f"""
        directory = shutil.copytree({str(export_world(mode))!r}, {str(tmp_path / mode)!r})
        session = Session(directory)
        replies = session(["ba be", "ko"], "three")
        assert all(reply.prediction["label"].startswith("three") for reply in replies)
        session.add({f"new={world.five}"!r})
        assert session("ba be", "new")[0].prediction["label"].startswith("five")
        session.remove("new")
        assert session.adapters == ("five", "three")
    """

    assert loaded_by(statements) == []


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_text_is_generated_without_torch(kind, exported):
    statements = f"""
        session = Session({str(exported(kind, "bank"))!r})
        replies = session(["ba be", "ko"], ["one", "two"], settings=Settings(new_tokens=4))
        assert all(reply.prediction["tokens"] for reply in replies)
    """

    assert loaded_by(statements) == []


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
def test_the_command_answers_a_text_without_torch(mode, export_world):
    statements = f"""
        from propulsion_export.cli import main
        try:
            main(["run", {str(export_world(mode))!r}, "--text", "ba be"])
        except SystemExit as done:
            assert done.code == 0
    """

    assert loaded_by(statements) == []


@pytest.mark.parametrize("kind", ["merged", "reference"])
def test_what_needs_more_packages_says_so_where_they_are_missing(kind, export_world, tmp_path):
    """A merged checkpoint needs torch, the reference evaluator onnx_ir; both are hidden here."""
    directory = shutil.copytree(export_world("folded"), tmp_path / "artifact")
    if kind == "merged":
        make_merged(directory)
    runner = "reference" if kind == "reference" else "auto"
    statements = f"""
        sys.modules |= {{"torch": None, "onnx_ir": None}}
        from propulsion_export.errors import UnavailableError
        try:
            Session({str(directory)!r}, runner={runner!r})
        except UnavailableError as error:
            assert "is not installed" in str(error), error
        else:
            raise AssertionError("opened")
        del sys.modules["torch"], sys.modules["onnx_ir"]
    """

    loaded_by(statements)


def make_merged(directory):
    """Make an ONNX artifact one that claims to be a merged checkpoint."""
    for file in directory.glob("model.onnx*"):
        file.unlink()
    (directory / "model.safetensors").write_bytes(b"")
    files = {file.name: digest_of(file) for file in directory.iterdir() if file.is_file()}
    del files["propulsion.json"]
    manifest = json.loads((directory / "propulsion.json").read_text())
    del manifest["digest"]
    manifest |= {"kind": "merged", "inputs": [], "outputs": [], "files": files}
    (directory / "propulsion.json").write_text(json.dumps(manifest))


def test_the_probe_sees_torch():
    pytest.importorskip("torch", reason="there is none to see")

    assert "torch" in loaded_by("import torch")


@pytest.mark.skipif(not os.environ.get("PROPULSION_NO_TORCH"), reason="`make serving` sets it")
def test_the_environment_of_make_serving_has_no_torch():
    assert [name for name in sorted(HEAVY) if importlib.util.find_spec(name)] == []
