"""The finished graph of an export: an adapter folded into it, several to switch between, a bank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Tensors
from propulsion_export.errors import ToolError
from propulsion_export.layout import Layout, labels_in, pack, plan_layout, width_of
from propulsion_export.manifest import (
    BASE_NAME,
    BIASES_INPUT,
    ENCODER_DECODER_FILES,
    GRAPH_FILE,
    MODULES_INPUT,
    SCALES_INPUT,
    Mode,
    Slot,
)
from propulsion_export.pipeline.inputs import with_room
from propulsion_export.rounding import numpy_dtype, rounded
from propulsion_export.scales import Scale

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from propulsion_export.base import Base


@dataclass(frozen=True)
class Made:
    """Finished graphs by file name.

    Attributes:
        mode: what they are.
        programs: the graphs.
        layout: of what an adapter feeds; empty when folded.
        feeds: the packed inputs of every adapter and of the base model; empty when folded.
    """

    mode: Mode
    programs: dict[str, "ir.Model"]
    layout: Layout
    feeds: dict[str, Tensors]


def make_folded(base: "Base", adapter: Adapter, dtype: Any, *, opset: int, untie: bool) -> Made:
    """Fold the adapter into the model of `base`, in `dtype`, and trace that."""
    from propulsion_export.fold.memory import fold_
    from propulsion_export.graph.finishing import optimise

    fold_(base.model, adapter, dtype=dtype, untie=untie)
    traced = _trace(base, opset)
    programs = {name: optimise(program) for name, program in traced.items()}
    return Made("folded", programs, {}, {})


def make_switchable(base: "Base", adapters: Sequence[Adapter], dtype: Any, *, opset: int) -> Made:
    """Trace `base` in `dtype` with all that the adapters bring as optional packed inputs."""
    from propulsion_export.attach import attached
    from propulsion_export.graph.finishing import SetDefaults, optimise

    layout, defaults = _plan(base, adapters, dtype)
    base.model.to(dtype)
    with attached(base.model, _placeholder(layout)):
        programs = _trace(base, opset)
    _pack(programs, layout)
    programs = {name: optimise(program) for name, program in programs.items()}
    for program in programs.values():
        inputs = {value.name for value in program.graph.inputs}
        SetDefaults({name: v for name, v in defaults.items() if name in inputs})(program)
    return Made("switchable", programs, layout, _feeds(adapters, layout, defaults))


def make_bank(base: "Base", adapters: Sequence[Adapter], dtype: Any, *, opset: int) -> Made:
    """Trace `base` in `dtype` so that each row of a batch chooses its adapter from a bank."""
    import torch

    from propulsion_export.graph.finishing import optimise
    from propulsion_export.graph.rows import GatherRows
    from propulsion_export.rows import ROWS_INPUT, attached_rows
    from propulsion_export.sampling import TRACED_ROWS

    layout, defaults = _plan(base, adapters, dtype)
    base.model.to(dtype)
    rows = torch.ones((TRACED_ROWS, width_of(layout)), dtype=dtype)
    with attached_rows(base.model, layout):
        programs = _trace(base, opset, {ROWS_INPUT: rows})
    for name, program in programs.items():
        GatherRows(ROWS_INPUT)(program)
        programs[name] = optimise(program)
    return Made("bank", programs, layout, _feeds(adapters, layout, defaults))


def _plan(base: "Base", adapters: Sequence[Adapter], dtype: Any) -> tuple[Layout, Tensors]:
    """Where everything of any adapter lies, and what lies there of the base model."""
    from propulsion_export.attach import check_fits

    model = base.model
    order = [name for name, _ in model.named_modules()]
    order += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    roomy = [with_room(adapter, base.room, base.label_parameters) for adapter in adapters]
    for adapter in roomy:
        check_fits(model, adapter)
    layout = plan_layout(roomy, order, base.label_parameters)
    defaults = _defaults(base, roomy[0], layout, numpy_dtype(str(dtype).removeprefix("torch.")))
    return layout, defaults


def _feeds(adapters: Sequence[Adapter], layout: Layout, defaults: Tensors) -> dict[str, Tensors]:
    feeds = {adapter.name: pack(adapter, layout, defaults) for adapter in adapters}
    return {BASE_NAME: defaults, **feeds}


def _trace(
    base: "Base", opset: int, extra: Mapping[str, "torch.Tensor"] | None = None
) -> dict[str, "ir.Model"]:
    """The graphs of a task, by file name, with the inputs and dimensions they are known by.

    `extra` are inputs that the model takes besides those of its task.
    """
    from propulsion_export import sampling, trace
    from propulsion_export.graph.dimensions import NameDimensions

    config, more = base.model.config, extra or {}
    names = sampling.input_names(type(base.model), config)
    if base.task == "text-generation":
        prompt = sampling.trace_prompt(config)
        programs = {GRAPH_FILE: trace.trace_decoder(base.model, prompt, opset=opset, extra=more)}
        _name_cache(base, programs[GRAPH_FILE])
    elif base.task == "text2text-generation":
        inputs = sampling.trace_inputs(names, config)
        programs = trace.trace_encoder_decoder(base.model, inputs, opset=opset, extra=more)
        for name in ENCODER_DECODER_FILES[1:]:
            _name_cache(base, programs[name])
    else:
        inputs = sampling.trace_inputs(names, config)
        programs = {GRAPH_FILE: trace.trace(base.model, inputs, opset=opset, extra=more)}
    for program in programs.values():
        NameDimensions()(program)
    return programs


def _name_cache(base: "Base", program: "ir.Model") -> None:
    import onnx_ir as ir

    from propulsion_export.graph.cache import NameCache

    try:
        NameCache()(program)
    except ir.passes.PostconditionError as error:
        raise ToolError(
            f"{type(base.model).__name__}: is no decoder that fills a cache ({error})",
            remedy=f"Is {base.task} the right task for {base.source}?",
        ) from error


def _pack(programs: dict[str, "ir.Model"], layout: Layout) -> None:
    """Pack each graph's part of the layout; every slot has to be in one of them."""
    from propulsion_export.graph.packing import PackInitializers

    several = len(programs) > 1
    for packed, slots in layout.items():
        parts = {_initializer(packed, slot): slot for slot in slots}
        lost = parts.keys() - {
            name for program in programs.values() for name in program.graph.initializers
        }
        if lost:
            raise ToolError(
                *(f"{name}: is in no traced graph, expected in one" for name in sorted(lost))
            )
        for program in programs.values():
            PackInitializers(packed, parts, partial=several)(program)


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


def default_labels(base: "Base", first: Adapter, layout: Layout) -> tuple[str, ...] | None:
    """Class names of the head that `_defaults` chose."""
    if not base.label_parameters:
        return None
    return base.own_labels if base.own_head else labels_in(first, layout, None)


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
    from propulsion_export.attach import initializer_name

    if packed == SCALES_INPUT:
        return initializer_name(slot.path, slot.side, len(slot.shape))
    return f"{slot.path}.bias" if packed == BIASES_INPUT else slot.path
