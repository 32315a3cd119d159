"""Draw a random adapter for the parity of an artifact that has slots and no adapter yet."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.layout import pack, packed_inputs, parts_of_one_side, to_row
from propulsion_export.artifacts.random_adapter import random_adapter
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS

RANDOM_NAME = "random"
# The base model with a random head, where it has none of its own: with zeros nothing would show.
IDENTITY_NAME = "identity"


def draw_adapters(artifact: Artifact, seed: int) -> list[Adapter]:
    """Random adapters for the slots of an artifact; none if it has no inputs for adapters."""
    manifest = artifact.manifest
    inputs = [*manifest.inputs, *(i for graph in manifest.graphs.values() for i in graph.inputs)]
    if not {spec.name for spec in inputs} & {*PACKED_INPUTS, BANK_INPUT}:
        return []
    names = (RANDOM_NAME, f"{RANDOM_NAME}-inputs")
    drawn = [
        random_adapter(part, name, seed=seed)
        for name, part in zip(names, parts_of_one_side(manifest.layout), strict=False)
    ]
    if manifest.base.own_head:
        return drawn
    first = drawn[0]
    ones = {path: scale._replace(values=scale.values**0) for path, scale in first.scales.items()}
    return [*drawn, replace(first, name=IDENTITY_NAME, scales=ones, biases={})]


def feeds_for_drawn(artifact: Artifact, drawn: Sequence[Adapter]) -> dict[str, Tensors]:
    """Inputs of the drawn adapters, and in a bank of the base model too, by name."""
    layout, base = artifact.manifest.layout, packed_inputs(artifact, BASE_NAME)
    packed = {adapter.name: pack(adapter, layout, base) for adapter in drawn}
    if artifact.manifest.mode != "bank":
        return dict(packed)
    rows = {BASE_NAME: base, **packed}
    bank = np.stack([to_row(feeds, layout) for feeds in rows.values()])
    return {name: {BANK_INPUT: bank, IDS_INPUT: np.array([row])} for row, name in enumerate(rows)}
