"""A torch model becomes an onnx_ir model, through the exporter of transformers.

The only module that touches `transformers.exporters`, whose interface moves with every minor
release. The graph is returned as traced, not optimised: every weight and every attached scale is
still an initializer with its own name, which is what the passes in `graph/` work on.
"""

import logging

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from propulsion_export.artifact import Tensors
from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.manifest import DEFAULT_OPSET
from propulsion_export.quiet import quiet


def trace(model: PreTrainedModel, inputs: Tensors, *, opset: int = DEFAULT_OPSET) -> ir.Model:
    """Trace `model` with dynamic batch and sequence dimensions.

    Args:
        model: in evaluation mode; scales attached to it are traced as initializers.
        inputs: padded sample inputs, int64 [batch, sequence], see `sampling.trace_inputs`.
        opset: ONNX opset of the graph.

    Raises:
        ToolError: the exporter refused the model.
        UnavailableError: the installed transformers has another exporter interface.
    """
    try:
        with quiet():
            from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise UnavailableError(
            f"transformers has no usable ONNX exporter ({error})",
            remedy="Install the tested version: pip install 'transformers>=5.24,<5.25'.",
        ) from error
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    config = OnnxConfig(dynamic=True, opset_version=opset, optimize=False)
    try:
        with quiet(), _no_logging():
            program = OnnxExporter().export(model, tensors, config).program
    except Exception as error:  # every stage of the exporter has exceptions of its own
        first = next(iter(str(error).strip().splitlines()), "")
        raise ToolError(
            f"{type(model).__name__}: cannot be traced ({type(error).__name__}: {first})"
        ) from error
    if not isinstance(program, ir.Model):
        raise UnavailableError(
            f"the exporter of transformers returned a {type(program).__name__}, expected an "
            "onnx_ir.Model",
            remedy="Install the tested version: pip install 'transformers>=5.24,<5.25'.",
        )
    return program


class _no_logging:
    """torch.onnx warns about its own registry on a logger that configures itself on import."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)
