"""A model as a stack of layers, so that a forward pass can begin at one of them.

The model's own forward runs, but layers before the one wanted only return what the last of them has
returned before. So a layer gets exactly the arguments that the model gives it. That is right for a
model whose layers read nothing of each other but the output of the one before. What another would
read wrongly is NaN, so that it cannot pass unseen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from propulsion_export.adapters.adapter import Adapter


@dataclass(frozen=True)
class Stack:
    """The layers of a model, in the order they run, and the path of their list."""

    path: str
    layers: nn.ModuleList


def find_stack(model: Any) -> Stack | None:
    """The layers of a model; None if it has not exactly one stack, or layers share keys."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        Stack(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    shared = getattr(model.config, "num_kv_shared_layers", 0)
    return None if len(found) != 1 or shared or model.config.is_encoder_decoder else found[0]


def first_change(model: nn.Module, stack: Stack, adapter: Adapter) -> int:
    """The first layer that an adapter changes; their number if it changes only what follows."""
    scaled = [path for path, scale in adapter.scales.items() if (scale.values != 1).any()]
    changed = [*scaled, *adapter.biases, *adapter.modules]
    places = (_place_of(path, model, stack) for path in changed)
    return min(places, default=len(stack.layers))


@contextmanager
def returning(stack: Stack, place: int, previous: Any) -> Iterator[None]:
    """Let layers before `place` compute nothing, and the last of them return `previous`."""
    unread = tree_map(_without_values, previous)
    values = [*[unread] * (place - 1), *[previous] * (place > 0)]
    layers = list(stack.layers)[:place]
    try:
        for layer, value in zip(layers, values, strict=True):
            layer.forward = lambda *_, value=value, **__: value
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _place_of(path: str, model: Any, stack: Stack) -> int:
    """The layer that has a module or parameter; 0 for what runs before them, or may."""
    inner = model.base_model_prefix
    if hasattr(model, inner) and not path.startswith(f"{inner}."):
        return len(stack.layers)
    names = (f"{stack.path}.{place}." for place in range(len(stack.layers)))
    return next((place for place, name in enumerate(names) if path.startswith(name)), 0)


def _without_values(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.full((), torch.nan, dtype=value.dtype, device=value.device).expand(value.shape)
    return value
