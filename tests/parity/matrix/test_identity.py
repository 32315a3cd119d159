"""Wrong values of the base model in an artifact, which no adapter of it shows, cost the verdict."""

import shutil

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.layout import packed_inputs, to_row
from propulsion_export.artifacts.tensor_names import BIASES_INPUT, SCALES_INPUT
from propulsion_export.pipeline.parity import check_parity

NEARLY = np.float32(1 + 2**-20)  # far below what parity allows


def failed(report):
    return {(check.case, check.adapter) for check in report.checks if not check.passed}


@pytest.fixture
def copied(tmp_path):
    return lambda artifact: shutil.copytree(artifact, tmp_path / "copy")


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_the_identity_of_a_right_artifact_is_its_base_model(mode, export_world):
    report = check_parity(export_world(mode))

    assert report.passed
    (check,) = [check for check in report.checks if check.case == "identity"]
    assert check.adapter == "base"
    assert "bit for bit" in check.detail


@pytest.mark.parametrize("packed", [SCALES_INPUT, BIASES_INPUT])
def test_a_stored_base_model_that_is_none_fails(packed, switchable, copied):
    """The graph's own defaults are right; an adapter without a tensor gets these values."""
    directory = copied(switchable)
    file = directory / "adapters" / "base.safetensors"
    feeds = load_file(file)
    feeds[packed][7] += 0.5
    save_file(feeds, file)
    Artifact.write(directory, Artifact.read(switchable).manifest)

    report = check_parity(directory)

    assert ("identity", "base") in failed(report)
    assert {case for case, _ in failed(report)} <= {"identity", "added"}


def test_a_default_in_the_graph_that_is_off_by_a_millionth_fails(switchable, copied):
    directory = copied(switchable)
    model = ir.load(directory / "model.onnx")
    value = model.graph.initializers[SCALES_INPUT]
    changed = value.const_value.numpy().copy()
    changed[3] *= NEARLY
    value.const_value = ir.tensor(changed, name=value.name)
    ir.save(model, directory / "model.onnx", external_data="other.data")
    Artifact.write(directory, Artifact.read(switchable).manifest)

    assert failed(check_parity(directory)) == {("identity", "base")}


def test_a_row_of_the_base_model_that_is_off_by_a_millionth_fails(banked, copied):
    directory, artifact = copied(banked), Artifact.read(banked)
    rows, layout = artifact.open_bank().rows(), artifact.manifest.layout
    base = to_row(packed_inputs(artifact, "base"), layout).copy()
    base[3] *= NEARLY
    shutil.rmtree(directory / "adapters")
    bank = Bank.create(directory, base)
    for name, row in rows.items():
        bank.add(name, to_row(packed_inputs(artifact, name), layout), row.entry)

    report = check_parity(directory)

    assert failed(report) == {("identity", "base")}
    assert "the artifact's value for the base model is not" in next(
        check.detail for check in report.checks if not check.passed
    )
