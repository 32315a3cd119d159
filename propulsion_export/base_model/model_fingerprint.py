"""Take the fingerprint of a torch model's base, without its head and adapters."""

import re
from typing import Any

import torch
from torch import nn

from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import BaseModelError

_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# PEFT's names of a wrapped module; everything else in a wrapper belongs to an adapter.
_WRAPPERS = re.compile(r"(^|\.)(base_layer|original_module)(?=\.)")
_ADAPTER_PARTS = re.compile(r"(^|\.)(modules_to_save|propulsion_\w+)\.")


def fingerprint_of_model(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model's base, without its head and adapters.

    It is the same with and without a head and, within rounding, in fp32, bf16 and fp16. Weights
    that are random after loading are left out.

    Raises:
        BaseModelError: the weights are on the meta device or quantised, so their values cannot be
            read.
    """
    if not has_readable_weights(model):
        raise BaseModelError(
            f"{type(model).__name__}: its weights are on the meta device or quantised, expected "
            "floating-point values to recognise the base model by",
            remedy="Load the model in float32, bfloat16 or float16.",
        )
    return Fingerprint.of(base_weights(model))


def has_readable_weights(model: nn.Module) -> bool:
    """Whether the base has weight matrices and all of them hold floating-point values."""
    matrices = [weight for weight in base_weights(model).values() if weight.ndim == 2]
    return bool(matrices) and all(
        weight.device.type != "meta" and weight.dtype in _READABLE for weight in matrices
    )


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's parameters by name, without the head model's prefix and PEFT's wrappers."""
    inner, head = inner_base_model(model), output_embeddings(model)
    head_names = {
        f"{path}." for path, module in inner.named_modules() if head is not None and module is head
    }
    return {
        _WRAPPERS.sub("", name).removeprefix("."): weight.detach()
        for name, weight in inner.named_parameters(remove_duplicate=False)
        if not _ADAPTER_PARTS.search(name) and not name.startswith(tuple(head_names))
    }


def inner_base_model(model: nn.Module) -> nn.Module:
    """The base model inside a model with a head; `model` itself if it has no head."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return inner if isinstance(inner, nn.Module) else model


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The lm_head of a transformers model, or None."""
    try:
        getter: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = getter()
    except (NotImplementedError, AttributeError):  # what transformers raises if there is none
        return None
    return head if isinstance(head, nn.Module) else None
