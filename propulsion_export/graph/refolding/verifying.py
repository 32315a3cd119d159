"""Read folded graphs again and compare them with what was folded."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir

from propulsion_export.artifacts.artifact import Artifact, digest_of
from propulsion_export.environment.page_cache import forget_cached
from propulsion_export.errors import ArtifactError, VerificationError
from propulsion_export.graph.files import all_graphs, read_graph

_REMEDY = "Fold again; if it differs again, check the disk and the memory."


@dataclass(frozen=True)
class RecordedGraph:
    """A graph as it was before it was written.

    Attributes:
        weights: the digest of each initializer's type, shape and bytes, by graph and name.
        rest: the digest of everything else: nodes, inputs, outputs, functions and opsets.
    """

    weights: Mapping[str, bytes]
    rest: bytes

    @classmethod
    def of(cls, program: ir.Model) -> Self:
        """Record a graph; weights that lie in a file are read one by one."""
        weights = {
            f"{graph.name or number}: {name}": _digest(value)
            for number, graph in enumerate(all_graphs(program))
            for name, value in graph.initializers.items()
        }
        return cls(weights, _digest_of_rest(program))


def verify_graphs(artifact: Artifact, recorded: Mapping[str, RecordedGraph]) -> None:
    """Compare an artifact on the disk with its digests and with the graphs that were folded.

    Args:
        artifact: what was written.
        recorded: each graph before it was written, by file name.

    Raises:
        VerificationError: something differs; names the files and the weights.
    """
    found = list(_differences(artifact, recorded))
    if found:
        raise VerificationError(*found, remedy=_REMEDY)


def _differences(artifact: Artifact, recorded: Mapping[str, RecordedGraph]) -> Iterator[str]:
    damaged = [
        name
        for name, digest in artifact.manifest.files.items()
        if _digest_on_disk(artifact.directory / name) != digest
    ]
    if damaged:
        yield from (f"{name}: what is on the disk is not what was written" for name in damaged)
        return
    for name, graph in recorded.items():
        try:
            found = RecordedGraph.of(read_graph(artifact.directory, name))
        except ArtifactError as error:
            yield from error.findings
            continue
        for weight in sorted(found.weights.keys() | graph.weights.keys()):
            if found.weights.get(weight) != graph.weights.get(weight):
                yield f"{name}: {weight} is not the weight that was folded"
        if found.rest != graph.rest:
            yield f"{name}: its nodes are not those that were folded"


def _digest_on_disk(file: Path) -> str | None:
    if not file.is_file():
        return None
    forget_cached(file)
    return digest_of(file)


def _digest(value: ir.Value) -> bytes:
    tensor = value.const_value
    if tensor is None:
        return b""
    found = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    return found.digest()


def _digest_of_rest(program: ir.Model) -> bytes:
    """Of a graph without the values of its initializers."""
    found = hashlib.blake2b(repr(sorted(program.opset_imports.items())).encode())
    for graph in all_graphs(program):
        ends = [(value.name, str(value.type), str(value.shape)) for value in _ends(graph)]
        found.update(repr(ends).encode())
        for node in graph:
            found.update(ir.to_proto(node).SerializeToString(deterministic=True))
    return found.digest()


def _ends(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.outputs]
