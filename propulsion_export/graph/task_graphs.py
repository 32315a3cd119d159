"""Trace the graphs of a task, their inputs and dimensions named."""

from collections.abc import Mapping
from contextlib import nullcontext

import onnx_ir as ir
import torch

from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES, GRAPH_FILE
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import ToolError
from propulsion_export.graph.eos_pooling import reading_own_eos
from propulsion_export.graph.passes.cache import NameCache
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.passes.float32_detours import ComputeInFloat32
from propulsion_export.graph.sample_outputs import task_inputs
from propulsion_export.graph.trace import trace, trace_decoder, trace_encoder_decoder

_NONE: Mapping[str, torch.Tensor] = {}


def trace_task(
    base: BaseModel, *, opset: int, extra: Mapping[str, torch.Tensor] = _NONE
) -> dict[str, ir.Model]:
    """Trace the model of `base` as it is, with what is attached to it.

    Args:
        base: the base model.
        opset: ONNX opset version.
        extra: further inputs of the model, [batch, …], by name.

    Returns:
        The graphs of its task by file name, not optimised: each parameter is still an initializer
        of its own name, only parameters that are tied have one of their names.

    Raises:
        ToolError: the exporter refused the model, or the model is none of its task.
    """
    inputs = task_inputs(base.model, base.task)
    architecture = TASKS[base.task].architecture
    if architecture == "decoder":
        programs = {GRAPH_FILE: trace_decoder(base.model, inputs, opset=opset, extra=extra)}
        _name_cache(base, programs[GRAPH_FILE])
    elif architecture == "encoder-decoder":
        programs = trace_encoder_decoder(base.model, inputs, opset=opset, extra=extra)
        for name in ENCODER_DECODER_FILES[1:]:
            _name_cache(base, programs[name])
    else:
        pooled = pools_at_eos(base.model.config, base.task)
        with reading_own_eos(base.model) if pooled else nullcontext():
            programs = {GRAPH_FILE: trace(base.model, inputs, opset=opset, extra=extra)}
    for program in programs.values():
        NameDimensions()(program)
        if base.model.dtype != torch.bfloat16:
            ComputeInFloat32()(program)
    return programs


def _name_cache(base: BaseModel, program: ir.Model) -> None:
    try:
        NameCache()(program)
    except ir.passes.PostconditionError as error:
        raise ToolError(
            f"{type(base.model).__name__}: is no decoder that fills a cache ({error})",
            remedy=f"Is {base.task} the right task for {base.source}?",
        ) from error
