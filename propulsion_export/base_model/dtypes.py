"""The dtype that transformers gives each tensor of a model that it loads at a precision.

Not every tensor of a model in float16 is in float16. A model's class names parameters that stay in
float32 (`_keep_in_fp32_modules` in float16, `_keep_in_fp32_modules_strict` in bfloat16 too), such
as T5's `wo`, which overflows in float16; and its code makes parameters and buffers in a dtype of
its own, such as the frequencies of rotary embeddings in float32. `model.to(dtype)` would round
these as well.
"""

import re
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from propulsion_export.environment.quiet import quiet

_HALVES = (torch.float16, torch.bfloat16)


def cast_(model: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
    """Cast the floating-point tensors of a model as transformers would load them in `dtype`.

    Args:
        model: changed in place.
        dtype: the precision.
        device: where all tensors go; None: they stay where they are.
    """
    kinds = dtypes_of_tensors(model, dtype)

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, kinds.get(id(tensor), dtype))

    model._apply(converted)  # type: ignore[no-untyped-call]


def dtypes_of_tensors(model: nn.Module, dtype: torch.dtype) -> dict[int, torch.dtype]:
    """The dtype of every floating-point tensor that the model has now, by its id."""
    wanted = dtypes_as_loaded(model, dtype)
    return {id(tensor): wanted[name] for name, tensor in _tensors(model) if name in wanted}


def dtypes_as_loaded(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every floating-point parameter and buffer, by name.

    In float32 and float64 all have that dtype.
    """
    names = [name for name, tensor in _tensors(model) if tensor.is_floating_point()]
    if dtype not in _HALVES or not isinstance(model, PreTrainedModel):
        return dict.fromkeys(names, dtype)
    made, kept = _dtypes_as_made(model, dtype), _kept_in_float32(model, dtype)
    stored = model.state_dict(keep_vars=True).keys()
    return {
        name: torch.float32
        if name in stored and kept is not None and kept.search(name)
        else made.get(name, dtype)
        for name in names
    }


def _tensors(model: nn.Module) -> chain[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all their names."""
    return chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )


def _dtypes_as_made(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes that the model's own code chooses where the default is `dtype`."""
    config: Any = deepcopy(model.config)  # it would get the dtype
    with torch.device("meta"), quiet():
        made = type(model)._from_config(config, dtype=dtype)
    return {name: tensor.dtype for name, tensor in _tensors(made)}


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What the names of parameters in float32 contain; None if there are none."""
    patterns = [name.replace("*", ".*") for name in model._get_dtype_plan(dtype)]
    return re.compile("|".join(patterns)) if patterns else None
