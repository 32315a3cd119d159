"""Run an ONNX model in onnx's own reference evaluator."""

from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.errors import ToolError, UnavailableError, first_line
from propulsion_export.graph.signature import check_signature


def open_graph(path: Path, artifact: Artifact, device: str) -> Runner:
    """Run a graph of an artifact; see `reference_runner`.

    Raises:
        ArtifactError: the graphs of the artifact are not what its manifest declares.
        ToolError: onnx cannot load a graph.
    """
    del device
    check_signature(artifact)
    return reference_runner(path)


def place(array: Array, device: str) -> Array:
    """The array itself: the evaluator computes where numpy does."""
    del device
    return np.asarray(array)


def reference_runner(path: Path) -> Runner:
    """Run an ONNX model in onnx's own evaluator: slow, but it knows every dtype.

    Raises:
        ToolError: onnx cannot load the model.
    """
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(_load(path), new_ops=[_gather_elements()])
    known = set(evaluator.input_names)

    def run(inputs: Tensors) -> Tensors:
        feeds = {name: values for name, values in inputs.items() if name in known}
        try:
            outputs = evaluator.run(None, feeds)
        except Exception as error:  # every operator raises exceptions of its own
            raise UnavailableError(
                f"{path}: onnx's reference evaluator cannot run it ({type(error).__name__}: "
                f"{error})"
            ) from error
        return dict(zip(evaluator.output_names, outputs, strict=True))

    return run


def _load(path: Path) -> Any:
    """The model with its external data."""
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # of protobuf, of the operating system, of onnx's own checks
        raise ToolError(f"{path}: onnx cannot load it ({first_line(error)})") from error


def _gather_elements() -> type:
    """GatherElements as ONNX defines it, for the reference evaluator.

    The evaluator's own (onnx 1.23) fails with "cannot reshape array" when it picks from more than
    64 elements, as for RoBERTa's token types. Remove when the expected failure in
    tests/runners/test_reference.py passes.
    """
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        op_domain = ""

        def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
            others = [slice(size) for size in indices.shape]
            others[axis] = slice(None)
            return (np.take_along_axis(data[tuple(others)], indices, axis=axis),)

    return GatherElements
