"""Put an adapter onto a torch model without changing its weights: what the trainer computed.

The scale stays separate, a buffer of the module it belongs to, so that a traced graph shows it by
module path. Module paths and classes stay as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from propulsion_export.adapter import Adapter
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.folding_rules import input_width, narrowed, output_width
from propulsion_export.scales import Scale, Side

BUFFERS: Mapping[Side, str] = {
    "output": "propulsion_scale",
    "input": "propulsion_input_scale",
}
# Embeddings that are never called: a scale on the output acts on nothing, one folded in would.
_READ_DIRECTLY = (("DebertaEncoder", "rel_embeddings"), ("DebertaV2Encoder", "rel_embeddings"))


@contextmanager
def attached(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Let `model` compute with `adapter` inside the block; afterwards it is as it was.

    Scales are rounded once, from float64 to the dtype of the module they act on.

    Raises:
        AdapterError: the model has no such module or parameter, or one of another width; nothing
            is changed then.
    """
    check_fits(model, adapter)
    undo: list[Any] = []
    try:
        _attach_(model, adapter, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def check_fits(model: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter whose tensors have no place in the model, naming every one.

    Raises:
        AdapterError: with all misfits.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    misfits = [
        f"{path}: {problem}"
        for path, scale in adapter.scales.items()
        if (problem := _scale_misfit(modules, path, scale))
    ]
    for path, bias in adapter.biases.items():
        shape = tuple(parameters[f"{path}.bias"].shape) if f"{path}.bias" in parameters else None
        if shape != bias.shape:
            misfits.append(f"{path}: the adapter has a bias {list(bias.shape)}, the model {shape}")
    for name, values in adapter.modules.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != values.shape:
            misfits.append(
                f"{name}: the adapter has shape {list(values.shape)}, the model "
                f"{list(shape) if shape else 'no such parameter'}"
            )
    if misfits:
        raise AdapterError(
            *(f"adapter {adapter.name}: {misfit}" for misfit in misfits),
            remedy="Was it trained on this base model and task?",
        )


def _scale_misfit(modules: Mapping[str, nn.Module], path: str, scale: Scale) -> str | None:
    if path not in modules:
        return "the model has no such module"
    module, (owner, _, name) = modules[path], path.rpartition(".")
    reader = type(modules[owner]).__name__
    if (reader, name) in _READ_DIRECTLY and not (scale.values == 1).all():
        return f"{reader} reads its weight past its output, so a scale there has no exact meaning"
    widths = {"output": output_width, "input": input_width}
    try:
        width = widths[scale.side](module)
    except BaseModelError as error:
        return error.findings[0]
    if width == scale.values.size:
        return None
    return f"the adapter has {scale.values.size} scales, the model {width} {scale.side}s"


def _attach_(model: nn.Module, adapter: Adapter, undo: list[Any]) -> None:
    for path, scale in adapter.scales.items():
        module = model.get_submodule(path)
        name = BUFFERS[scale.side]
        like = next(module.parameters())
        values = narrowed(torch.from_numpy(scale.values), like.dtype).to(like.device)
        module.register_buffer(name, values, persistent=False)
        undo.append(lambda module=module, name=name: delattr(module, name))
        hook = (
            module.register_forward_hook(_scale_output)
            if scale.side == "output"
            else module.register_forward_pre_hook(_scale_input)
        )
        undo.append(hook.remove)
    replaced = {f"{path}.bias": bias for path, bias in adapter.biases.items()} | dict(
        adapter.modules
    )
    for name, array in replaced.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
        new = nn.Parameter(
            torch.from_numpy(array).to(old.device, old.dtype, copy=True), requires_grad=False
        )
        setattr(module, attribute, new)
        undo.append(lambda m=module, a=attribute, o=old: setattr(m, a, o))


def _scale_output(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    del arguments
    return output * module.propulsion_scale  # type: ignore[operator]


def _scale_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0] * module.propulsion_input_scale, *arguments[1:])
