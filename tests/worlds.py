"""A tiny base model, two adapters and a switchable export that many tests start from.

Two adapters of different label counts, one with trained biases; nothing is the identity.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kinds import ENCODER_DECODERS
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.layout import pack
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.pipeline.onnx import export_onnx

DEGREE = 15


@pytest.fixture(scope="session")
def write_adapter():
    """`write_adapter(adapter, directory)`: a Propulsion directory of degree 15, as trained.

    Scales must be above zero.
    """

    def write(adapter, directory, degree=DEGREE):
        directory.mkdir(parents=True)
        vectors = {
            path: Scale(scale.values ** (1 / DEGREE)) for path, scale in adapter.scales.items()
        }
        replace(adapter, scales=vectors).write(directory)
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text()) | {"degree": degree}
        file.write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture(scope="session")
def positive_adapter(random_adapter):
    """A random adapter whose scales are above zero."""

    def make(model, *arguments, **options):
        adapter = random_adapter(model, *arguments, **options)
        positive = {path: Scale(np.abs(s.values)) for path, s in adapter.scales.items()}
        return replace(adapter, scales=positive)

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_model, tiny_checkpoint, positive_adapter, write_adapter):
    """Base model, adapters `three` (3 labels, trained biases) and `five` (5 labels), on disk."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_checkpoint("bert", "feature-extraction")
    adapters = {}
    for seed, name, count in ((1, "three", 3), (2, "five", 5)):
        names = tuple(f"{name}-{index}" for index in range(count))
        model = tiny_model("bert", num_labels=count, id2label=None, label2id=None)
        made = positive_adapter(
            model, seed, name, head=True, biases=name == "three", labels=names,
            task="text-classification",
        )  # fmt: skip
        made = replace(made, base=str(base), fingerprint=fingerprint_of_model(_load(base)))
        adapters[name] = write_adapter(made, root / name)
    return SimpleNamespace(base=base, root=root, three=adapters["three"], five=adapters["five"])


@pytest.fixture(scope="session")
def switchable(world):
    """The switchable export of both adapters; copy it before changing it."""
    output = world.root / "switchable"
    export_onnx([world.three, world.five], output, mode="switchable")
    return output


@pytest.fixture(scope="session")
def folded(world):
    """The folded export of `three`; copy it before changing it."""
    output = world.root / "folded"
    export_onnx([world.three], output)
    return output


@pytest.fixture(scope="session")
def banked(world):
    """The bank of both adapters; copy it before changing it."""
    output = world.root / "banked"
    export_onnx([world.three, world.five], output, mode="bank")
    return output


@pytest.fixture(scope="session")
def make_world(tmp_path_factory, tiny_model, tiny_checkpoint, positive_adapter, write_adapter):
    """`make_world(kind)`: a base model and two adapters for it, on disk."""
    worlds = {}

    def make(kind):
        if kind not in worlds:
            task = "text2text-generation" if kind in ENCODER_DECODERS else "text-generation"
            base = tiny_checkpoint(kind, task)
            model = tiny_model(kind)
            root = tmp_path_factory.mktemp(kind)
            for seed, name in ((1, "one"), (2, "two")):
                made = positive_adapter(model, seed, name, task=task)
                made = replace(made, base=str(base), fingerprint=fingerprint_of_model(model))
                write_adapter(made, root / name)
            worlds[kind] = SimpleNamespace(base=base, one=root / "one", two=root / "two", task=task)
        return worlds[kind]

    return make


@pytest.fixture
def plant(switchable, tmp_path):
    """`plant(mistaken)`: the switchable export, its adapter `three` secretly another one."""

    def copy(mistaken: Adapter):
        from safetensors.numpy import save_file

        directory = tmp_path / "planted"
        shutil.copytree(switchable, directory)
        artifact = Artifact.read(directory)
        feeds = pack(mistaken, artifact.manifest.layout, artifact.feeds("base"))
        save_file(feeds, directory / "adapters" / "three.safetensors")
        Artifact.write(directory, artifact.manifest)
        return directory

    return copy


def _load(directory):
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory)
