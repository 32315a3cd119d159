"""Compute forward passes layer by layer, in the memory of two layers of the model.

The weights of a checkpoint stay in its file, where safetensors maps them. One layer at a time is
filled with them, at the precision to compute in, and every pass of every state goes through it
before the next layer is filled, see `stacks`. Each layer computes the very numbers that it computes
in the whole model. What a state has in common with one before it is taken from that one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.dtypes import dtypes_of_tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.model_fingerprint import output_embeddings
from propulsion_export.errors import UsageError
from propulsion_export.parity.forwards import (
    Compute,
    Forwards,
    Work,
    collected,
    forward,
    new_cache,
    precision,
)
from propulsion_export.parity.stacks import Stack, find_stack, first_change, returning
from propulsion_export.scaling.attach import attached

Fill = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]


class _ReachedError(Exception):
    """The layer whose output is wanted has computed it."""


@dataclass
class _Run:
    """Forward passes on their way: what the last layer has returned for each piece, and results."""

    forwards: Forwards
    returned: list[Any] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)


def compute_by_layer(device: str) -> Compute:
    """Compute with one layer of the model filled at a time, on `device`.

    It leaves the model of `base` as it was, and takes only passes that are known beforehand.

    Raises:
        UsageError: raised when computing; the model is not one stack of layers, or its layers read
            more of each other than the output of the one before.
    """

    def compute(base: BaseModel, works: Sequence[Work], dtype: torch.dtype) -> list[list[Tensors]]:
        stack = stack_of(base.model)
        runs = [[_Run(forwards) for forwards in _known(work)] for work in works]
        with precision(dtype), emptied(base.model, device, dtype) as fill:
            for place in range(len(stack.layers)):
                with fill(_needed(base.model, stack, place)):
                    _through_layer(base, stack, place, works, runs)
        return [[_numbers(collected(run.outputs), base) for run in each] for each in runs]

    return compute


def stack_of(model: Any) -> Stack:
    """The layers of a model.

    Raises:
        UsageError: it is not one stack of layers.
    """
    stack = find_stack(model)
    if stack is None:
        raise _no_stack(model)
    return stack


def _no_stack(model: Any) -> UsageError:
    return UsageError(
        f"--low-memory: {type(model).__name__} is not one stack of layers that read nothing of "
        "each other but the output of the one before",
        remedy="Leave it out.",
    )


def _numbers(outputs: Tensors, base: BaseModel) -> Tensors:
    """The outputs, unless nothing of one is a number, as where a layer reads one that is empty."""
    if any(values.size and np.isnan(values).all() for values in outputs.values()):
        raise _no_stack(base.model)
    return outputs


@contextmanager
def emptied(model: nn.Module, device: str, dtype: torch.dtype) -> Iterator[Fill]:
    """Take the weights out of layers and embeddings; the value fills modules inside a block.

    Whatever else the model has is converted to `dtype`, see `base_model.dtypes`, on `device`.
    Afterwards the model has its own tensors again.
    """
    large = {part for module in _large(model) for part in module.modules()}
    kinds = dtypes_of_tensors(model, dtype)
    own = [
        (module, table, dict(table))
        for module in model.modules()
        for table in (module._parameters, module._buffers)
    ]

    def put(change: Callable[[torch.Tensor], torch.Tensor], modules: set[nn.Module]) -> None:
        for module, table, tensors in own:
            if module in modules:
                table |= {n: None if t is None else _like(t, change(t)) for n, t in tensors.items()}

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, kinds.get(id(tensor), tensor.dtype))

    def hollow(tensor: torch.Tensor) -> torch.Tensor:
        kind = kinds.get(id(tensor), tensor.dtype)
        return torch.zeros((), dtype=kind, device=device).expand(tensor.shape)

    @contextmanager
    def fill(modules: Sequence[nn.Module]) -> Iterator[None]:
        parts = {part for module in modules for part in module.modules()}
        put(converted, parts)
        try:
            yield
        finally:
            put(hollow, parts & large)

    put(hollow, large)
    put(converted, {*model.modules()} - large)
    try:
        yield fill
    finally:
        for _, table, tensors in own:
            table |= tensors


def _known(work: Work) -> list[Forwards]:
    known = [item for item in work.items if isinstance(item, Forwards)]
    assert len(known) == len(work.items), "passes that depend on others cannot run layer by layer"
    return known


def _large(model: Any) -> list[nn.Module]:
    return [*stack_of(model).layers, *_input_embeddings(model), *_output_embeddings(model)]


def _needed(model: Any, stack: Stack, place: int) -> list[nn.Module]:
    """What a pass to the end of a layer reads: the ends of the model with its first and last."""
    first, last = place == 0, place == len(stack.layers) - 1
    return [
        stack.layers[place],
        *(_input_embeddings(model) if first else []),
        *(_output_embeddings(model) if last else []),
    ]


def _input_embeddings(model: Any) -> list[nn.Module]:
    return [model.get_input_embeddings()]


def _output_embeddings(model: Any) -> list[nn.Module]:
    head = output_embeddings(model)
    return [] if head is None else [head]


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _through_layer(
    base: BaseModel,
    stack: Stack,
    place: int,
    works: Sequence[Work],
    runs: Sequence[Sequence[_Run]],
) -> None:
    """Bring every run from the layer before to the end of this one."""
    last = place == len(stack.layers) - 1
    common: dict[Forwards, list[Any]] = {}
    for work, each in zip(works, runs, strict=True):
        same = not last and first_change(base.model, stack, work.adapter) > place
        with attached(base.model, work.adapter):
            for run in each:
                if not same or run.forwards not in common:
                    _advance(base, stack, place, run)
                else:
                    run.returned = common[run.forwards]
                if same:
                    common[run.forwards] = run.returned


def _advance(base: BaseModel, stack: Stack, place: int, run: _Run) -> None:
    past: tuple[torch.Tensor, torch.Tensor] | None = None
    before, run.returned = run.returned or [None] * len(run.forwards.pieces), []
    for piece, previous in zip(run.forwards.pieces, before, strict=True):
        cache = new_cache(base)
        if cache is not None and past is not None:
            _fill_cache_(cache, len(stack.layers), place, past)
        with _only(stack, place, previous) as returned, suppress(_ReachedError):
            run.outputs.append(forward(base, piece, cache))
        run.returned.append(returned[0])
        if cache is not None:
            past = (cache.layers[place].keys, cache.layers[place].values)


def _fill_cache_(
    cache: DynamicCache, layers: int, place: int, past: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Give a cache what one layer has read, and the others as many positions, without values."""
    rows, _, length, _ = past[0].shape
    nothing = past[0].new_full((rows, 1, length, 1), torch.nan)
    for layer in range(layers):
        cache.update(*(past if layer == place else (nothing, nothing)), layer)


@contextmanager
def _only(stack: Stack, place: int, previous: Any) -> Iterator[list[Any]]:
    """Let only one layer compute, and the pass end behind it; the value gets what it returns.

    The last layer's pass goes on to the end of the model.
    """
    layer = stack.layers[place]
    returned: list[Any] = []
    compute = layer.forward

    def recorded(*arguments: Any, **named: Any) -> Any:
        returned.append(compute(*arguments, **named))
        if place < len(stack.layers) - 1:
            raise _ReachedError
        return returned[0]

    with returning(stack, place, previous):
        layer.forward = recorded
        try:
            yield returned
        finally:
            del layer.forward
