"""`onnx --from`: adapters folded into copies of an artifact's graphs, without a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.provenance import check_base
from propulsion_export.adapters.settings import problem_type_of
from propulsion_export.adapters.specification import check_identity, read_adapters
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import check_head, check_task
from propulsion_export.artifacts.consistency import check_consistent
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.manifest import AdapterEntry, GraphEntry, Manifest
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.environment.stages import stage
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.graph.files import write_beside_shared, write_graphs
from propulsion_export.graph.refolding.programs import SourceGraphs
from propulsion_export.graph.refolding.verifying import RecordedGraph, verify_graphs
from propulsion_export.graph.signature import signature
from propulsion_export.pipeline.folded_files import FoldedFiles
from propulsion_export.pipeline.places import Places

Runtime = Literal["any", "tensorrt"]


@dataclass(frozen=True)
class FoldOptions:
    """How to fold into an artifact's graphs; the fields are parameters of `fold_onnx`."""

    share: bool = False
    untie: bool = False
    for_runtime: Runtime = "any"
    verify: bool = False
    trust_remote_code: bool = False


def fold_onnx(
    adapter: Sequence[str | Path],
    output: Path,
    *,
    from_artifact: Path | str,
    share: bool = False,
    untie: bool = False,
    for_runtime: Runtime = "any",
    verify: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Artifact]:
    """Fold adapters into copies of an ONNX artifact, without its base model and without a trace.

    The weights of the graph are multiplied in float64 and rounded once to the graph's dtype; of
    quantised weights only the scales change.

    Args:
        adapter: directories, or `NAME=DIR`; one or more.
        output: the directory of the folded artifact; for several adapters that of a directory each,
            by their names, which appear together or not at all.
        from_artifact: a switchable artifact of the adapters' base model, or a folded one without
            an adapter. It is read once.
        share: leave weights that do not change in the file of `from_artifact`: cloned where the
            file system can, else hard-linked. ONNX Runtime and TensorRT read such files, onnx.load
            and onnx.checker refuse those with several hard links, of both artifacts.
        untie: copy a weight that is scaled and that something else reads as well.
        for_runtime: `tensorrt`: the graph is for engines, so negative scales and zeros change the
            integers of quantised weights, where they have a counterpart, and no multiply by a sign
            is left.
        verify: read the output again: every digest, every weight and node as it was folded.
        force: replace an earlier output.
        trust_remote_code: run code that the tokenizer brings.
        progress: called with the share done and what is being done.

    Returns:
        The artifacts by the adapters' names.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    adapters = read_adapters(adapter)
    if not adapters:
        raise UsageError("--from: no adapter is given, expected one or more with -a")
    for read in adapters:
        check_identity(read)
    sources = {read.name: read.source for read in adapters}
    inputs = (*sources.values(), str(from_artifact))
    places = Places(output, list(sources), "onnx", force, inputs)
    places.check()
    progress(0.05, f"reading {from_artifact}")
    artifact = Artifact.read(from_artifact)
    _check_source(artifact)
    if for_runtime == "tensorrt":
        _check_engine(artifact)
    for read in adapters:
        _check_adapter(artifact, read)
    with stage("read"):
        graphs = SourceGraphs.read(artifact, trust_remote_code=trust_remote_code)
    options = FoldOptions(share, untie, for_runtime, verify, trust_remote_code)
    written = {}
    with places.staged() as staged:
        for number, read in enumerate(adapters):
            progress(0.1 + 0.9 * number / len(adapters), f"folding {read.name}{_note(artifact)}")
            folding = _Folding(artifact, graphs, read, sources[read.name], options)
            written[read.name] = folding.write(staged[read.name])
    progress(1.0, f"wrote {output}")
    return {name: each.at(places.by_name[name]) for name, each in written.items()}


@dataclass(frozen=True)
class _Folding:
    """One adapter on its way into the graphs of an artifact."""

    artifact: Artifact
    graphs: SourceGraphs
    adapter: Adapter
    source: str
    options: FoldOptions

    def write(self, directory: Path) -> Artifact:
        """Write the folded artifact into an empty directory."""
        with stage(f"fold {self.adapter.name}"):
            signs = self.options.for_runtime == "tensorrt"
            folded = self.graphs.fold(self.adapter, untie=self.options.untie, signs=signs)
        programs = folded.programs
        recorded = self._recorded(programs)
        entry = self._entry()
        known = {}
        with stage(f"write {self.adapter.name}"):
            if self.options.share:
                linked = write_beside_shared(programs, self.artifact.directory, directory)
                known = {name: self.artifact.manifest.files[name] for name in linked}
            else:
                write_graphs(programs, directory)
            labels = entry.labels or self.graphs.labels_of(self.adapter)
            beside = FoldedFiles(self.artifact, self.adapter, entry, labels, folded.untied)
            beside.write(directory, trust_remote_code=self.options.trust_remote_code)
            entries = {name: GraphEntry(*signature(each)) for name, each in programs.items()}
            artifact = Artifact.write(directory, self._manifest(entries, entry), digests=known)
        if self.options.verify:
            with stage(f"verify {self.adapter.name}"):
                verify_graphs(artifact, recorded)
        return artifact

    def _recorded(self, programs: Mapping[str, ir.Model]) -> dict[str, RecordedGraph]:
        """The graphs as they are before they are written, if they are read again."""
        each = programs.items() if self.options.verify else ()
        return {name: RecordedGraph.of(program) for name, program in each}

    def _entry(self) -> AdapterEntry:
        manifest = self.artifact.manifest
        own = manifest.base.labels if manifest.base.own_head else None
        labels = labels_in(self.adapter, {}, own, self.graphs.labels_of(self.adapter))
        classifies = TASKS[manifest.task].prediction == "class"
        kind = problem_type_of(self.adapter, manifest.base.problem_type) if classifies else None
        return AdapterEntry(self.adapter.digest, self.source, self.adapter.size, None, labels, kind)

    def _manifest(self, graphs: dict[str, GraphEntry], entry: AdapterEntry) -> Manifest:
        base = self.artifact.manifest.base
        if not base.own_head:
            base = replace(base, labels=entry.labels, problem_type=entry.problem_type)
        only = graphs.pop(GRAPH_FILE, GraphEntry((), ()))
        return replace(
            self.artifact.manifest,
            mode="folded",
            base=base,
            adapters={self.adapter.name: entry},
            inputs=only.inputs,
            outputs=only.outputs,
            graphs=graphs,
            layout={},
            tools=tool_versions(),
        )


def _check_source(artifact: Artifact) -> None:
    """Refuse what no adapter can be folded into.

    Raises:
        ArtifactError: naming what it is.
    """
    manifest, where = artifact.manifest, f"--from {artifact.shown}"
    expected = "expected an ONNX artifact that is switchable, or folded without an adapter"
    remedy = "Export one: propulsion-export onnx -m MODEL --mode switchable -o DIR"
    if manifest.kind == "merged":
        raise ArtifactError(f"{where}: is a merged checkpoint, {expected}", remedy=remedy)
    if manifest.kind == "engine":
        remedy = "Give the ONNX artifact that it was built from, and build its result with `trt`."
        raise ArtifactError(f"{where}: is an engine, {expected}", remedy=remedy)
    if manifest.mode == "bank":
        raise ArtifactError(f"{where}: is a bank, {expected}", remedy=remedy)
    if manifest.mode == "folded" and manifest.adapters:
        found = ", ".join(manifest.adapters)
        raise ArtifactError(f"{where}: has {found} folded in, {expected}", remedy=remedy)
    check_consistent(artifact.directory, manifest)


def _check_engine(artifact: Artifact) -> None:
    """Refuse graphs that TensorRT has no operators for.

    Raises:
        ArtifactError: naming what they have.
    """
    quantised = artifact.manifest.quantization
    if artifact.manifest.exporter == "genai":
        found, option = "the operators of onnxruntime-genai's builder", "--exporter transformers"
    elif quantised is not None and quantised.form != "qdq":
        found, option = f"weights in the form {quantised.form}", "--quantization-form qdq"
    else:
        return
    raise ArtifactError(
        f"--for tensorrt: {artifact.shown} has {found}, which TensorRT does not take",
        remedy=f"Export the source with {option}.",
    )


def _check_adapter(artifact: Artifact, adapter: Adapter) -> None:
    """Refuse an adapter of another base model, of another task, or that is in it already."""
    manifest = artifact.manifest
    check_task(manifest, adapter)
    check_head(manifest, adapter)
    if Path(manifest.base.source).is_dir():  # it may be gone, and a hub is not asked here
        check_not_merged(manifest.base.source, [adapter])
    check_base(
        manifest.base.fingerprint,
        str(artifact.directory),
        [adapter],
        remedy="Give an artifact of the model that it was trained on with --from.",
    )


def _note(artifact: Artifact) -> str:
    """What to tell people about weights that were rounded before the fold."""
    manifest = artifact.manifest
    stored, graph = manifest.base.fingerprint.dtype, manifest.dtype
    if numpy_dtype(stored).itemsize <= numpy_dtype(graph).itemsize or manifest.quantization:
        return ""
    return f", into weights that were rounded from {stored} to {graph} before"
