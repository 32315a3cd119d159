"""Finished graphs of onnxruntime-genai's builder: folded, switchable or a bank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.layout import Layout
from propulsion_export.artifacts.tensor_names import ROWS_INPUT
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.build import ExportedGraphs
from propulsion_export.graph.genai.base import BaseGraph, base_graph
from propulsion_export.graph.genai.builder import shared_copy
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.graph.genai.scaled import neighbours
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.gather_rows import GatherRows
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.graph.passes.slice_rows import SliceRows
from propulsion_export.graph.slot_plan import feeds_of, parts_of, plan_slots
from propulsion_export.scaling.fold.model import fold_


@dataclass(frozen=True)
class GenaiGraphs:
    """A finished graph.

    Attributes:
        exported: as transformers' exporter would give it.
        model: what it was built from, with the adapter folded in if the graph has it so.
        write_config: writes `genai_config.json` into a directory that has the tokenizer.
    """

    exported: ExportedGraphs
    model: PreTrainedModel
    write_config: Callable[[Path], None]


def build_folded(
    base: BaseModel,
    adapter: Adapter | None,
    dtype: torch.dtype,
    options: GenaiOptions,
    *,
    untie: bool,
) -> GenaiGraphs:
    """Fold the adapter, if there is one, into a copy of the model, in `dtype`, and build that.

    The model of `base` stays as it is, here and in the other modes.
    """
    model = shared_copy(base.model)
    if adapter is not None:
        fold_(model, adapter, dtype=dtype, untie=untie)
    graph = base_graph(model, dtype, options)
    exported = ExportedGraphs("folded", {GRAPH_FILE: graph.program}, {}, {})
    return GenaiGraphs(exported, graph.model, graph.write_config)


def build_switchable(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    options: GenaiOptions,
) -> GenaiGraphs:
    """Build the graph of `base` with everything that adapters bring as optional packed inputs."""
    graph, layout, defaults, inside = _scaled(base, slots, dtype, options)
    program = graph.program
    for packed, parts in parts_of(inside).items():
        PackInitializers(packed, parts)(program)
    SetDefaults(defaults)(program)
    feeds = feeds_of(adapters, layout, defaults)
    exported = ExportedGraphs("switchable", {GRAPH_FILE: program}, layout, feeds)
    return GenaiGraphs(exported, graph.model, graph.write_config)


def build_bank(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    options: GenaiOptions,
) -> GenaiGraphs:
    """Build the graph of `base` so that each row of a batch chooses its adapter from a bank."""
    graph, layout, defaults, inside = _scaled(base, slots, dtype, options)
    program = graph.program
    parts = {name: slot for each in parts_of(inside).values() for name, slot in each.items()}
    SliceRows(ROWS_INPUT, parts)(program)
    GatherRows(ROWS_INPUT)(program)
    feeds = feeds_of(adapters, layout, defaults)
    exported = ExportedGraphs("bank", {GRAPH_FILE: program}, layout, feeds)
    return GenaiGraphs(exported, graph.model, graph.write_config)


def _scaled(
    base: BaseModel, slots: Sequence[Adapter], dtype: torch.dtype, options: GenaiOptions
) -> tuple[BaseGraph, Layout, Tensors, Layout]:
    """The graph, the layout of the packed inputs, their defaults, and the layout in the graph."""
    graph = base_graph(shared_copy(base.model), dtype, options)
    beside = neighbours(graph.nodes, base.model, slots)
    layout, defaults = plan_slots(base, [*slots, beside] if beside else slots, dtype)
    return graph, layout, defaults, graph.insert_slots_(layout)
