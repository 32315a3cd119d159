"""Put an adapter onto a torch model without changing its weights, to compute as in training.

Each scale is a buffer of its module, so that a traced graph names it by module path. Module paths
and classes stay as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale, Side
from propulsion_export.base_model.model_fingerprint import output_embeddings
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.expert_rules import (
    expert_weights,
    is_experts,
    reason_against_experts,
    scale_shape,
    spread,
)
from propulsion_export.scaling.layer_rules import input_width, narrowed, output_width

BUFFERS: Mapping[Side, str] = {
    "output": "propulsion_scale",
    "input": "propulsion_input_scale",
}
# Embeddings that are never called: a scale on the output has no effect, a folded one would.
_READ_DIRECTLY = (("DebertaEncoder", "rel_embeddings"), ("DebertaV2Encoder", "rel_embeddings"))


def initializer_name(path: str, side: Side, dimensions: int = 1) -> str:
    """The name of a scale's buffer in the attached model, and so in a graph traced from it.

    Args:
        path: the path of the scaled module, or of the parameter that holds experts.
        side: the side of the module that is scaled.
        dimensions: the dimensions of the scale's values: 1 for a module, 2 for experts.
    """
    return f"{path}{'_' if dimensions > 1 else '.'}{BUFFERS[side]}"


@contextmanager
def attached(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Let `model` compute with `adapter` inside the block; afterwards it is as it was.

    Scales are rounded once, from float64 to the dtype of the module they act on; where that
    holds quantised integers, or stays in float32 in a model of 16 bits, to the dtype of the model's
    first floating-point parameter.

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
    """Refuse an adapter with tensors that do not fit the model.

    Raises:
        AdapterError: a tensor does not fit; all of them are named.
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
            resized = shape is not None and _is_embedding(model, name)
            misfits.append(
                f"{name}: the adapter has shape {list(values.shape)}, the model "
                f"{list(shape) if shape else 'no such parameter'}"
                + (", so the embeddings were resized" if resized else "")
            )
    if misfits:
        raise AdapterError(
            *(f"adapter {adapter.name}: {misfit}" for misfit in misfits),
            remedy="Was it trained on this base model and task?",
        )


def _is_embedding(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the embeddings of tokens, at the model's start or end."""
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Embedding) or module is output_embeddings(model)


def _scale_misfit(modules: Mapping[str, nn.Module], path: str, scale: Scale) -> str | None:
    owner, _, name = path.rpartition(".")
    if path not in modules:
        return _expert_misfit(modules.get(owner), name, scale)
    module, reader = modules[path], type(modules[owner]).__name__
    if (reader, name) in _READ_DIRECTLY and not (scale.values == 1).all():
        return (
            f"{reader} reads its weight without calling it, so a scale there has no exact meaning"
        )
    if _only_keeps_a_weight(modules, module, name):
        return f"{reader} only keeps a tied weight there, so a scale would have no effect"
    widths = {"output": output_width, "input": input_width}
    try:
        width = widths[scale.side](module)
    except BaseModelError as error:
        return error.findings[0]
    if scale.values.shape == (width,):
        return None
    found = scale.values.size if scale.values.ndim == 1 else list(scale.values.shape)
    return f"the adapter has {found} scales, the model {width} {scale.side}s"


def _only_keeps_a_weight(modules: Mapping[str, nn.Module], module: nn.Module, name: str) -> bool:
    """Whether it is T5's or BART's `shared`, which encoder and decoder do not call."""
    tied = isinstance(module, nn.Embedding) and name == "shared"
    return tied and any(path.endswith("encoder.embed_tokens") for path in modules)


def _expert_misfit(owner: nn.Module | None, name: str, scale: Scale) -> str | None:
    if owner is None or name not in owner._parameters:
        return "the model has no such module"
    if is_experts(owner) and (reason := reason_against_experts(owner)):
        return reason
    if name not in expert_weights(owner) or scale.side == "input":
        return f"a {scale.side} scale cannot act on this parameter of a {type(owner).__name__}"
    shape = scale_shape(owner, name)
    if scale.values.shape == shape:
        return None
    return f"the adapter has scales of shape {list(scale.values.shape)}, the model {list(shape)}"


def _attach_(model: nn.Module, adapter: Adapter, undo: list[Any]) -> None:
    for path, scale in adapter.scales.items():
        owner, _, buffer = initializer_name(path, scale.side, scale.values.ndim).rpartition(".")
        module = model.get_submodule(owner)
        like = next(module.parameters())
        dtype = _computing_dtype(like, model)
        values = narrowed(torch.from_numpy(scale.values), dtype).to(like.device)
        module.register_buffer(buffer, values, persistent=False)
        undo.append(partial(delattr, module, buffer))
        weight = path.rpartition(".")[2] if scale.values.ndim > 1 else None
        undo += [hook.remove for hook in _hooks(module, scale.side, buffer, weight)]
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


def _computing_dtype(like: torch.Tensor, model: nn.Module) -> torch.dtype:
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wider = like.is_floating_point() and like.dtype.itemsize > first.itemsize
    return like.dtype if like.is_floating_point() and not wider else first


def _hooks(module: nn.Module, side: Side, buffer: str, weight: str | None) -> list[Any]:
    """Let the module apply a scale: to the expert weight if one is named, else to its output."""
    if weight is not None:
        return [
            module.register_forward_pre_hook(partial(_show_scaled_weight, weight, buffer)),
            module.register_forward_hook(partial(_hide_scaled_weight, weight), always_call=True),
        ]
    if side == "input":
        return [module.register_forward_pre_hook(_scale_input)]
    return [module.register_forward_hook(_scale_output)]


def _show_scaled_weight(name: str, buffer: str, module: nn.Module, _: Any) -> None:
    """Shadow the parameter with the scaled weight, as an attribute that forward reads first."""
    weight, scale = module.get_parameter(name), module.get_buffer(buffer)
    module.__dict__[name] = weight * spread(module, scale)


def _hide_scaled_weight(name: str, module: nn.Module, *_: Any) -> None:
    module.__dict__.pop(name, None)


def _scale_output(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    del arguments
    return output * module.propulsion_scale  # type: ignore[operator]


def _scale_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0] * module.propulsion_input_scale, *arguments[1:])
