"""Does the manifest say of the graph what the graph is?"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from propulsion_export.artifact import Artifact
from propulsion_export.decoding import PAST
from propulsion_export.errors import ArtifactError
from propulsion_export.layout import width_of
from propulsion_export.manifest import (
    BANK_INPUT,
    GRAPH_FILE,
    PACKED_INPUTS,
    Dtype,
    GraphEntry,
    Manifest,
    TensorSpec,
)

if TYPE_CHECKING:
    import onnx_ir as ir

# Of tasks whose outputs have one form in every architecture: name and number of dimensions.
_OUTPUTS: dict[str, tuple[str, int]] = {
    "text-classification": ("logits", 2),
    "token-classification": ("logits", 3),
    "fill-mask": ("logits", 3),
    "question-answering": ("start_logits", 2),
    "text-generation": ("logits", 3),
}


def check_signature(artifact: Artifact, *, graph: bool = True) -> None:
    """Refuse a manifest that differs from its graph; only of ONNX artifacts the graph is read.

    Weights stay on disk; without `graph` the manifest is only held against itself. An edited
    manifest would else choose the tolerance (its dtype) or what is fed.

    Raises:
        ArtifactError: naming every difference.
    """
    manifest = artifact.manifest
    findings = [*_misfit_layout(manifest), *_misfit_task(manifest)]
    if graph and manifest.kind == "onnx":
        single = {GRAPH_FILE: GraphEntry(manifest.inputs, manifest.outputs)}
        for name, entry in (manifest.graphs or single).items():
            where = f"{name}: " if manifest.graphs else ""
            misfits = _misfit_graph(artifact.directory, name, entry, manifest.dtype)
            findings += [f"{where}{misfit}" for misfit in misfits]
    if findings:
        raise ArtifactError(
            *(f"{artifact.directory}: {finding}" for finding in findings),
            remedy="Copy the whole directory again, or export again.",
        )


def _misfit_graph(directory: Path, name: str, entry: GraphEntry, dtype: Dtype) -> Iterator[str]:
    from propulsion_export.engine.source import read_graph
    from propulsion_export.graph.finishing import signature

    model = read_graph(directory, name)
    inputs, outputs = signature(model)
    yield from _differences("input", entry.inputs, inputs)
    yield from _differences("output", entry.outputs, outputs)
    yield from _other_dtype(dtype, model)


def _differences(
    what: str, told: Sequence[TensorSpec], found: Sequence[TensorSpec]
) -> Iterator[str]:
    by_name = {spec.name: spec for spec in told}
    for spec in found:
        if by_name.get(spec.name) != spec:
            record = _shown(by_name[spec.name]) if spec.name in by_name else "no such one"
            yield f"the graph has the {what} {_shown(spec)}, the manifest {record}"
    for name in by_name.keys() - {spec.name for spec in found}:
        yield f"the manifest has the {what} {name!r}, the graph no such one"
    if len(by_name) != len(told):
        yield f"the manifest names an {what} twice"


def _shown(spec: TensorSpec) -> str:
    kind = "optional " if spec.optional else ""
    return f"{spec.name!r} ({kind}{spec.dtype} {list(spec.shape)})"


def _other_dtype(dtype: Dtype, graph: "ir.Model") -> Iterator[str]:
    """Some models compute outputs in float32 whatever their weights are, so these count too."""
    values = (*graph.graph.outputs, *graph.graph.initializers.values())
    present = {str(value.dtype.numpy()) for value in values if value.dtype is not None}
    floating = present & set(get_args(Dtype))
    if floating and dtype not in floating:
        yield f"the graph is in {', '.join(sorted(floating))}, the manifest says {dtype}"


def _misfit_task(manifest: Manifest) -> Iterator[str]:
    """What is run, and how it is read, goes by the task."""
    if not manifest.outputs:
        return  # a merged checkpoint, or several graphs, whose names are their task's
    cached = any(spec.name.startswith(f"{PAST}.") for spec in manifest.inputs)
    if cached != (manifest.task == "text-generation"):
        yield f"task is {manifest.task!r} of a graph {'with' if cached else 'without'} a cache"
    output, rank = _OUTPUTS.get(manifest.task, ("", 0))
    if output and (output, rank) not in {(s.name, len(s.shape)) for s in manifest.outputs}:
        yield f"task is {manifest.task!r}, which has an output {output!r} of {rank} dimensions"


def _misfit_layout(manifest: Manifest) -> Iterator[str]:
    if manifest.kind != "merged" and (manifest.mode == "folded") == bool(manifest.layout):
        yield f"mode is {manifest.mode!r}, the layout has {len(manifest.layout)} packed inputs"
    if list(manifest.layout) != [name for name in PACKED_INPUTS if name in manifest.layout]:
        yield (
            f"the layout has {', '.join(manifest.layout)} in this order, expected "
            f"{', '.join(PACKED_INPUTS)}"
        )
    inputs = [*manifest.inputs, *(i for graph in manifest.graphs.values() for i in graph.inputs)]
    of_adapters = (*PACKED_INPUTS, BANK_INPUT)
    # Every graph that has a packed input has all of it.
    shapes = {(spec.name, spec.shape[-1:]) for spec in inputs if spec.name in of_adapters}
    lengths = _lengths(manifest)
    for packed, shape in sorted(shapes, key=str):
        if shape != (lengths.get(packed, 0),):
            yield (
                f"{packed}: the layout has {lengths.get(packed, 0)} elements, the input's shape is "
                f"{list(shape)}"
            )
    for packed in sorted(lengths.keys() - {name for name, _ in shapes} - _built_in(manifest)):
        yield f"{packed}: the layout has {lengths[packed]} elements, the input's shape is none"


def _built_in(manifest: Manifest) -> set[str]:
    """The inputs that an engine has as weights instead."""
    options = {} if manifest.engine is None else manifest.engine.options
    if options.get("refit") != "scales" and options.get("bank") != "constant":
        return set()
    return {*PACKED_INPUTS, BANK_INPUT}


def _lengths(manifest: Manifest) -> dict[str, int]:
    """How many elements the layout gives each input that carries adapters."""
    if manifest.mode == "bank":
        return {BANK_INPUT: width_of(manifest.layout)}
    return {packed: sum(slot.length for slot in slots) for packed, slots in manifest.layout.items()}
