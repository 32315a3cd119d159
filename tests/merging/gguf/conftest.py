"""Adapters for every module of a GGUF file's model."""

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.scaling.layer_rules import layer_kind, output_width


@pytest.fixture(scope="session", name="every_module")
def make_every_module(random_adapter):
    """A function: scales for every module that has a rule, the norms and an untied head too."""

    def make(model, *, kinds=("linear", "conv1d", "norm"), biases=True, seed=1):
        found = random_adapter(model, seed=seed, biases=biases, embeddings="embedding" in kinds)
        chooser = np.random.default_rng(seed)
        head = model.get_output_embeddings()
        tied = bool(model.all_tied_weights_keys)
        scales = dict(found.scales)
        for path, module in model.named_modules():
            if layer_kind(module) in kinds and not (tied and module is head):
                values = chooser.uniform(0.5, 1.5, output_width(module)).astype(np.float32)
                scales.setdefault(path, Scale(values.astype(np.float64)))
        return Adapter("every", scales, biases=found.biases)

    return make


@pytest.fixture(name="saved")
def make_saved(tmp_path):
    """A function: write an adapter, and give its directory."""

    def save(adapter, name="tuned"):
        directory = tmp_path / name
        directory.mkdir()
        adapter.write(directory)
        return directory

    return save
