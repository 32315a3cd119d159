"""A merged checkpoint of one safetensors file, written the simple way."""

import json
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from propulsion_export.base_model.tensor_files import DTYPES, stored_tensors
from propulsion_export.merging.changes import Dropped, Given


def read_base(find, directory):
    """The layout that `find` sees in a checkpoint."""
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    return find(settings, stored_tensors(directory / "model.safetensors"))


def write_merged(layout, base, directory, scales):
    """Copy a checkpoint with the scales, by module path, folded in; the changes, by name."""
    changes = {}
    for path, scale in scales.items():
        changes |= layout.scaled(path, scale)
    shutil.copytree(base, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        if isinstance(change, Dropped):
            del tensors[name]
        else:
            tensors[name] = as_torch(change)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    save_file(tensors, file, metadata)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = dict(layout.settings())
    (directory / "config.json").write_text(json.dumps(config))
    return changes


def as_torch(change):
    """The torch tensor that a change writes."""
    assert isinstance(change, Given), change
    values = change.values
    if values.dtype == DTYPES["BF16"]:
        return torch.from_numpy(values.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())
