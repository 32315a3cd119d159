"""Quantised checkpoints of one safetensors file, merged and written the simple way."""

import json
import shutil

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.tensor_files import stored_tensors
from propulsion_export.merging.changes import Dropped
from propulsion_export.merging.quantised.folding import quantised_changes
from propulsion_export.merging.quantised.layouts import find_layout
from quantised_checkpoints import as_torch, written


def opened(directory):
    """The layout of a checkpoint, and its tensors."""
    tensors = stored_tensors(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    return find_layout(config["quantization_config"], tensors), tensors


def write_merged(base, directory, scales):
    """Write a checkpoint with scales, by module path, folded in."""
    layout, tensors = opened(base)
    adapter = Adapter(name="tuned", scales={path: Scale(scales[path]) for path in scales})
    changes = quantised_changes(adapter, layout, tensors)
    shutil.copytree(base, directory)
    file = directory / "model.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    values = load_file(file)
    for name, change in changes.items():
        if isinstance(change, Dropped):
            del values[name]
        else:
            values[name] = as_torch(written(change))
    save_file(values, file, metadata)
    set_quantization(directory, dict(layout.settings()))


def set_quantization(directory, settings):
    """Change the settings of the quantisation in config.json."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= settings
    (directory / "config.json").write_text(json.dumps(config))


def random_scales(directory, seed=3):
    """Scales for every quantised module of a checkpoint, one in four of them negative."""
    layout, tensors = opened(directory)
    chooser = np.random.default_rng(seed)
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    widths = {path: layout.shape(path)[0] for path in paths if layout.has(path)}
    return {
        path: chooser.uniform(0.5, 1.5, width) * chooser.choice([1, 1, 1, -1], width)
        for path, width in widths.items()
    }


def attach(model, scales):
    """Multiply the outputs of each module."""
    for path, scale in scales.items():
        factor = torch.from_numpy(scale).float()
        model.get_submodule(path).register_forward_hook(
            lambda _, __, output, factor=factor: output * factor
        )
    return model


def logits(model):
    """Of some tokens, float64."""
    with torch.no_grad():
        return model(torch.arange(1, 25).reshape(2, 12)).logits.double().numpy()


def distance(ours, theirs):
    """The largest difference, as a part of the largest logit."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
