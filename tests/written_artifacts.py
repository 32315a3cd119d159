"""Artifacts of a few bytes whose graphs nobody runs, for the tests of what is read and refused."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    EngineEntry,
    GraphEntry,
    Manifest,
    Slot,
    TensorSpec,
)
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import ArtifactError

MANIFEST = "propulsion.json"
TOPIC = "adapters/topic.safetensors"
ENGINE = EngineEntry(
    runtime="tensorrt",
    version="10.16",
    targets=("sm_86",),
    profiles=({"input_ids": {"min": [1, 8], "opt": [2, 8], "max": [4, 8]}},),
    options={"refit": None, "level": 3},
    onnx_digest="sha256:00",
)
FOLDED = Manifest(
    kind="onnx",
    mode="folded",
    task="text-classification",
    dtype="float32",
    base=BaseEntry("some/base", Fingerprint("float32", {"weight": (0.5,) * 8})),
    adapters={"topic": AdapterEntry("sha256:00", "adapters/topic", 3, labels=("no", "yes"))},
    inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
    outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
    tools={"torch": "2.13.0"},
)
SWITCHABLE = replace(
    FOLDED,
    mode="switchable",
    dtype="bfloat16",
    adapters={"topic": AdapterEntry("sha256:00", "adapters/topic", 3, TOPIC, ("no", "yes"))},
    layout={SCALES_INPUT: (Slot("a", 0, 2, (2,)), Slot("b", 2, 1, (1,), "input"))},
)
# What an artifact of each kind cannot be without, the model first.
MODEL_FILES = {
    "onnx": ("model.onnx",),
    "engine": ("model.engine",),
    "merged": ("model.safetensors", "config.json"),
}
SEVERAL = replace(
    FOLDED,
    task="text2text-generation",
    inputs=(),
    outputs=(),
    graphs={
        name: GraphEntry(FOLDED.inputs, FOLDED.outputs if "decoder_" in name else ())
        for name in ENCODER_DECODER_FILES
    },
)
OTHER = {"digest": "", "source": "", "size": 0, "file": TOPIC}


def write_folded(directory):
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "model.onnx.data").write_bytes(b"weights")
    return Artifact.write(directory, FOLDED)


def write_switchable(directory):
    (directory / "adapters").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"graph")
    for name, values in (("base", [1, 1, 1]), ("topic", [1.5, -2, 0.5])):
        feeds = {SCALES_INPUT: np.array(values, ml_dtypes.bfloat16)}
        save_file(feeds, directory / "adapters" / f"{name}.safetensors")
    return Artifact.write(directory, SWITCHABLE)


def write_several(directory):
    directory.mkdir()
    for name in (*ENCODER_DECODER_FILES, "model.onnx.data", "config.json"):
        (directory / name).write_bytes(b"1")
    return Artifact.write(directory, SEVERAL)


def change(directory, *path, to=None, drop=False):
    """Change one value in the manifest by its path, and drop its digest."""
    value = json.loads((directory / MANIFEST).read_text())
    value.pop("digest", None)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    (directory / MANIFEST).write_text(json.dumps(value))


def refused(directory, match):
    with pytest.raises(ArtifactError, match=match) as caught:
        Artifact.read(directory)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
