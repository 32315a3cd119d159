"""Write a graph with its weights beside it, so that size is no limit."""

from pathlib import Path

import onnx_ir as ir

from propulsion_export.manifest import GRAPH_FILE

# Shapes and split lengths must be inside the graph: runtimes read them while inferring shapes.
_INLINE_BYTES = 64 * 1024


def write_graph(model: ir.Model, directory: Path) -> Path:
    """Write `model.onnx` and its weights as `model.onnx.data`; returns the first."""
    model.producer_name = "propulsion-export"
    path = directory / GRAPH_FILE
    ir.save(model, path, external_data=f"{GRAPH_FILE}.data", size_threshold_bytes=_INLINE_BYTES)
    return path
