"""Produce graphs by transformers' exporter or onnxruntime-genai's builder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.layout import to_row
from propulsion_export.artifacts.manifest import DEFAULT_OPSET, Exporter, Mode
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.errors import (
    AdapterError,
    BaseModelError,
    ToolError,
    UnavailableError,
    UsageError,
)
from propulsion_export.graph.build import (
    ExportedGraphs,
    build_bank,
    build_folded,
    build_switchable,
)
from propulsion_export.graph.genai import modes as genai
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.graph.sample_outputs import check_computable
from propulsion_export.parity.built_graph import check_built_graph

ExporterChoice = Literal["auto", "transformers", "genai"]
_ASKED = "asked for"
EXPORTERS: tuple[ExporterChoice, ...] = ("auto", "transformers", "genai")


@dataclass(frozen=True)
class GraphOptions:
    """How a graph is produced.

    Attributes:
        exporter: `auto` takes onnxruntime-genai's builder where its graph is the model's and has
            room for the adapters, else transformers' exporter.
        opset: ONNX opset version of transformers' exporter.
        untie: give a scaled weight that is shared with another module a copy of its own.
        execution_provider: of ONNX Runtime, that a graph of the builder is for.
        quantisation: of the base model's weights.
    """

    exporter: ExporterChoice = "auto"
    opset: int = DEFAULT_OPSET
    untie: bool = False
    execution_provider: ExecutionProvider = "cpu"
    quantisation: Quantisation | None = None


@dataclass(frozen=True)
class Produced:
    """Graphs, and what produced them.

    Attributes:
        graphs: the finished graphs.
        model: what they compute, in the state they were produced from.
        exporter: what produced them.
        reason: why it was chosen.
        write_config: writes the builder's configuration of onnxruntime-genai into a directory that
            has the tokenizer; None for graphs of transformers' exporter.
    """

    graphs: ExportedGraphs
    model: PreTrainedModel
    exporter: Exporter
    reason: str
    write_config: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Wanted:
    """What a graph shall compute.

    Attributes:
        base: the base model; transformers' exporter leaves it in `dtype`, folded in mode `folded`.
        slots: adapters that together have a tensor for every slot.
        adapters: the exported ones; may be none.
        mode: how the graph holds the adapters.
        dtype: of weights and activations.
    """

    base: BaseModel
    slots: Sequence[Adapter]
    adapters: Sequence[Adapter]
    mode: Mode
    dtype: torch.dtype


def produce(wanted: Wanted, options: GraphOptions) -> Produced:
    """Produce the graphs of a base model with adapters.

    A graph of the builder for the CPU is compared with PyTorch before it is returned; what the
    other execution providers compute is not run.

    Raises:
        UsageError: an option does nothing with this exporter.
        BaseModelError: PyTorch's side of a comparison is not possible; not with `genai`.
        PropulsionExportError: as the exporters say. With `auto`, transformers' exporter produces
            what the builder refuses, unless an execution provider is asked for.
    """
    provider = options.genai.execution_provider
    if options.exporter != "genai":
        check_computable(wanted.base)
    if options.exporter == "transformers":
        if provider != "cpu":
            raise UsageError(
                f"--execution-provider: {provider} is for the graphs of onnxruntime-genai's "
                "builder, found --exporter transformers",
                remedy="Leave one of them out.",
            )
        return _by_transformers(wanted, options, _ASKED)
    if options.exporter == "genai" or provider != "cpu":
        return _by_genai(wanted, options, _ASKED)
    try:
        return _by_genai(wanted, options, "its graph is the model's, for ONNX Runtime")
    except (AdapterError, BaseModelError, ToolError, UnavailableError, UsageError) as error:
        # What is wrong with the adapter or the model itself is refused below once more.
        return _by_transformers(wanted, options, next(iter(error.findings), str(error)))


def _by_transformers(wanted: Wanted, options: GraphOptions, reason: str) -> Produced:
    base, slots, adapters, dtype = wanted.base, wanted.slots, wanted.adapters, wanted.dtype
    opset = options.opset
    if wanted.mode == "folded":
        first = next(iter(adapters), None)
        graphs = build_folded(base, first, dtype, opset=opset, untie=options.untie)
    else:
        build = build_switchable if wanted.mode == "switchable" else build_bank
        graphs = build(base, slots, adapters, dtype, opset=opset)
    return Produced(graphs, base.model, "transformers", reason)


def _by_genai(wanted: Wanted, options: GraphOptions, reason: str) -> Produced:
    base, slots, adapters, dtype = wanted.base, wanted.slots, wanted.adapters, wanted.dtype
    if options.opset != DEFAULT_OPSET:
        raise UsageError(
            f"--opset: {options.opset}, which onnxruntime-genai's builder has no choice of",
            remedy="Leave it out, or give --exporter transformers.",
        )
    if wanted.mode == "folded":
        first = next(iter(adapters), None)
        made = genai.build_folded(base, first, dtype, options.genai, untie=options.untie)
    else:
        modes = {"switchable": genai.build_switchable, "bank": genai.build_bank}
        made = modes[wanted.mode](base, slots, adapters, dtype, options.genai)
    if options.genai.execution_provider == "cpu":
        program = made.exported.programs[GRAPH_FILE]
        check_built_graph(made.model, program, _base_feeds(made.exported))
    return Produced(made.exported, made.model, "genai", reason, made.write_config)


def _base_feeds(graphs: ExportedGraphs) -> Tensors:
    """What a graph requires besides tokens to compute as the base model."""
    if graphs.mode != "bank":
        return {}
    row = to_row(graphs.feeds[BASE_NAME], graphs.layout)
    return {BANK_INPUT: row[None], IDS_INPUT: np.zeros(1, np.int64)}
