"""Write graphs with their weights beside them, so that size is no limit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from propulsion_export.manifest import GRAPH_FILE, WEIGHTS_FILE

# Shapes and split lengths must be inside the graph: runtimes read them while inferring shapes.
_INLINE_BYTES = 64 * 1024


def write_graph(model: ir.Model, directory: Path) -> Path:
    """Write `model.onnx` and its weights as `model.onnx.data`; returns the first."""
    write_graphs({GRAPH_FILE: model}, directory)
    return directory / GRAPH_FILE


def write_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write graphs by file name, and the weights of all as `model.onnx.data`.

    A weight that several graphs have, or one has twice, is written once; small ones are inside.
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
        ir.save(model, directory / name)


def _large_weights(model: ir.Model) -> list[Any]:
    return [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _INLINE_BYTES
    ]


def _digest(tensor: Any) -> bytes:
    """What makes two weights one on disk: the bytes and their type; each has a shape of its own."""
    values = np.ascontiguousarray(tensor.numpy())
    key = str(tensor.dtype).encode()
    return hashlib.blake2b(values.view(np.uint8).data, key=key).digest()
