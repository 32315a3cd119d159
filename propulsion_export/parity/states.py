"""The states of a model that are compared, and what an artifact is fed for each."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room, without_scales
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.layout import packed_inputs
from propulsion_export.artifacts.tensor_names import MODULES_INPUT
from propulsion_export.base_model.loading import BaseModel


@dataclass(frozen=True)
class State:
    """One state of the model to be compared.

    Attributes:
        name: the adapter's name, or `base`.
        attach: the adapter to attach.
        unscaled: an adapter to measure its effect against; None if it has none.
    """

    name: str
    attach: Adapter
    unscaled: Adapter | None


def states_of(
    artifact: Artifact, base: BaseModel, adapters: Sequence[Adapter], drawn: Collection[str]
) -> list[State]:
    """Every adapter, and the base model unless it is folded; a drawn identity has no effect."""
    roomy = [with_room(adapter, base.room, base.label_parameters) for adapter in adapters]
    states = [
        State(each.name, each, None if idle else without_scales(each))
        for each in roomy
        for idle in [each.name in drawn and each.is_identity()]
    ]
    if artifact.manifest.mode != "folded" or not adapters:
        states.append(State(BASE_NAME, _default_head(artifact, base), None))
    return states


def _default_head(artifact: Artifact, base: BaseModel) -> Adapter:
    """A head for a base model whose checkpoint has none: the artifact's own default.

    The adapter that it was taken from may have been removed since.
    """
    flat = packed_inputs(artifact, BASE_NAME).get(MODULES_INPUT)
    slots = artifact.manifest.layout.get(MODULES_INPUT, ())
    modules = {
        slot.path: flat[slot.offset : slot.offset + slot.length].reshape(slot.shape).astype(float)
        for slot in slots
        if flat is not None and slot.path in base.missing
    }
    return Adapter(BASE_NAME, scales={}, modules=modules)


def feeds_of(artifact: Artifact, name: str, drawn: Mapping[str, Tensors]) -> Tensors:
    """What the artifact is fed for an adapter or the base model; `drawn` takes precedence."""
    if name in drawn:
        return drawn[name]
    manifest = artifact.manifest
    # A switchable graph has defaults inside, and the base case is there to prove them.
    bare = name == BASE_NAME and manifest.kind == "onnx" and manifest.mode == "switchable"
    return {} if bare or manifest.mode == "folded" else artifact.feeds(name)


def effect_of(adapter: Adapter) -> str:
    """A digest of what an adapter does: two with the same compute the same. Ones do nothing."""
    parts = {
        **{f"{path} {s.side}": s.values for path, s in adapter.scales.items()},
        **{f"{path} bias": values for path, values in adapter.biases.items()},
        **{f"{name} module": values for name, values in adapter.modules.items()},
    }
    digest = hashlib.sha256()
    for name, values in sorted(parts.items()):
        if name.endswith(("bias", "module")) or not (values == 1).all():
            digest.update(f"{name} {values.shape} {values.dtype} ".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()
