"""Compute a torch model's outputs for the inputs that it is traced with."""

from typing import Any

import torch

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.caches import check_cache
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import BaseModelError, first_line
from propulsion_export.graph.sample_inputs import (
    input_names,
    trace_inputs,
    trace_prompt,
    with_one_eos,
)


def task_inputs(model: Any, task: str) -> Tensors:
    """The inputs that a model of `task` is traced with, int64 [3, length]."""
    if TASKS[task].architecture == "decoder":
        return trace_prompt(model.config)
    inputs = trace_inputs(input_names(type(model), model.config), model.config)
    return with_one_eos(inputs, model.config) if pools_at_eos(model.config, task) else inputs


def sample_outputs(model: Any, task: str) -> Tensors:
    """The model's output tensors for `task_inputs`, by name, without caches, as float32 or wider.

    A generative model computes one step.
    """
    tensors = {name: torch.from_numpy(v) for name, v in task_inputs(model, task).items()}
    if TASKS[task].architecture == "encoder-decoder":
        tensors["decoder_input_ids"] = tensors["input_ids"]
    with torch.inference_mode(), quiet():
        outputs = model(**tensors, use_cache=False)
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in outputs.items()
        if isinstance(value, torch.Tensor)
    }


def check_computable(base: BaseModel) -> None:
    """Refuse a model that the inputs of its task are not enough for, before any work.

    Raises:
        BaseModelError: the model needs other inputs, lacks an output of the task, or keeps a state
            that no graph has.
    """
    name = type(base.model).__name__
    if TASKS[base.task].architecture == "decoder":
        check_cache(base.model)
        return
    taken = " and ".join(task_inputs(base.model, base.task))
    try:
        outputs = sample_outputs(base.model, base.task)
    except RuntimeError:
        return  # a kernel that PyTorch lacks for a precision; the trace needs none
    except (ValueError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{base.source}: {name} does not run on {taken} alone ({first_line(error)})",
            remedy=f"Is {base.task} the right task for it?",
        ) from error
    lacking = [out.name for out in TASKS[base.task].outputs if out.name not in outputs]
    if lacking:
        raise BaseModelError(
            f"{base.source}: {name} returns {', '.join(outputs)}, expected {', '.join(lacking)}",
            remedy=f"Is {base.task} the right task for it?",
        )
