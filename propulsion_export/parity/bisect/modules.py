"""What each module of a torch model reads and returns in one forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.scaling.attach import attached

# A module and which of its calls in one forward pass: layers may share a module.
Call = tuple[str, int]


@dataclass(frozen=True, eq=False)
class ModuleRun:
    """One call of a module.

    Attributes:
        kind: the module's class.
        read: its first floating-point input, float64; None if it reads none.
        output: its first output, float64, multiplied by the adapter's scale.
        unscaled: the output before that multiply, float64; None where there is no scale.
    """

    kind: str
    read: Array | None
    output: Array
    unscaled: Array | None


def record_modules(
    model: nn.Module, adapter: Adapter, run: Callable[[], Any]
) -> dict[Call, ModuleRun]:
    """Run a model with an adapter attached; its calls of modules, in the order they returned.

    Args:
        model: the model.
        adapter: what is attached while it runs.
        run: runs it once.
    """
    recording = _Recording()
    scaled = [path for path in adapter.scales if path in dict(model.named_modules())]
    with (
        _hooked(model, scaled, recording.keep_unscaled),
        _pre_hooked(model, recording.keep_input),
        attached(model, adapter),
        _hooked(model, [path for path, _ in model.named_modules()], recording.keep_output),
    ):
        run()
    return recording.runs


class _Recording:
    """Collects what the hooks see."""

    def __init__(self) -> None:
        self.runs: dict[Call, ModuleRun] = {}
        self._reads: dict[str, list[Array | None]] = {}
        self._unscaled: dict[str, Array] = {}
        self._calls: dict[str, int] = {}

    def keep_input(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        # An embedding reads numbers of rows; BART's positions are given values for their shape.
        given = [] if isinstance(module, nn.Embedding) else [*args, *kwargs.values()]
        tensor = _first_float(given)
        self._reads.setdefault(path, []).append(None if tensor is None else _as_array(tensor))

    def keep_unscaled(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if (tensor := _first_float(output)) is not None:
            self._unscaled[path] = _as_array(tensor)

    def keep_output(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        del args
        read = self._reads[path].pop()
        tensor = _first_float(output)
        if tensor is None:
            return
        call = self._calls[path] = self._calls.get(path, -1) + 1
        unscaled = self._unscaled.pop(path, None)
        run = ModuleRun(type(module).__name__, read, _as_array(tensor), unscaled)
        self.runs[path, call] = run


@contextmanager
def _hooked(model: nn.Module, paths: list[str], keep: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(partial(keep, path))
            hooks.callback(handle.remove)
        yield


@contextmanager
def _pre_hooked(model: nn.Module, keep: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            handle = module.register_forward_pre_hook(partial(keep, path), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _first_float(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in an output or in arguments, which may be nested."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((found for one in value if (found := _first_float(one)) is not None), None)
    return None


def _as_array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return np.ascontiguousarray(array)
