"""A merged checkpoint whose weights were damaged is no base model, of any command."""

from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.loading import load_base
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.cli import main
from propulsion_export.errors import BaseModelError
from propulsion_export.parity.inputs import load_recorded_base
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.training import TrainOptions
from propulsion_export.training.model import load_trainable

MESSAGE = r"model\.safetensors: its content is not what propulsion\.json recorded"
PATH = "encoder.layer.0.output.dense"


@pytest.fixture
def merged(tiny_checkpoint, write_adapter, tmp_path):
    """A merged checkpoint, and an adapter that was trained on it."""
    base = tiny_checkpoint("bert", "feature-extraction")
    task = {"task": "feature-extraction"}
    values = np.random.default_rng(0).uniform(0.5, 1.5, (2, 32))
    first = Adapter("first", {PATH: Scale(values[0])}, base=str(base), **task)
    merge(write_adapter(first, tmp_path / "first"), tmp_path / "merged")
    fingerprint = fingerprint_of_model(load_base(str(tmp_path / "merged"), **task).model)
    second = Adapter("second", {PATH: Scale(values[1])}, base=str(tmp_path / "merged"), **task)
    write_adapter(replace(second, fingerprint=fingerprint), tmp_path / "second")
    return tmp_path / "merged"


def damage(directory):
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_every_command_that_opens_it_refuses_it(merged, tmp_path):
    second = tmp_path / "second"
    artifact = export_onnx([second], tmp_path / "onnx", mode="switchable")
    damage(merged)

    with pytest.raises(BaseModelError, match=MESSAGE):
        export_onnx([second], tmp_path / "other")
    with pytest.raises(BaseModelError, match=MESSAGE):
        load_recorded_base(artifact, [Adapter.read(second)], None)
    with pytest.raises(BaseModelError, match=MESSAGE):
        merge(second, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_training_on_it_is_refused(merged):
    damage(merged)

    with pytest.raises(BaseModelError, match=MESSAGE):
        load_trainable(str(merged), ("no", "yes"), TrainOptions())


def test_parity_says_so_in_one_line(merged, tmp_path, capsys):
    export_onnx([tmp_path / "second"], tmp_path / "onnx")
    damage(merged)

    with pytest.raises(SystemExit) as exit:
        main(["parity", str(tmp_path / "onnx")])

    assert exit.value.code == 4
    assert "its content is not what propulsion.json recorded" in capsys.readouterr().err
