"""Adapters written by hand, as PEFT lays them out."""

import json

import numpy as np
from safetensors.numpy import save_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY, DENSE = "encoder.0.query", "encoder.0.dense"
Z = {
    QUERY: np.array([1.5, -0.5, 2.0], np.float32),
    DENSE: np.array([0.25, 3.0], np.float32),
}
CONFIGURATION = {
    "peft_type": "PROPULSION",
    "degree": 3,
    "base_model_name_or_path": "some/base",
    "task_type": "SEQ_CLS",
    "labels": ["no", "yes"],
    "base_fingerprint": {"dtype": "float32", "entries": {"weight": [0.5] * 8}},
}


def tensors_of(vectors=Z, suffix="propulsion_z"):
    return {f"{PREFIX}{path}.{suffix}": values for path, values in vectors.items()}


def write(directory, config=(), tensors=None):
    """A PEFT directory by hand."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(CONFIGURATION | dict(config)))
    save_file(tensors_of() if tensors is None else tensors, directory / WEIGHTS)
    return directory


def an_adapter(**changes):
    parts = {
        "name": "a",
        "scales": {QUERY: Scale(np.array([1.5, 2.0])), DENSE: Scale(np.array([0.5]))},
        "biases": {QUERY: np.array([1.0, 2.0], np.float32)},
        "modules": {"head.weight": np.array([[1.0, 2.0]], np.float32)},
    }
    return Adapter(**(parts | changes))
