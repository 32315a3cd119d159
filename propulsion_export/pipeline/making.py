"""The finished graph of an export: an adapter folded into it, or several to switch between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Tensors, numpy_dtype
from propulsion_export.layout import Layout, pack, plan_layout
from propulsion_export.manifest import (
    BASE_NAME,
    BIASES_INPUT,
    MODULES_INPUT,
    SCALES_INPUT,
    Mode,
    Slot,
)
from propulsion_export.pipeline.inputs import labels_of, with_room
from propulsion_export.rounding import rounded
from propulsion_export.scales import Scale

if TYPE_CHECKING:
    import onnx_ir as ir

    from propulsion_export.base import Base


@dataclass(frozen=True)
class Made:
    """A finished graph, and for a switchable one the layout and every adapter's feeds."""

    program: "ir.Model"
    layout: Layout
    feeds: dict[str, Tensors]


def make_folded(base: "Base", adapter: Adapter, dtype: Any, *, opset: int, untie: bool) -> Made:
    """Fold the adapter into the model of `base`, in `dtype`, and trace that."""
    from propulsion_export.fold.memory import fold_
    from propulsion_export.graph.finishing import optimise

    fold_(base.model, adapter, dtype=dtype, untie=untie)
    return Made(optimise(_trace(base, opset)), {}, {})


def make_switchable(base: "Base", adapters: Sequence[Adapter], dtype: Any, *, opset: int) -> Made:
    """Trace `base` in `dtype` with all that the adapters bring as optional packed inputs."""
    from propulsion_export.attach import attached, check_fits
    from propulsion_export.graph.finishing import SetDefaults, optimise
    from propulsion_export.graph.packing import PackInitializers

    model = base.model
    order = [name for name, _ in model.named_modules()]
    order += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    room = labels_of(adapters, base.label_parameters)
    roomy = [with_room(adapter, room, base.label_parameters) for adapter in adapters]
    for adapter in roomy:
        check_fits(model, adapter)
    layout = plan_layout(roomy, order, base.label_parameters)
    defaults = _defaults(base, roomy[0], layout, numpy_dtype(str(dtype).removeprefix("torch.")))
    model.to(dtype)
    with attached(model, _placeholder(layout)):
        program = _trace(base, opset)
    for packed, slots in layout.items():
        PackInitializers(packed, {_initializer(packed, slot): slot for slot in slots})(program)
    program = optimise(program)
    SetDefaults(defaults)(program)
    feeds = {adapter.name: pack(adapter, layout, defaults) for adapter in adapters}
    return Made(program, layout, {BASE_NAME: defaults, **feeds})


def _trace(base: "Base", opset: int) -> "ir.Model":
    from propulsion_export.graph.dimensions import NameDimensions
    from propulsion_export.sampling import input_names, trace_inputs
    from propulsion_export.trace import trace

    config = base.model.config
    names = input_names(type(base.model), config)
    program = trace(base.model, trace_inputs(names, config), opset=opset)
    NameDimensions()(program)
    return program


def _defaults(
    base: "Base", first: Adapter, layout: Layout, dtype: "np.dtype[Any]"
) -> dict[str, Any]:
    """What the packed inputs hold when nobody feeds them: the base model.

    A head that the base model's checkpoint does not have is the first adapter's.
    """
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    defaults = {}
    for packed, slots in layout.items():
        values = np.ones(sum(slot.length for slot in slots), np.float64)
        for slot in slots if packed != SCALES_INPUT else ():
            name = _initializer(packed, slot)
            own = parameters[name].double().numpy()
            if name in base.missing and name in first.modules:
                own = first.modules[name]
            values[slot.offset : slot.offset + slot.length] = own.reshape(-1)
        defaults[packed] = rounded(values, dtype)
    return defaults


def default_labels(base: "Base", adapters: Sequence[Adapter], mode: Mode) -> tuple[str, ...] | None:
    """Class names of the head that `_defaults` chose."""
    if mode != "switchable" or not base.label_parameters:
        return None
    if base.label_parameters & base.missing:
        return adapters[0].labels
    return base.own_labels


def _placeholder(layout: Layout) -> Adapter:
    """An adapter with a value of its own in every slot.

    The exporter makes one initializer of equal ones, so ones would leave too few of them.
    """
    chooser = np.random.default_rng(0)
    values = {
        packed: {slot: chooser.uniform(0.5, 1.5, slot.shape) for slot in slots}
        for packed, slots in layout.items()
    }
    scales = values.get(SCALES_INPUT, {})
    return Adapter(
        name="placeholder",
        scales={slot.path: Scale(drawn, slot.side) for slot, drawn in scales.items()},
        biases={slot.path: drawn for slot, drawn in values.get(BIASES_INPUT, {}).items()},
        modules={slot.path: drawn for slot, drawn in values.get(MODULES_INPUT, {}).items()},
    )


def _initializer(packed: str, slot: Slot) -> str:
    """What a slot's tensor is called in the traced graph."""
    from propulsion_export.attach import BUFFERS

    if packed == SCALES_INPUT:
        return f"{slot.path}.{BUFFERS[slot.side]}"
    return f"{slot.path}.bias" if packed == BIASES_INPUT else slot.path
