"""Build the finished graphs of an export: a producer, perhaps quantisation, a mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.layout import Layout, width_of
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.artifacts.tensor_names import MODULES_INPUT, ROWS_INPUT, SCALES_INPUT
from propulsion_export.base_model.dtypes import cast_
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.environment.stages import stage
from propulsion_export.graph.modes import (
    can_become_bank,
    can_fold,
    gathered,
    parameters_of,
    to_bank,
    to_folded,
    to_quantised_folded,
    to_switchable,
)
from propulsion_export.graph.quantisation.quantise import Quantisation
from propulsion_export.graph.sample_inputs import TRACED_ROWS
from propulsion_export.graph.scaled import ScaledGraphs, trace_scaled, without_effect
from propulsion_export.graph.slot_plan import feeds_of, plan_slots
from propulsion_export.graph.task_graphs import trace_task
from propulsion_export.scaling.attach_rows import attached_rows, check_possible, scaled_elsewhere
from propulsion_export.scaling.fold.model import fold_


@dataclass
class SharedTrace:
    """One trace that serves several modes of an export; the first mode that needs it makes it.

    Attributes:
        model: what was traced; its weights are those of the graphs.
        scaled: the graphs, quantised if the export is.
    """

    model: torch.nn.Module | None = None
    scaled: ScaledGraphs | None = None

    def serving(self, model: torch.nn.Module, layout: Layout) -> ScaledGraphs | None:
        """The graphs, if they are those of `model`, or of its equal, with this layout."""
        if self.model is None or self.scaled is None or self.scaled.layout != layout:
            return None
        return self.scaled if model is self.model or can_fold(self.model, model) else None


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
    base: BaseModel,
    adapter: Adapter | None,
    dtype: torch.dtype,
    *,
    opset: int,
    untie: bool,
    quantisation: Quantisation | None = None,
    shared: SharedTrace | None = None,
) -> ExportedGraphs:
    """Fold the adapter, if there is one, into the model of `base`, in `dtype`, and trace that.

    With a quantisation, the base model is traced and quantised, and the adapter is folded into the
    quantisation scales. The trace of another mode is used if the weights fit it.
    """
    shared = shared or SharedTrace()
    if quantisation is not None:
        programs = _folded_into_integers(base, adapter, dtype, opset, quantisation, shared)
        return ExportedGraphs("folded", programs, {}, {})
    with stage("fold"):
        if adapter is None:
            cast_(base.model, dtype)
        else:
            fold_(base.model, adapter, dtype=dtype, untie=untie)
    if shared.model is not None and can_fold(shared.model, base.model):
        assert shared.scaled is not None
        programs = to_folded(shared.scaled, parameters_of(base.model))
    else:
        programs = to_folded(_without_slots(base, opset))
    return ExportedGraphs("folded", programs, {}, {})


def _without_slots(base: BaseModel, opset: int) -> ScaledGraphs:
    return ScaledGraphs(trace_task(base, opset=opset), {}, {}, {})


def build_switchable(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    *,
    opset: int,
    quantisation: Quantisation | None = None,
    shared: SharedTrace | None = None,
) -> ExportedGraphs:
    """Trace `base` in `dtype` with everything that adapters bring as optional packed inputs.

    Args:
        base: the base model.
        slots: adapters that together have a tensor for every slot; the exported ones, or a
            stand-in for those to come.
        adapters: the exported ones; may be none.
        dtype: of weights and activations.
        opset: ONNX opset version.
        quantisation: of each graph's weights, before it gets its mode.
        shared: the trace of other modes, used or made.
    """
    layout, defaults = plan_slots(base, slots, dtype)
    cast_(base.model, dtype)
    scaled = _scaled(base, layout, defaults, opset, quantisation, shared or SharedTrace())
    feeds = feeds_of(adapters, layout, defaults)
    return ExportedGraphs("switchable", to_switchable(scaled), layout, feeds)


def build_bank(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    *,
    opset: int,
    quantisation: Quantisation | None = None,
    shared: SharedTrace | None = None,
) -> ExportedGraphs:
    """Trace `base` in `dtype` so that each row of a batch chooses its adapter from a bank.

    Where the scaled graphs cannot become a bank, see `modes.can_become_bank`, the rows are attached
    to the model and it is traced again. Arguments are those of `build_switchable`.
    """
    layout, defaults = plan_slots(base, slots, dtype)
    check_possible(base.model, layout)
    cast_(base.model, dtype)
    programs = None
    if set(layout) == {SCALES_INPUT} and not scaled_elsewhere(layout):
        scaled = _scaled(base, layout, defaults, opset, quantisation, shared or SharedTrace())
        programs = to_bank(scaled) if can_become_bank(scaled) else None
    if programs is None:
        programs = _trace_rows(base, layout, opset=opset)
        _quantise(programs, layout, quantisation)
        programs = {name: gathered(program) for name, program in programs.items()}
    return ExportedGraphs("bank", programs, layout, feeds_of(adapters, layout, defaults))


def _scaled(
    base: BaseModel,
    layout: Layout,
    defaults: Tensors,
    opset: int,
    quantisation: Quantisation | None,
    shared: SharedTrace,
) -> ScaledGraphs:
    """The shared trace, or one that is shared from now on."""
    if (scaled := shared.serving(base.model, layout)) is None:
        scaled = trace_scaled(base, layout, defaults, opset=opset)
        _quantise(scaled.programs, layout, quantisation)
        shared.model, shared.scaled = base.model, scaled
    return scaled


def _trace_rows(base: BaseModel, layout: Layout, *, opset: int) -> dict[str, ir.Model]:
    """Graphs that read the rows of a bank from one more input, by file name."""
    rows = torch.ones((TRACED_ROWS, width_of(layout)), dtype=base.model.dtype)
    with attached_rows(base.model, layout):
        programs = trace_task(base, opset=opset, extra={ROWS_INPUT: rows})
    if not any(_reads_rows(program) for program in programs.values()):
        raise without_effect(base, [slot for each in layout.values() for slot in each])
    return programs


def _reads_rows(program: ir.Model) -> bool:
    """Whether the outputs depend on the adapters of the batch; nodes that do not count go."""
    RemoveUnusedNodesPass()(program)
    return any(value.name == ROWS_INPUT and value.uses() for value in program.graph.inputs)


def _quantise(
    programs: Mapping[str, ir.Model], layout: Layout, quantisation: Quantisation | None
) -> None:
    """Quantise the base model's weights, in place; what adapters save whole stays as it is."""
    if quantisation is None:
        return
    saved = {slot.path for slot in layout.get(MODULES_INPUT, ())}
    with stage("quantise"):
        for program in programs.values():
            quantisation.apply_(program, saved)


def _folded_into_integers(
    base: BaseModel,
    adapter: Adapter | None,
    dtype: torch.dtype,
    opset: int,
    quantisation: Quantisation,
    shared: SharedTrace,
) -> dict[str, ir.Model]:
    if adapter is None:
        cast_(base.model, dtype)
        scaled = _without_slots(base, opset)
        _quantise(scaled.programs, {}, quantisation)
        return to_folded(scaled)
    layout, defaults = plan_slots(base, [adapter], dtype)
    cast_(base.model, dtype)
    scaled = _scaled(base, layout, defaults, opset, quantisation, shared)
    roomy = with_room(adapter, base.room, base.label_parameters)
    return to_quantised_folded(scaled, roomy)
