"""An adapter that changes nothing is the base model, bit for bit.

The base model of a switchable graph are the defaults inside the graph; an adapter that lacks a
tensor gets the value that the artifact stores for the base model, and an engine has only those. The
identity is made here without either: scales of 1, and the trained biases and heads of PyTorch's
base model. The kernels that run are the same, whoever gave the values.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.layout import packed_inputs, to_row
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.artifacts.tensor_names import (
    BANK_INPUT,
    IDS_INPUT,
    SCALES_INPUT,
)
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.slot_plan import slot_name
from propulsion_export.parity.matrix.probe import Probe, changed, same_bits
from propulsion_export.parity.reports.report import Check


def check_identity(
    artifact: Artifact, base: BaseModel, probe: Probe, before: Mapping[str, Tensors]
) -> Iterator[Check]:
    """Check the stored values of the base model, and that feeding the identity changes nothing.

    Args:
        artifact: one that takes adapters as inputs.
        base: its base model.
        probe: runs it.
        before: what the states returned, by name; nothing is checked without the base model.
    """
    if BASE_NAME not in before:
        return
    stored = packed_inputs(artifact, BASE_NAME)
    identity = identity_inputs(artifact, base, stored)
    findings = [
        f"{slot.path}: the artifact's value for the base model is not the base model's"
        for packed, slots in artifact.manifest.layout.items()
        for slot in slots
        if not same_bits(_part(stored[packed], slot), _part(identity[packed], slot))
    ]
    names = changed(before[BASE_NAME], probe.run(_feeds(artifact, stored, identity)))
    if names:
        findings.append(f"{', '.join(names)} of the identity are not those of the base model")
    detail = "; ".join(findings) or "scales of 1, fed, are the base model bit for bit"
    yield Check("identity", BASE_NAME, not findings, detail)


def identity_inputs(artifact: Artifact, base: BaseModel, stored: Tensors) -> dict[str, Array]:
    """The packed inputs, [D] each, of an adapter that changes nothing.

    What the base model lacks is taken from `stored`, the artifact's own values: a head that its
    checkpoint has not, and embeddings, whose new rows are arbitrary where adapters brought more.
    """
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    resizable = [base.model.get_input_embeddings(), base.model.get_output_embeddings()]
    arbitrary = {id(module.weight) for module in resizable if hasattr(module, "weight")}
    inputs = {name: np.array(values) for name, values in stored.items()}
    for packed, slots in artifact.manifest.layout.items():
        for slot in slots:
            own: Array = np.ones(slot.shape)
            if packed != SCALES_INPUT:
                name = slot_name(packed, slot)
                if name in base.missing or id(parameters[name]) in arbitrary:
                    continue
                own = parameters[name].detach().cpu().double().numpy()
            _part(inputs[packed], slot)[:] = rounded(own.reshape(-1), inputs[packed].dtype)
    return inputs


def _part(packed: Array, slot: Slot) -> Array:
    return packed[slot.offset : slot.offset + slot.length]


def _feeds(artifact: Artifact, stored: Tensors, identity: Tensors) -> Tensors:
    """The inputs that select the identity: in a bank of its own, behind the base model."""
    if artifact.manifest.mode != "bank":
        return identity
    layout = artifact.manifest.layout
    rows = np.stack([to_row(stored, layout), to_row(identity, layout)])
    return {BANK_INPUT: rows, IDS_INPUT: np.array([1])}
