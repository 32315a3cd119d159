"""What a fresh interpreter loads for a command: no framework that it does not use."""

import json
import subprocess
import sys
import textwrap

import pytest

PACKAGE = "propulsion_export"
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "datasets",
    "numpy",
}
PROBE = textwrap.dedent(
    """
    import json, sys
    code = None
    {statement}
    print(json.dumps([code, sorted({heavy} & set(sys.modules))]))
    """
)
RUN = textwrap.dedent(
    """
    from propulsion_export.cli import main
    for arguments in {commands!r}:
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code
    """
)


def loaded_by(statement):
    """The heavy modules that a fresh interpreter has loaded after a statement."""
    script = PROBE.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by_command(*commands):
    return loaded_by(RUN.format(commands=[[str(word) for word in words] for words in commands]))


def test_the_probe_sees_what_is_loaded():
    assert loaded_by("import numpy, onnx_ir")[1] == ["numpy", "onnx", "onnx_ir"]


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli", f"{PACKAGE}.errors"])
def test_importing_loads_no_framework(module):
    assert loaded_by(f"import {module}")[1] == []


def test_help_and_version_load_no_framework():
    from propulsion_export.cli.app import COMMANDS

    helps = [[name, "--help"] for name in COMMANDS]

    assert loaded_by_command(["--help"], ["--version"], ["adapter", "add", "--help"], *helps) == [
        0,
        [],
    ]


def test_public_classes_of_artifacts_load_no_framework():
    names = "import propulsion_export as p; p.Adapter, p.Artifact"

    assert loaded_by(names)[1] == ["numpy"]


def adapter_directory(directory):
    import numpy as np

    from propulsion_export.adapters.adapter import Adapter
    from propulsion_export.adapters.scales import Scale

    directory.mkdir()
    Adapter("topic", {"dense": Scale(np.array([2.0, 3.0]))}).write(directory)
    return directory


def onnx_directory(directory):
    """The smallest artifact that an engine can be built from."""
    import onnx_ir as ir

    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.artifacts.manifest import (
        AdapterEntry,
        BaseEntry,
        Manifest,
        TensorSpec,
    )
    from propulsion_export.base_model.fingerprint import Fingerprint

    graph = """
    <ir_version: 10, opset_import: ["" : 20]>
    graph (int64[batch, sequence] input_ids) => (float[batch, sequence] logits) {
        logits = Cast <to = 1> (input_ids)
    }
    """
    directory.mkdir()
    ir.save(ir.from_onnx_text(graph), directory / "model.onnx")
    (directory / "config.json").write_text('{"max_position_embeddings": 64}')
    manifest = Manifest(
        kind="onnx",
        mode="folded",
        task="feature-extraction",
        dtype="float32",
        base=BaseEntry("some/model", Fingerprint("float32", {"weight": (0.5,) * 8})),
        adapters={"topic": AdapterEntry("sha256:00", "adapters/topic", 2)},
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("logits", "float32", ("batch", "sequence")),),
    )
    Artifact.write(directory, manifest)
    return directory


def test_looking_at_artifacts_loads_numpy_alone(tmp_path):
    adapter, artifact = adapter_directory(tmp_path / "a"), onnx_directory(tmp_path / "o")

    assert loaded_by_command(
        ["inspect", adapter, "-q"],
        ["inspect", artifact, "-q"],
        ["adapter", "list", artifact, "-q"],
    ) == [0, ["numpy"]]


def test_doctor_loads_no_torch():
    code, loaded = loaded_by_command(["doctor", "-q"])

    assert code == 0
    assert not {"torch", "transformers", "peft", "datasets", "onnx", "polygraphy"} & set(loaded)


def test_an_engine_is_built_without_torch(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="building needs tensorrt-rtx")
    artifact = onnx_directory(tmp_path / "onnx")
    out = tmp_path / "engine"

    code, loaded = loaded_by_command(
        ["trt", artifact, "-o", out, "--runtime", "tensorrt-rtx", "--target", "sm_86", "-q"]
    )

    assert code == 0
    assert (out / "model.engine").is_file()
    assert "tensorrt_rtx" in loaded
    assert not {"torch", "transformers", "peft", "datasets", "onnxruntime"} & set(loaded)


def test_the_other_commands_load_no_tensorrt(tmp_path):
    gone, out = tmp_path / "gone", tmp_path / "out"

    code, loaded = loaded_by_command(
        ["merge", "-a", gone, "-o", out],
        ["onnx", "-a", gone, "-o", out],
        ["parity", gone],
        ["run", gone, "--text", "a"],
        ["adapter", "add", gone, f"a={gone}"],
        ["export", "-a", gone, "-o", out, "--no-engine"],
    )

    assert code == 4
    assert "torch" in loaded
    assert not {"tensorrt", "tensorrt_rtx", "polygraphy", "onnxruntime"} & set(loaded)
