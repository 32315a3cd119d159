"""Write what belongs into the directory of an ONNX artifact."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.file_names import ADAPTERS, GRAPH_FILE
from propulsion_export.artifacts.layout import labels_in, to_row
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    Dtype,
    ExecutionProvider,
    GraphEntry,
    Manifest,
    Mode,
    QuantizationEntry,
)
from propulsion_export.base_model.config import save_config
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TaskName
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.stages import stage
from propulsion_export.graph.build import ExportedGraphs
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.signature import signature
from propulsion_export.graph.slot_plan import default_labels
from propulsion_export.pipeline.prepared_base import PreparedBase
from propulsion_export.pipeline.producing import Produced
from propulsion_export.pipeline.text_files import TextFiles


@dataclass(frozen=True)
class Exported:
    """What the directories of all modes of an export have in common.

    Attributes:
        source: the base model as it was named.
        adapters: the exported adapters.
        texts: the tokenizer and its files.
        dtype: of weights that are not quantised, and of activations.
        scheme: how weights are quantised; None if they are not.
        execution_provider: of ONNX Runtime, that the graphs are for.
    """

    source: str
    adapters: Sequence[Adapter]
    texts: TextFiles
    dtype: Dtype
    scheme: QuantizationEntry | None
    execution_provider: ExecutionProvider


def write_artifact(
    exported: Exported, prepared: PreparedBase, produced: Produced, directory: Path
) -> Artifact:
    """Write the graphs of one mode with all their files into an empty directory."""
    base, settled, graphs = prepared.base, prepared.settled, produced.graphs
    labels = default_labels(base, prepared.slots, graphs.layout)
    recorded = BaseEntry(exported.source, prepared.fingerprint, labels, base.own_head, settled.base)
    entries = _adapter_entries(exported, prepared, graphs, labels)
    texts = exported.texts
    with stage("write"):
        _write(produced, directory, exported.dtype, entries)
        texts.write(directory, settled.settings, graphs.mode)
        texts.record(directory, settled.settings)
        if produced.write_config is not None:
            produced.write_config(directory)
        manifest = replace(
            _manifest(graphs, base, recorded, entries, exported.dtype),
            exporter=produced.exporter,
            execution_provider=exported.execution_provider,
            quantization=exported.scheme,
        )
        return Artifact.write(directory, manifest)


def _adapter_entries(
    exported: Exported,
    prepared: PreparedBase,
    graphs: ExportedGraphs,
    labels: tuple[str, ...] | None,
) -> dict[str, AdapterEntry]:
    base, adapters = prepared.base, exported.adapters
    room = base.room if base.own_head else None
    classes = [labels_in(read, graphs.layout, labels, room) for read in adapters]
    problem_types = prepared.settled.adapters
    entries = _entries(adapters, graphs.mode, classes, problem_types)
    templates = {name: exported.texts.template_of(name, graphs.mode) for name in entries}
    return {name: replace(entry, chat_template=templates[name]) for name, entry in entries.items()}


def _entries(
    adapters: Sequence[Adapter],
    mode: Mode,
    classes: Sequence[tuple[str, ...] | None],
    problem_types: Sequence[ProblemType | None],
) -> dict[str, AdapterEntry]:
    each = zip(adapters, classes, problem_types, strict=True)
    return {
        read.name: AdapterEntry(
            digest=read.digest,
            source=read.source,
            size=read.size,
            file=f"{ADAPTERS}/{read.name}.safetensors" if mode == "switchable" else None,
            labels=labels,
            problem_type=problem_type,
        )
        for read, labels, problem_type in each
    }


def _manifest(
    exported: ExportedGraphs,
    base: BaseModel,
    recorded: BaseEntry,
    entries: dict[str, AdapterEntry],
    dtype: Dtype,
) -> Manifest:
    graphs = {name: GraphEntry(*signature(program)) for name, program in exported.programs.items()}
    only = graphs.pop(GRAPH_FILE, GraphEntry((), ()))
    return Manifest(
        kind="onnx",
        mode=exported.mode,
        task=TaskName(base.task),
        dtype=dtype,
        base=recorded,
        adapters={} if exported.mode == "bank" else entries,
        inputs=only.inputs,
        outputs=only.outputs,
        graphs=graphs,
        layout=dict(exported.layout),
        tools=tool_versions(),
    )


def _write(
    produced: Produced, directory: Path, dtype: str, entries: dict[str, AdapterEntry]
) -> None:
    """Everything in an artifact's directory but its manifest and what reads texts."""
    graphs = produced.graphs
    write_graphs(graphs.programs, directory)
    save_config(produced.model, directory, dtype, for_graph=True)
    if graphs.mode == "bank":
        _write_bank(graphs, directory, entries)
    else:
        _write_feeds(graphs, directory)


def _write_feeds(graphs: ExportedGraphs, directory: Path) -> None:
    from safetensors.numpy import save_file

    if graphs.feeds:
        (directory / ADAPTERS).mkdir()
    for name, feeds in graphs.feeds.items():
        save_file(dict(feeds), directory / ADAPTERS / f"{name}.safetensors")


def _write_bank(graphs: ExportedGraphs, directory: Path, entries: dict[str, AdapterEntry]) -> None:
    bank = Bank.create(directory, to_row(graphs.feeds[BASE_NAME], graphs.layout))
    for name, entry in entries.items():
        bank.add(name, to_row(graphs.feeds[name], graphs.layout), entry)
