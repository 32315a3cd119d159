"""Scaled graphs: every slot of a layout is an initializer of its own, all modes still possible.

They stand between the producers of graphs and `graph.modes`, which makes a mode of them. A producer
gives each scale an initializer, read by a Mul behind the output (or before the input) of the scaled
module. This module has the producer that traces with the exporter of transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.layout import Layout, parts_of_one_side
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.random_adapter import random_adapter
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.errors import AdapterError, ToolError
from propulsion_export.graph.sample_outputs import sample_outputs
from propulsion_export.graph.slot_plan import parts_of, slot_name
from propulsion_export.graph.task_graphs import trace_task
from propulsion_export.scaling.attach import attached


@dataclass(frozen=True)
class ScaledGraphs:
    """Graphs in which every slot is an initializer.

    Attributes:
        programs: the graphs by file name, not optimised.
        layout: of the packed inputs; without any, the graphs have no slots.
        defaults: the base model's values of the packed inputs.
        parts: for each packed input, its ranges in their order and without gaps, by the name of
            the initializer. One initializer may hold slots that lie one behind the other, such as
            the scales of packed query, key and value.
    """

    programs: dict[str, ir.Model]
    layout: Layout
    defaults: Tensors
    parts: Mapping[str, Mapping[str, Slot]]


def trace_scaled(base: BaseModel, layout: Layout, defaults: Tensors, *, opset: int) -> ScaledGraphs:
    """Trace the model of `base`, in its dtype, with a placeholder of its own in every slot.

    Args:
        base: the base model.
        layout: of the packed inputs, see `slot_plan.plan_slots`.
        defaults: the base model's values of the packed inputs.
        opset: ONNX opset version.

    Raises:
        AdapterError: no scale, no bias or nothing saved acts on the outputs.
        ToolError: the exporter refused the model, or lost a tensor that acts.
    """
    with _placeholders(base, layout):
        programs = trace_task(base, opset=opset)
    check_unused(base, layout, _lost(programs, layout))
    return ScaledGraphs(programs, layout, defaults, parts_of(layout))


def check_unused(base: BaseModel, layout: Layout, lost: Mapping[str, Sequence[Slot]]) -> None:
    """A tensor may be missing from the graphs only if the task's outputs do not depend on it.

    Args:
        base: the base model.
        layout: of the packed inputs.
        lost: the slots of each packed input that are in no graph.

    Raises:
        AdapterError: no scale, no bias or nothing saved acts on the outputs.
        ToolError: the trace lost a tensor that does.
    """
    for packed, slots in lost.items():
        if len(slots) == len(layout[packed]):
            raise without_effect(base, slots)
    missing = [slot_name(packed, slot) for packed, slots in lost.items() for slot in slots]
    if not missing:
        return
    kept = {p: tuple(s for s in slots if s not in lost[p]) for p, slots in layout.items()}
    with _placeholders(base, kept):
        expected = sample_outputs(base.model, base.task)
        with _placeholders(base, {p: tuple(slots) for p, slots in lost.items()}, seed=2):
            found = sample_outputs(base.model, base.task)
    if any(not np.array_equal(found[name], expected[name], equal_nan=True) for name in expected):
        raise ToolError(*(f"{name}: is in no traced graph, expected in one" for name in missing))


def without_effect(base: BaseModel, slots: Sequence[Slot]) -> AdapterError:
    """The refusal of adapters whose tensors change no output."""
    return AdapterError(
        *(
            f"{slot.path}: does not act on the outputs of {type(base.model).__name__}"
            for slot in slots
        ),
        remedy=f"Is {base.task} the task that the adapter was trained for?",
    )


@contextmanager
def _placeholders(base: BaseModel, layout: Layout, seed: int = 0) -> Iterator[None]:
    """Attach a value of its own for every slot: equal initializers may be merged."""
    with ExitStack() as stack:
        for part in parts_of_one_side(layout):
            stack.enter_context(
                attached(base.model, random_adapter(part, "placeholder", seed=seed))
            )
            seed += 1
        yield


def _lost(programs: Mapping[str, ir.Model], layout: Layout) -> dict[str, list[Slot]]:
    """The slots of each packed input whose tensors are in no traced graph."""
    traced = {name for program in programs.values() for name in program.graph.initializers}
    return {
        packed: [slot for slot in slots if slot_name(packed, slot) not in traced]
        for packed, slots in layout.items()
    }
