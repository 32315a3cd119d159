"""Compare a manifest with the graph that it describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.consistency import contradictions, differences, inconsistent
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.manifest import (
    Dtype,
    GraphEntry,
    TensorSpec,
)
from propulsion_export.graph.files import read_graph


def check_signature(artifact: Artifact) -> None:
    """Refuse a manifest that contradicts itself or the graph of its ONNX artifact.

    Weights stay on disk. Without this check an edited manifest could choose the tolerance (by its
    dtype) or the inputs.

    Raises:
        ArtifactError: naming every difference.
    """
    manifest = artifact.manifest
    findings = contradictions(manifest)
    if manifest.kind == "onnx":
        single = {GRAPH_FILE: GraphEntry(manifest.inputs, manifest.outputs)}
        for name, entry in (manifest.graphs or single).items():
            where = f"{name}: " if manifest.graphs else ""
            misfits = _misfit_graph(artifact.directory, name, entry, manifest.dtype)
            findings += [f"{where}{misfit}" for misfit in misfits]
    if findings:
        raise inconsistent(artifact.shown, findings)


def signature(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The graph's inputs and outputs; an input that has an initializer is optional."""
    graph = model.graph
    inputs = tuple(_spec(value, value.name in graph.initializers) for value in graph.inputs)
    return inputs, tuple(_spec(value) for value in graph.outputs)


def _misfit_graph(directory: Path, name: str, entry: GraphEntry, dtype: Dtype) -> Iterator[str]:
    model = read_graph(directory, name)
    inputs, outputs = signature(model)
    yield from differences("input", entry.inputs, inputs)
    yield from differences("output", entry.outputs, outputs)
    yield from _other_dtype(dtype, model)


def _other_dtype(dtype: Dtype, graph: ir.Model) -> Iterator[str]:
    """Some models compute outputs in float32 whatever their weights are, so these count too."""
    values = (*graph.graph.outputs, *graph.graph.initializers.values())
    present = {str(value.dtype.numpy()) for value in values if value.dtype is not None}
    floating = present & set(get_args(Dtype))
    if floating and dtype not in floating:
        yield f"the graph is in {', '.join(sorted(floating))}, the manifest says {dtype}"


def _spec(value: ir.Value, optional: bool = False) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    shape = tuple(
        dimension if isinstance(dimension, int) else str(dimension.value)
        for dimension in value.shape or ()
    )
    return TensorSpec(value.name, str(value.dtype.numpy()), shape, optional)
