"""Plan an export's packed inputs: their layout, the base model's values and the adapters'."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.layout import Layout, labels_in, pack, plan_layout
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.rounding import numpy_dtype, rounded
from propulsion_export.artifacts.tensor_names import BIASES_INPUT, SCALES_INPUT
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.scaling.attach import check_fits, initializer_name


def plan_slots(
    base: BaseModel, slots: Sequence[Adapter], dtype: torch.dtype
) -> tuple[Layout, Tensors]:
    """The layout of the packed inputs, and the base model's values for them, in `dtype`.

    Args:
        base: the base model, its weights not rounded yet.
        slots: adapters that together have a tensor for every slot; the exported ones, or a
            stand-in for those to come.
        dtype: of the packed inputs.

    Raises:
        AdapterError: a tensor does not fit the model, or two adapters give it different shapes.
    """
    model = base.model
    order = [name for name, _ in model.named_modules()]
    order += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    roomy = [with_room(adapter, base.room, base.label_parameters) for adapter in slots]
    for adapter in roomy:
        check_fits(model, adapter)
    layout = plan_layout(roomy, order, base.label_parameters)
    defaults = _defaults(base, roomy[0], layout, numpy_dtype(str(dtype).removeprefix("torch.")))
    return layout, defaults


def feeds_of(adapters: Sequence[Adapter], layout: Layout, defaults: Tensors) -> dict[str, Tensors]:
    """The packed inputs of every adapter and of the base model, by name."""
    feeds = {adapter.name: pack(adapter, layout, defaults) for adapter in adapters}
    return {BASE_NAME: defaults, **feeds}


def default_labels(
    base: BaseModel, slots: Sequence[Adapter], layout: Layout
) -> tuple[str, ...] | None:
    """Class names of the head that the graph has when no adapter is fed."""
    if not base.label_parameters:
        return None
    return base.own_labels if base.own_head else labels_in(slots[0], layout, None)


def slot_name(packed: str, slot: Slot) -> str:
    """The name of a slot's tensor in a scaled graph."""
    if packed == SCALES_INPUT:
        return initializer_name(slot.path, slot.side, len(slot.shape))
    return f"{slot.path}.bias" if packed == BIASES_INPUT else slot.path


def parts_of(layout: Layout) -> Mapping[str, Mapping[str, Slot]]:
    """The slots of each packed input, by the names of their tensors in a scaled graph."""
    return {
        packed: {slot_name(packed, slot): slot for slot in slots}
        for packed, slots in layout.items()
    }


def _defaults(
    base: BaseModel, first: Adapter, layout: Layout, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """The default values of the packed inputs, which are the base model.

    A head that the base model's checkpoint does not have is the first adapter's.
    """
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    defaults = {}
    for packed, slots in layout.items():
        values = np.ones(sum(slot.length for slot in slots), np.float64)
        for slot in slots if packed != SCALES_INPUT else ():
            name = slot_name(packed, slot)
            own = parameters[name].double().numpy()
            if name in base.missing and name in first.modules:
                own = first.modules[name]
            values[slot.offset : slot.offset + slot.length] = own.reshape(-1)
        defaults[packed] = rounded(values, dtype)
    return defaults
