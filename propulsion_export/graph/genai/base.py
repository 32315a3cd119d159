"""The graph of a base model by onnxruntime-genai's builder, mended, and with slots in it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from propulsion_export.artifacts.layout import Layout
from propulsion_export.artifacts.manifest import Dtype
from propulsion_export.base_model.dtypes import cast_
from propulsion_export.graph.genai.builder import build_graph, check_possible
from propulsion_export.graph.genai.mends import mend_graph_
from propulsion_export.graph.genai.nodes import Nodes
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.graph.genai.scaled import insert_slots_
from propulsion_export.graph.passes.dimensions import (
    BATCH,
    PAST_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
)

_DIMENSIONS = {
    "batch_size": BATCH,
    "sequence_length": SEQUENCE,
    "past_sequence_length": PAST_SEQUENCE,
    "total_sequence_length": TOTAL_SEQUENCE,
}
_WIDTH = "kv_cache_dim"  # the builder's name for the width of a head in the cache


@dataclass(frozen=True)
class BaseGraph:
    """The graph of a base model.

    Attributes:
        model: what it was built from, cast to `dtype`.
        program: the graph; its weights are those of `model`, which must live on.
        nodes: its nodes by module path.
        dtype: of weights that are not quantised, and of activations.
        write_config: writes `genai_config.json` into a directory that has the tokenizer and the
            generation settings.
    """

    model: PreTrainedModel
    program: ir.Model
    nodes: Nodes
    dtype: Dtype
    write_config: Callable[[Path], None]

    def insert_slots_(self, layout: Layout) -> Layout:
        """Put the slots of a layout into the graph; see `scaled.insert_slots_`."""
        return insert_slots_(self.nodes, layout, self.dtype)


def base_graph(model: PreTrainedModel, dtype: torch.dtype, options: GenaiOptions) -> BaseGraph:
    """Build the graph of a model, which is cast to `dtype`, and mend what is known to be wrong.

    Raises:
        UnavailableError: onnxruntime-genai is missing.
        UsageError: the execution provider has no kernels for `dtype`.
        ToolError: the builder does not know the model, or fails on it.
    """
    name: Dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    check_possible(model, name, options)
    cast_(model, dtype)
    built = build_graph(model, name, options)
    nodes = Nodes(model, built.program)
    mend_graph_(nodes, model, name)
    _name_dimensions_(built.program, built.head_size)
    return BaseGraph(model, built.program, nodes, name, built.write_config)


def scaled_graph(
    model: PreTrainedModel, layout: Layout, dtype: torch.dtype, options: GenaiOptions
) -> tuple[ir.Model, Layout]:
    """The graph of a base model with an initializer for each slot of a layout.

    Returns:
        The graph, and the layout with one slot for each initializer: modules that the graph
        computes in one node have one together.

    Raises:
        AdapterError: a slot has no node.
        PropulsionExportError: as `base_graph` says.
    """
    graph = base_graph(model, dtype, options)
    return graph.program, graph.insert_slots_(layout)


def _name_dimensions_(program: ir.Model, head_size: int) -> None:
    """Call dimensions as in other graphs; the width of the cache becomes a number.

    A layer whose cache is as long as its sliding window keeps the builder's name for the length.
    """
    for value in (*program.graph.inputs, *program.graph.outputs):
        if value.shape is not None:
            named = (_named(dimension, head_size) for dimension in value.shape)
            value.shape = ir.Shape(list(named))


def _named(dimension: int | ir.SymbolicDim, head_size: int) -> int | str | None:
    if isinstance(dimension, int):
        return dimension
    name = str(dimension.value)
    return head_size if name == _WIDTH else _DIMENSIONS.get(name, name)
