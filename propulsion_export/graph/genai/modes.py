"""Finished graphs of onnxruntime-genai's builder: folded, switchable or a bank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.layout import Layout, pack
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.artifacts.tensor_names import BIASES_INPUT, ROWS_INPUT, SCALES_INPUT
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
from propulsion_export.graph.quantisation.folding import FoldScales
from propulsion_export.graph.slot_plan import feeds_of, parts_of, plan_slots
from propulsion_export.scaling.fold.model import fold_


@dataclass(frozen=True)
class Request:
    """How a graph is to be built.

    Attributes:
        dtype: of activations, and of weights that are not quantised.
        options: of the builder.
        check: called with the graph before any adapter is in it; raises if it is not the model.
    """

    dtype: torch.dtype
    options: GenaiOptions = field(default_factory=GenaiOptions)
    check: Callable[[BaseGraph], None] = lambda graph: None

    def base_graph(self, model: PreTrainedModel) -> BaseGraph:
        """The graph of a model, checked."""
        graph = base_graph(model, self.dtype, self.options)
        self.check(graph)
        return graph


@dataclass(frozen=True)
class GenaiGraphs:
    """A finished graph.

    Attributes:
        exported: as transformers' exporter would give it.
        model: what it was built from, with the adapter folded in if the weights have it.
        write_config: writes `genai_config.json` into a directory that has the tokenizer.
    """

    exported: ExportedGraphs
    model: PreTrainedModel
    write_config: Callable[[Path], None]


def build_folded(
    base: BaseModel, adapter: Adapter | None, request: Request, *, untie: bool
) -> GenaiGraphs:
    """Fold the adapter, if there is one, into a copy of the model and build that.

    The model of `base` stays as it is, here and in the other modes. If weights are quantised, the
    base model's are, and the adapter is folded into the quantisation scales.
    """
    if adapter is not None and request.options.bits is not None:
        return _folded_into_integers(base, adapter, request)
    model = shared_copy(base.model)
    if adapter is not None:
        fold_(model, adapter, dtype=request.dtype, untie=untie)
    return _finished(request.base_graph(model), "folded", {}, {})


def build_switchable(
    base: BaseModel, slots: Sequence[Adapter], adapters: Sequence[Adapter], request: Request
) -> GenaiGraphs:
    """Build the graph of `base` with everything that adapters bring as optional packed inputs.

    Args:
        base: the base model.
        slots: adapters that together have a tensor for every slot.
        adapters: the exported ones; may be none.
        request: how to build it.
    """
    graph, layout, defaults, inside = _scaled(base, slots, request)
    for packed, parts in parts_of(inside).items():
        PackInitializers(packed, parts)(graph.program)
    SetDefaults(defaults)(graph.program)
    return _finished(graph, "switchable", layout, feeds_of(adapters, layout, defaults))


def build_bank(
    base: BaseModel, slots: Sequence[Adapter], adapters: Sequence[Adapter], request: Request
) -> GenaiGraphs:
    """Build the graph of `base` so that each row of a batch chooses its adapter from a bank.

    Arguments are those of `build_switchable`.
    """
    graph, layout, defaults, inside = _scaled(base, slots, request)
    parts = {name: slot for each in parts_of(inside).values() for name, slot in each.items()}
    SliceRows(ROWS_INPUT, parts)(graph.program)
    GatherRows(ROWS_INPUT)(graph.program)
    return _finished(graph, "bank", layout, feeds_of(adapters, layout, defaults))


def _folded_into_integers(base: BaseModel, adapter: Adapter, request: Request) -> GenaiGraphs:
    graph, layout, defaults, inside = _scaled(base, [adapter], request)
    exact = {packed: values.astype(np.float64) for packed, values in defaults.items()}
    packed_values = pack(adapter, layout, exact)
    found = {
        packed: {
            name: packed_values[packed][slot.offset : slot.offset + slot.length]
            for name, slot in parts.items()
        }
        for packed, parts in parts_of(inside).items()
    }
    FoldScales(found.get(SCALES_INPUT, {}), found.get(BIASES_INPUT, {}))(graph.program)
    return _finished(graph, "folded", {}, {})


def _scaled(
    base: BaseModel, slots: Sequence[Adapter], request: Request
) -> tuple[BaseGraph, Layout, Tensors, Layout]:
    """The graph, the layout of the packed inputs, their defaults, and the layout in the graph."""
    graph = request.base_graph(shared_copy(base.model))
    beside = neighbours(graph.nodes, base.model, slots)
    layout, defaults = plan_slots(base, [*slots, beside] if beside else slots, request.dtype)
    return graph, layout, defaults, graph.insert_slots_(layout)


def _finished(
    graph: BaseGraph, mode: Mode, layout: Layout, feeds: dict[str, Tensors]
) -> GenaiGraphs:
    exported = ExportedGraphs(mode, {GRAPH_FILE: graph.program}, layout, feeds)
    return GenaiGraphs(exported, graph.model, graph.write_config)
