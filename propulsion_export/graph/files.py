"""Read and write graphs, their weights in files beside them, so that size is no limit."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError

from propulsion_export.artifacts.file_names import GRAPH_FILE, WEIGHTS_FILE
from propulsion_export.environment.hub_files import leads_inside
from propulsion_export.errors import ArtifactError
from propulsion_export.graph.ir_version import lower_ir_version_

# Shapes and split lengths must be inside the graph: runtimes read them while inferring shapes.
_INLINE_BYTES = 64 * 1024


def write_graph(model: ir.Model, directory: Path) -> Path:
    """Write `model.onnx` and its weights as `model.onnx.data`; returns the first."""
    write_graphs({GRAPH_FILE: model}, directory)
    return directory / GRAPH_FILE


def write_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write graphs by file name, and the weights of all as `model.onnx.data`.

    A weight used by several graphs, or twice in one, is written once; small ones stay inside. The
    IR version is the lowest that the graph's opset and types allow.
    """
    digests: dict[int, bytes] = {}
    unique: dict[bytes, Any] = {}
    values = [value for model in models.values() for value in _large_weights(model)]
    for value in values:
        digests[id(value)] = key = _digest(value.const_value)
        unique.setdefault(key, value.const_value)
    places = {}
    if unique:
        written = ir.external_data.convert_tensors_to_external(
            list(unique.values()), directory, WEIGHTS_FILE
        )
        places = dict(zip(unique, written, strict=True))
    for value in values:
        place = places[digests[id(value)]]
        value.const_value = ir.ExternalTensor(
            place.location,
            place.offset,
            place.length,
            place.dtype,
            shape=value.const_value.shape,
            name=str(value.name),
            base_dir=directory,
        )
    for name, model in models.items():
        model.producer_name = "propulsion-export"
        lower_ir_version_(model)
        ir.save(model, directory / name)


def read_graph(directory: Path, name: str = GRAPH_FILE) -> ir.Model:
    """Load the graph `name`, its weights left on disk.

    Raises:
        ArtifactError: the file is no ONNX file, or keeps weights outside the directory.
    """
    file = directory / name
    try:
        model = ir.load(file)
    except DecodeError as error:
        raise ArtifactError(f"{file}: is no ONNX file ({error})") from error
    escaping = [
        f"{file}: keeps weights in {location!r}, expected a file inside its directory"
        for location in external_files(model)
        if ".." in Path(location).parts or not leads_inside(directory, location)
    ]
    if escaping:
        raise ArtifactError(*escaping, remedy="Export it again.")
    return model


def external_files(model: ir.Model) -> tuple[str, ...]:
    """The files beside the graph that hold its weights."""
    tensors = (
        tensor.location for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)
    )
    return tuple(dict.fromkeys(str(location) for location in tensors))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The graphs of a model: its own, those inside nodes, and those of functions."""
    yield from model.graphs()
    for function in model.functions.values():
        yield from (function.graph, *function.subgraphs())


def _large_weights(model: ir.Model) -> list[Any]:
    return [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _INLINE_BYTES
    ]


def _digest(tensor: Any) -> bytes:
    """Equal for weights that share their bytes on disk: same bytes and type, whatever the shape."""
    values = np.ascontiguousarray(tensor.numpy())
    key = str(tensor.dtype).encode()
    return hashlib.blake2b(values.view(np.uint8).data, key=key).digest()


def _tensors(model: ir.Model) -> Iterator[Any]:
    for graph in all_graphs(model):
        yield from (value.const_value for value in graph.initializers.values())
        for attribute in (item for node in graph for item in node.attributes.values()):
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value
