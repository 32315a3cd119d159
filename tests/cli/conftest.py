"""The program, and what it can be called with without running a model."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from dense_adapters import BASE, write_adapter
from safetensors.numpy import save_file

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry, Manifest, Slot, TensorSpec
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.cli import main


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
