"""An adapter that PEFT saved into its base model's directory is applied where nobody asked for it.

transformers loads it onto the base, so a graph holds it, and its oracle does too.
"""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.loading import load_base
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.pytorch import open_checkpoint
from propulsion_export.training import TrainOptions
from propulsion_export.training.trainer import train
from propulsion_export.tuning import PropulsionConfig

METHODS = {
    "lora": lambda: peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
    "propulsion": lambda: PropulsionConfig(target_modules=["query"], degree=2),
}


@pytest.fixture
def both(world, tmp_path):
    """`both(method)`: the base model's directory with an adapter of that method in it too."""

    def make(method):
        directory = tmp_path / f"both-{method}"
        shutil.copytree(world.base, directory)
        torch.manual_seed(3)
        model = peft.get_peft_model(
            transformers.AutoModel.from_pretrained(world.base), METHODS[method]()
        )
        with torch.no_grad():
            for value in filter(lambda p: p.requires_grad, model.parameters()):
                value.uniform_(0.6, 1.4)
        model.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("method", METHODS)
def test_the_base_model_is_loaded_without_the_adapter_beside_it(method, both, world):
    found = load_base(str(both(method)), task="feature-extraction").model

    expected = load_base(str(world.base), task="feature-extraction").model
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_graph_and_oracle_are_those_of_the_base_model_alone(both, world, tmp_path):
    directory = both("ia3")

    made = export_onnx([world.three], tmp_path / "made", model=str(directory))

    right = export_onnx([world.three], tmp_path / "right", model=str(world.base))
    assert made.manifest.files["model.onnx"] == right.manifest.files["model.onnx"]
    # Each is judged with the other's base model.
    assert check_parity(tmp_path / "made", model=str(world.base)).passed
    assert check_parity(tmp_path / "right", model=str(directory)).passed


def test_an_adapter_in_its_base_models_directory_is_merged_into_it_once(both, world, tmp_path):
    directory = both("propulsion")
    apart = tmp_path / "apart"
    apart.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(directory / name, apart)

    made = merge(directory, tmp_path / "made", model=str(directory))

    right = merge(apart, tmp_path / "right", model=str(world.base))
    assert made.manifest.files["model.safetensors"] == right.manifest.files["model.safetensors"]
    assert made.manifest.base.fingerprint == right.manifest.base.fingerprint


def test_training_starts_from_the_base_model_alone(both, world, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"ba {word}", "label": word} for word in ("be", "bi") * 10]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TrainOptions(epochs=1, batch_size=8, head_only=False)

    train(both("lora"), data, tmp_path / "made", options=options)

    train(world.base, data, tmp_path / "right", options=options)
    made, right = (Adapter.read(tmp_path / name) for name in ("made", "right"))
    assert made.scales.keys() == right.scales.keys()
    for path, scale in right.scales.items():
        np.testing.assert_array_equal(made.scales[path].values, scale.values)
    assert not made.fingerprint.difference(right.fingerprint)


def test_a_merged_checkpoint_runs_without_an_adapter_put_beside_it(both, world, tmp_path):
    merge(world.three, tmp_path / "merged")
    artifact = Artifact.read(tmp_path / "merged")
    inputs = {"input_ids": np.array([[2, 7, 9, 3]])}
    right = open_checkpoint(artifact)(inputs)
    beside = both("ia3")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(beside / name, tmp_path / "merged")

    found = open_checkpoint(artifact)(inputs)

    np.testing.assert_array_equal(found["logits"], right["logits"])


@pytest.mark.parametrize("command", ["merge", "onnx", "train"])
def test_an_adapter_given_as_the_base_model_is_called_one(command, world, tmp_path):
    with pytest.raises(BaseModelError, match="three: is an adapter") as caught:
        _run(command, world, tmp_path)

    assert str(caught.value).endswith(f"Give the base model with -m, such as {world.base}.")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_neither_is_not_called_an_adapter(world, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(BaseModelError, match=r"has no config\.json, expected a transformers"):
        merge(world.three, tmp_path / "out", model=str(tmp_path / "empty"))


def test_force_does_not_replace_the_weights_beside_an_adapter(both, world, tmp_path):
    directory, data = both("ia3"), tmp_path / "rows.jsonl"
    data.write_text('{"text": "ba", "label": "a"}\n{"text": "be", "label": "b"}\n' * 3)

    with pytest.raises(UsageError, match=r"holds the base model's weights too \(model\.safe"):
        train(world.base, data, directory, options=TrainOptions(epochs=1, force=True))

    assert (directory / "model.safetensors").is_file()


def _run(command, world, tmp_path):
    adapter, out = str(world.three), tmp_path / "out"
    if command == "merge":
        merge(adapter, out, model=adapter)
    elif command == "onnx":
        export_onnx([adapter], out, model=adapter)
    else:
        data = tmp_path / "rows.jsonl"
        data.write_text('{"text": "ba", "label": "a"}\n{"text": "be", "label": "b"}\n' * 3)
        train(adapter, data, out, options=TrainOptions(epochs=1))
