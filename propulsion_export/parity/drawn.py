"""Draw a random adapter for the parity of an artifact that has slots and no adapter yet."""

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.layout import pack, packed_inputs, to_row
from propulsion_export.artifacts.random_adapter import random_adapter
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS

RANDOM_NAME = "random"


def draw_adapter(artifact: Artifact, seed: int) -> Adapter | None:
    """A random adapter for the slots of an artifact; None if it has no inputs for adapters."""
    manifest = artifact.manifest
    inputs = [*manifest.inputs, *(i for graph in manifest.graphs.values() for i in graph.inputs)]
    if not {spec.name for spec in inputs} & {*PACKED_INPUTS, BANK_INPUT}:
        return None
    return random_adapter(manifest.layout, RANDOM_NAME, seed=seed)


def feeds_for_drawn(artifact: Artifact, drawn: Adapter) -> dict[str, Tensors]:
    """Inputs of the drawn adapter, and in a bank of the base model too, by name."""
    layout, base = artifact.manifest.layout, packed_inputs(artifact, BASE_NAME)
    packed = pack(drawn, layout, base)
    if artifact.manifest.mode != "bank":
        return {drawn.name: packed}
    bank = np.stack([to_row(base, layout), to_row(packed, layout)])
    return {
        name: {BANK_INPUT: bank, IDS_INPUT: np.array([row])}
        for row, name in enumerate((BASE_NAME, drawn.name))
    }
