"""Build the finished graphs of an export: folded, switchable or a bank."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES, GRAPH_FILE
from propulsion_export.artifacts.layout import (
    Layout,
    labels_in,
    pack,
    parts_of_one_side,
    plan_layout,
    width_of,
)
from propulsion_export.artifacts.manifest import Mode, Slot
from propulsion_export.artifacts.random_adapter import random_adapter
from propulsion_export.artifacts.rounding import numpy_dtype, rounded
from propulsion_export.artifacts.tensor_names import (
    BIASES_INPUT,
    ROWS_INPUT,
    SCALES_INPUT,
)
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import AdapterError, ToolError
from propulsion_export.graph.eos_pooling import reading_own_eos
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.cache import NameCache
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.passes.float32_detours import ComputeInFloat32
from propulsion_export.graph.passes.gather_rows import GatherRows
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.graph.sample_inputs import TRACED_ROWS
from propulsion_export.graph.sample_outputs import sample_outputs, task_inputs
from propulsion_export.graph.trace import trace, trace_decoder, trace_encoder_decoder
from propulsion_export.scaling.attach import attached, check_fits, initializer_name
from propulsion_export.scaling.attach_rows import attached_rows
from propulsion_export.scaling.fold.model import fold_


@dataclass(frozen=True)
class ExportedGraphs:
    """Finished graphs by file name.

    Attributes:
        mode: how they hold the adapters.
        programs: the graphs.
        layout: of the packed inputs; empty when folded.
        feeds: the packed inputs of every adapter and of the base model; empty when folded.
    """

    mode: Mode
    programs: dict[str, ir.Model]
    layout: Layout
    feeds: dict[str, Tensors]


def build_folded(
    base: BaseModel, adapter: Adapter | None, dtype: torch.dtype, *, opset: int, untie: bool
) -> ExportedGraphs:
    """Fold the adapter, if there is one, into the model of `base`, in `dtype`, and trace that."""
    if adapter is None:
        base.model.to(dtype)
    else:
        fold_(base.model, adapter, dtype=dtype, untie=untie)
    traced = _trace(base, opset)
    programs = {name: optimise(program) for name, program in traced.items()}
    return ExportedGraphs("folded", programs, {}, {})


def build_switchable(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    *,
    opset: int,
) -> ExportedGraphs:
    """Trace `base` in `dtype` with everything that adapters bring as optional packed inputs.

    Args:
        base: the base model.
        slots: adapters that together have a tensor for every slot; the exported ones, or a
            stand-in for those to come.
        adapters: the exported ones; may be none.
        dtype: of weights and activations.
        opset: ONNX opset version.
    """
    layout, defaults = _plan(base, slots, dtype)
    base.model.to(dtype)
    with _placeholders(base, layout):
        programs = _trace(base, opset)
    _check_unused(base, layout, _lost(programs, layout))
    _pack(programs, layout)
    programs = {name: optimise(program) for name, program in programs.items()}
    for program in programs.values():
        inputs = {value.name for value in program.graph.inputs}
        SetDefaults({name: v for name, v in defaults.items() if name in inputs})(program)
    return ExportedGraphs("switchable", programs, layout, _feeds(adapters, layout, defaults))


def build_bank(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    *,
    opset: int,
) -> ExportedGraphs:
    """Trace `base` in `dtype` so that each row of a batch chooses its adapter from a bank.

    Arguments are those of `build_switchable`.
    """
    layout, defaults = _plan(base, slots, dtype)
    base.model.to(dtype)
    rows = torch.ones((TRACED_ROWS, width_of(layout)), dtype=dtype)
    with attached_rows(base.model, layout):
        programs = _trace(base, opset, {ROWS_INPUT: rows})
    if not any(_reads_rows(program) for program in programs.values()):
        raise _without_effect(base, [slot for each in layout.values() for slot in each])
    for name, program in programs.items():
        GatherRows(ROWS_INPUT)(program)
        programs[name] = optimise(program)
    return ExportedGraphs("bank", programs, layout, _feeds(adapters, layout, defaults))


def _reads_rows(program: ir.Model) -> bool:
    """Whether the outputs depend on the adapters of the batch; nodes that do not count go."""
    RemoveUnusedNodesPass()(program)
    return any(value.name == ROWS_INPUT and value.uses() for value in program.graph.inputs)


@contextmanager
def _placeholders(base: BaseModel, layout: Layout, seed: int = 0) -> Iterator[None]:
    """Attach a value of its own for every slot: the exporter merges initializers that are equal."""
    with ExitStack() as stack:
        for part in parts_of_one_side(layout):
            stack.enter_context(
                attached(base.model, random_adapter(part, "placeholder", seed=seed))
            )
            seed += 1
        yield


def _plan(base: BaseModel, slots: Sequence[Adapter], dtype: torch.dtype) -> tuple[Layout, Tensors]:
    """The layout of the packed inputs, and the base model's values for them."""
    model = base.model
    order = [name for name, _ in model.named_modules()]
    order += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    roomy = [with_room(adapter, base.room, base.label_parameters) for adapter in slots]
    for adapter in roomy:
        check_fits(model, adapter)
    layout = plan_layout(roomy, order, base.label_parameters)
    defaults = _defaults(base, roomy[0], layout, numpy_dtype(str(dtype).removeprefix("torch.")))
    return layout, defaults


def _feeds(adapters: Sequence[Adapter], layout: Layout, defaults: Tensors) -> dict[str, Tensors]:
    feeds = {adapter.name: pack(adapter, layout, defaults) for adapter in adapters}
    return {BASE_NAME: defaults, **feeds}


def _trace(
    base: BaseModel, opset: int, extra: Mapping[str, torch.Tensor] | None = None
) -> dict[str, ir.Model]:
    """Trace the graphs of a task, by file name, their inputs and dimensions named.

    `extra`: further inputs of the model, by name.
    """
    config, more = base.model.config, extra or {}
    architecture = TASKS[base.task].architecture
    if architecture == "decoder":
        prompt = task_inputs(base.model, base.task)
        programs = {GRAPH_FILE: trace_decoder(base.model, prompt, opset=opset, extra=more)}
        _name_cache(base, programs[GRAPH_FILE])
    elif architecture == "encoder-decoder":
        inputs = task_inputs(base.model, base.task)
        programs = trace_encoder_decoder(base.model, inputs, opset=opset, extra=more)
        for name in ENCODER_DECODER_FILES[1:]:
            _name_cache(base, programs[name])
    else:
        inputs = task_inputs(base.model, base.task)
        pooled = pools_at_eos(config, base.task)
        with reading_own_eos(base.model) if pooled else nullcontext():
            programs = {GRAPH_FILE: trace(base.model, inputs, opset=opset, extra=more)}
    for program in programs.values():
        NameDimensions()(program)
        if base.model.dtype != torch.bfloat16:
            ComputeInFloat32()(program)
    return programs


def _name_cache(base: BaseModel, program: ir.Model) -> None:
    try:
        NameCache()(program)
    except ir.passes.PostconditionError as error:
        raise ToolError(
            f"{type(base.model).__name__}: is no decoder that fills a cache ({error})",
            remedy=f"Is {base.task} the right task for {base.source}?",
        ) from error


def _lost(programs: Mapping[str, ir.Model], layout: Layout) -> dict[str, list[Slot]]:
    """The slots of each packed input whose tensors are in no traced graph."""
    traced = {name for program in programs.values() for name in program.graph.initializers}
    return {
        packed: [slot for slot in slots if _initializer(packed, slot) not in traced]
        for packed, slots in layout.items()
    }


def _check_unused(base: BaseModel, layout: Layout, lost: Mapping[str, Sequence[Slot]]) -> None:
    """A tensor may be missing from the graphs only if the task's outputs do not depend on it.

    Raises:
        AdapterError: no scale, no bias or nothing saved acts on the outputs.
        ToolError: the trace lost a tensor that does.
    """
    for packed, slots in lost.items():
        if len(slots) == len(layout[packed]):
            raise _without_effect(base, slots)
    missing = [_initializer(packed, slot) for packed, slots in lost.items() for slot in slots]
    if not missing:
        return
    kept = {p: tuple(s for s in slots if s not in lost[p]) for p, slots in layout.items()}
    with _placeholders(base, kept):
        expected = sample_outputs(base.model, base.task)
        with _placeholders(base, {p: tuple(slots) for p, slots in lost.items()}, seed=2):
            found = sample_outputs(base.model, base.task)
    if any(not np.array_equal(found[name], expected[name], equal_nan=True) for name in expected):
        raise ToolError(*(f"{name}: is in no traced graph, expected in one" for name in missing))


def _without_effect(base: BaseModel, slots: Sequence[Slot]) -> AdapterError:
    return AdapterError(
        *(
            f"{slot.path}: does not act on the outputs of {type(base.model).__name__}"
            for slot in slots
        ),
        remedy=f"Is {base.task} the task that the adapter was trained for?",
    )


def _pack(programs: dict[str, ir.Model], layout: Layout) -> None:
    """Pack each graph's part of the layout; what no graph computes with has an idle slot."""
    for packed, slots in layout.items():
        parts = {_initializer(packed, slot): slot for slot in slots}
        for program in programs.values():
            PackInitializers(packed, parts, partial=True)(program)


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
            name = _initializer(packed, slot)
            own = parameters[name].double().numpy()
            if name in base.missing and name in first.modules:
                own = first.modules[name]
            values[slot.offset : slot.offset + slot.length] = own.reshape(-1)
        defaults[packed] = rounded(values, dtype)
    return defaults


def default_labels(
    base: BaseModel, slots: Sequence[Adapter], layout: Layout
) -> tuple[str, ...] | None:
    """Class names of the head that the graph has when no adapter is fed."""
    if not base.label_parameters:
        return None
    return base.own_labels if base.own_head else labels_in(slots[0], layout, None)


def _initializer(packed: str, slot: Slot) -> str:
    """The name of a slot's tensor in the traced graph."""
    if packed == SCALES_INPUT:
        return initializer_name(slot.path, slot.side, len(slot.shape))
    return f"{slot.path}.bias" if packed == BIASES_INPUT else slot.path
