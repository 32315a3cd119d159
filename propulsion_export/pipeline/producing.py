"""Produce graphs by transformers' exporter or onnxruntime-genai's builder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.manifest import DEFAULT_OPSET, ExecutionProvider, Exporter, Mode
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.environment.stages import stage
from propulsion_export.errors import (
    AdapterError,
    BaseModelError,
    ToolError,
    UnavailableError,
    UsageError,
)
from propulsion_export.graph.build import (
    ExportedGraphs,
    SharedTrace,
    build_bank,
    build_folded,
    build_switchable,
)
from propulsion_export.graph.genai import modes as genai
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.graph.quantisation.quantise import Quantisation
from propulsion_export.graph.sample_outputs import check_computable
from propulsion_export.parity.built_graph import check_base_graph

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
        shared: the trace of transformers' exporter, for all modes of an export.
    """

    base: BaseModel
    slots: Sequence[Adapter]
    adapters: Sequence[Adapter]
    mode: Mode
    dtype: torch.dtype
    shared: SharedTrace = field(default_factory=SharedTrace)


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
    provider = options.execution_provider
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
        reason = _ASKED if options.exporter == "genai" else f"for {provider}"
        return _by_genai(wanted, options, reason)
    try:
        return _by_genai(wanted, options, "its graph is the model's, for ONNX Runtime")
    except (AdapterError, BaseModelError, ToolError, UnavailableError, UsageError) as error:
        # What is wrong with the adapter or the model itself is refused below once more.
        return _by_transformers(wanted, options, next(iter(error.findings), str(error)))


def _by_transformers(wanted: Wanted, options: GraphOptions, reason: str) -> Produced:
    base, slots, adapters, dtype = wanted.base, wanted.slots, wanted.adapters, wanted.dtype
    quantisation = options.quantisation
    opset = _opset(options)
    if wanted.mode == "folded":
        graphs = build_folded(
            base,
            next(iter(adapters), None),
            dtype,
            opset=opset,
            untie=options.untie,
            quantisation=quantisation,
            shared=wanted.shared,
        )
    else:
        build = build_switchable if wanted.mode == "switchable" else build_bank
        graphs = build(
            base,
            slots,
            adapters,
            dtype,
            opset=opset,
            quantisation=quantisation,
            shared=wanted.shared,
        )
    return Produced(graphs, base.model, "transformers", reason)


def _opset(options: GraphOptions) -> int:
    """The opset of the graph: the default is raised where quantised weights need a newer one.

    Raises:
        UsageError: an older one than they need is asked for.
    """
    needed = options.quantisation.opset if options.quantisation else options.opset
    if options.opset not in (DEFAULT_OPSET, max(options.opset, needed)):
        raise UsageError(
            f"--opset: found {options.opset}, expected {needed} or newer for weights quantised so",
            remedy="Leave it out.",
        )
    return max(options.opset, needed)


def _by_genai(wanted: Wanted, options: GraphOptions, reason: str) -> Produced:
    base, slots, adapters = wanted.base, wanted.slots, wanted.adapters
    request = _request(wanted, options)
    with stage(f"build {wanted.mode} by onnxruntime-genai's builder"):
        if wanted.mode == "folded":
            first = next(iter(adapters), None)
            made = genai.build_folded(base, first, request, untie=options.untie)
        elif wanted.mode == "switchable":
            made = genai.build_switchable(base, slots, adapters, request)
        else:
            made = genai.build_bank(base, slots, adapters, request)
    return Produced(made.exported, made.model, "genai", reason, made.write_config)


def _request(wanted: Wanted, options: GraphOptions) -> genai.Request:
    """What the builder is asked for; what it has no choice of is refused."""
    scheme = options.quantisation.scheme if options.quantisation else None
    found = []
    if options.opset != DEFAULT_OPSET:
        found.append(
            f"--opset: {options.opset}, of which onnxruntime-genai's builder has no choice"
        )
    if scheme is not None and scheme.form != "matmulnbits":
        found.append(
            f"--quantization-form: {scheme.form}, where onnxruntime-genai's builder has matmulnbits"
        )
    if found:
        raise UsageError(*found, remedy="Leave it out, or give --exporter transformers.")
    provider = options.execution_provider
    if provider == "cuda" and wanted.dtype == torch.float32:
        raise UsageError(
            "--execution-provider: cuda in float32, for which onnxruntime-genai's builder writes a "
            "graph without a cache; expected float16 or bfloat16",
            remedy="Give --dtype float16.",
        )
    build = GenaiOptions(provider)
    if scheme is not None:
        build = GenaiOptions(provider, scheme.bits, scheme.block_size, scheme.accuracy_level)
    if provider != "cpu":
        return genai.Request(wanted.dtype, build)
    return genai.Request(wanted.dtype, build, check_base_graph)
