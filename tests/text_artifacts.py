"""Fixtures that write tiny ONNX artifacts, from graphs written as text."""

import json

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import BASE_FEEDS
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    Manifest,
    Slot,
    TensorSpec,
)
from propulsion_export.base_model.fingerprint import Fingerprint

# The text format has no 16-bit floats: weights stand among the inputs and are filled in later.
FOLDED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
       TYPE[5, 3] embedding, TYPE[3, 2] weight) => (TYPE[batch, sequence, 2] logits) {
    hidden = Gather <axis = 0> (embedding, input_ids)
    mask = Cast <to = CODE> (attention_mask)
    axis = Constant <value_ints = [2]> ()
    column = Unsqueeze (mask, axis)
    kept = Mul (hidden, column)
    [dense] logits = MatMul (kept, weight)
}
"""
SWITCHABLE = FOLDED.replace("weight) =>", "weight, TYPE[2] propulsion_scales) =>").replace(
    "[dense] logits = MatMul (kept, weight)",
    "[dense] base = MatMul (kept, weight)\n    [scaled] logits = Mul (base, propulsion_scales)",
)
WEIGHTS = {
    "embedding": [[1.0, -2.0, 0.5], [2.0, 0.25, -1.0]] * 2 + [[4.0, 3.0, 2.0]],
    "weight": [[1.0, 2.0], [3.0, -4.0], [0.5, 6.0]],
    "propulsion_scales": [1.0, 1.0],
}
# By dtype: its name in the text format, its number in ONNX, its numpy type.
TYPES = {
    "float32": ("float", 1, np.float32),
    "float16": ("float16", 10, np.float16),
    "bfloat16": ("bfloat16", 16, ml_dtypes.bfloat16),
}
LEGAL = "adapters/legal.safetensors"
IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))


def make_graph(text, dtype="float32"):
    """A model from text, its weights filled in, and its scales optional as in our exports."""
    name, code, numpy_type = TYPES[dtype]
    model = ir.from_onnx_text(text.replace("TYPE", name).replace("CODE", str(code)))
    for value in list(model.graph.inputs):
        if value.name in WEIGHTS:
            value.const_value = ir.tensor(
                np.array(WEIGHTS[value.name], numpy_type), name=value.name
            )
            model.graph.initializers[value.name] = value
            if value.name != "propulsion_scales":
                model.graph.inputs.remove(value)
    return model


def make_manifest(dtype="float32", *, switchable=False):
    scales = TensorSpec("propulsion_scales", dtype, (2,), optional=True)
    return Manifest(
        kind="onnx",
        mode="switchable" if switchable else "folded",
        task="text-classification",
        dtype=dtype,
        base=BaseEntry("some/model", Fingerprint("float32", {"weight": (0.5,) * 8})),
        adapters={"legal": AdapterEntry("sha256:00", "adapters/legal", 2, LEGAL, ("no", "yes"))},
        inputs=(IDS, MASK, scales) if switchable else (IDS, MASK),
        outputs=(TensorSpec("logits", dtype, ("batch", "sequence", 2)),),
        layout={"propulsion_scales": (Slot("dense", 0, 2, (2,)),)} if switchable else {},
        tools={"torch": "2.11.0"},
    )


def write_artifact(directory, model, manifest):
    """An artifact with its weights in a file beside the graph, and what a real one has besides."""
    directory.mkdir()
    data = "model.onnx.data"
    ir.save(model, directory / "model.onnx", external_data=data, size_threshold_bytes=0)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (directory / "adapters").mkdir()
    (directory / LEGAL).write_bytes(b"scales")
    (directory / BASE_FEEDS).write_bytes(b"ones")
    return Artifact.write(directory, manifest)


@pytest.fixture
def graph():
    return make_graph


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact of a model."""

    def make(model, manifest=None):
        return write_artifact(tmp_path / "onnx", model, manifest or make_manifest())

    return make


@pytest.fixture
def folded(artifact):
    def make(dtype="float32"):
        return artifact(make_graph(FOLDED, dtype), make_manifest(dtype))

    return make


@pytest.fixture
def switchable(artifact):
    def make(dtype="float32"):
        return artifact(make_graph(SWITCHABLE, dtype), make_manifest(dtype, switchable=True))

    return make
