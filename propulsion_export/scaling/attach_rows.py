"""Let every row of a batch use its own adapter, in torch.

The model takes one more argument, `propulsion_rows` [batch, D]: for each row of the batch the
packed inputs of the layout, one after the other. It becomes an input of a traced graph.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from propulsion_export.artifacts.layout import Layout
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.tensor_names import (
    BIASES_INPUT,
    MODULES_INPUT,
    ROWS_INPUT,
    SCALES_INPUT,
)
from propulsion_export.errors import UsageError

P = ParamSpec("P")
_REPLACEABLE = (nn.Linear, Conv1D, nn.LayerNorm)  # whose parameters `_forward` can replace
_REMEDY = "Export with --mode switchable, where a whole batch has one adapter."


@contextmanager
def attached_rows(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Let `model` take `propulsion_rows` [batch, D] inside the block, and compute with it.

    Raises:
        UsageError: parts of the layout cannot differ from row to row, all of them named; when the
            model runs: an output of a module does not keep the rows of the batch apart.
    """
    check_possible(model, layout)
    rows = _Rows(layout)
    undo: list[Any] = [
        model.register_forward_pre_hook(rows.take, with_kwargs=True).remove,
        model.register_forward_hook(rows.forget, always_call=True).remove,
    ]
    try:
        _attach_(model, layout, rows, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


@dataclass
class _Rows:
    """The values of each slot for the running batch, [batch, length] each.

    Without values, the model computes as the base model.
    """

    layout: Layout
    parts: dict[tuple[str, Slot], torch.Tensor] = field(default_factory=dict)

    def take(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        if (rows := named.pop(ROWS_INPUT, None)) is not None:
            keys = [(packed, slot) for packed, slots in self.layout.items() for slot in slots]
            parts = rows.split([slot.length for _, slot in keys], dim=1)
            self.parts.update(zip(keys, parts, strict=True))
        return arguments, named

    def forget(self, *_: Any) -> None:
        self.parts.clear()

    def get(self, packed: str, slot: Slot) -> torch.Tensor:
        """The tensor of a slot for every row, [batch, *slot.shape]."""
        part = self.parts[packed, slot]
        return part if len(slot.shape) == 1 else part.reshape(part.shape[0], *slot.shape)

    def scale(self, slot: Slot, values: torch.Tensor) -> torch.Tensor:
        """`values` [batch, …, channels], each row times its scale."""
        if not self.parts:
            return values
        return values * _beside(values, self.get(SCALES_INPUT, slot), slot.path)


def check_possible(model: nn.Module, layout: Layout) -> None:
    """Refuse a layout with parts that cannot differ from row to row.

    Raises:
        UsageError: naming all of them.
    """
    experts = [
        f"{slot.path}: scales experts, whose weights all tokens share, so a row of a batch cannot "
        "have its own"
        for slot in layout.get(SCALES_INPUT, ())
        if len(slot.shape) > 1
    ]
    others = [
        f"{slot.path}: {reason}"
        for slot in layout.get(SCALES_INPUT, ())
        if (reason := _reason_against(model, slot.path))
    ]
    others += [
        f"{path}.{parameter}: the {parameter} of {type(module).__name__} cannot differ for each "
        "row of a batch"
        for path, parameters in _replaced(layout).items()
        if not isinstance(module := model.get_submodule(path), _REPLACEABLE)
        or path.rpartition(".")[2] in _DETOURS
        for parameter in parameters
    ]
    if experts or others:
        raise UsageError(*experts, *others, remedy=_REMEDY)


def scaled_elsewhere(layout: Layout) -> set[str]:
    """The modules whose scale acts elsewhere than on their output, see `_DETOURS`."""
    paths = (slot.path for slot in layout.get(SCALES_INPUT, ()))
    return {path for path in paths if path.rpartition(".")[2] in _DETOURS}


def _reason_against(model: nn.Module, path: str) -> str | None:
    owner = model.get_submodule(path.rpartition(".")[0])
    shared = getattr(owner, "share_att_key", False) and path.endswith((".query_proj", ".key_proj"))
    if shared and hasattr(owner, "disentangled_attention_bias"):
        return "projects relative positions too, which all rows of a batch share"
    return None


def _replaced(layout: Layout) -> dict[str, dict[str, tuple[str, Slot]]]:
    """The replaced parameters, by module path and name: the packed input and slot of each."""
    found: dict[str, dict[str, tuple[str, Slot]]] = {}
    for slot in layout.get(BIASES_INPUT, ()):
        found.setdefault(slot.path, {})["bias"] = (BIASES_INPUT, slot)
    for slot in layout.get(MODULES_INPUT, ()):
        path, _, parameter = slot.path.rpartition(".")
        found.setdefault(path, {})[parameter] = (MODULES_INPUT, slot)
    return found


def _attach_(model: nn.Module, layout: Layout, rows: _Rows, undo: list[Any]) -> None:
    for path, parameters in _replaced(layout).items():
        module = model.get_submodule(path)
        undo.append(_replace(module, "forward", partial(_forward, module, path, rows, parameters)))
    for slot in layout.get(SCALES_INPUT, ()):
        owner, _, name = slot.path.rpartition(".")
        undo += _scaled(model.get_submodule(owner), name, rows, slot)


def _scaled(owner: nn.Module, name: str, rows: _Rows, slot: Slot) -> list[Any]:
    """Scale the output of the owner's module of that name; returns functions that undo it."""
    module = owner.get_submodule(name)
    if slot.side == "input":
        return [module.register_forward_pre_hook(partial(_scale_input, rows, slot)).remove]
    for method, detour in _DETOURS.get(name, {}).items():
        if hasattr(owner, method):
            return [_replace(owner, method, partial(detour, getattr(owner, method), rows, slot))]
    return [module.register_forward_hook(partial(_scale_output, rows, slot)).remove]


def _replace(owner: nn.Module, method: str, by: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of this object only; returns a function that undoes it."""
    before = owner.__dict__.get(method)
    setattr(owner, method, by)
    if before is None:
        return partial(delattr, owner, method)
    return partial(setattr, owner, method, before)


def _scale_output(
    rows: _Rows, slot: Slot, module: nn.Module, arguments: Any, output: torch.Tensor
) -> torch.Tensor:
    del module, arguments
    return rows.scale(slot, output)


def _scale_input(
    rows: _Rows, slot: Slot, module: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    del module
    return (rows.scale(slot, arguments[0]), *arguments[1:])


def _position_bias(
    compute: Callable[P, torch.Tensor],
    rows: _Rows,
    slot: Slot,
    *arguments: P.args,
    **named: P.kwargs,
) -> torch.Tensor:
    """Scale the position bias of T5 and MPNet: the output of the method, not of its embedding.

    The embedding returns [queries, keys, heads], without rows; the method around it returns
    [1 or batch, heads, queries, keys].
    """
    bias = compute(*arguments, **named)
    if not rows.parts:
        return bias
    return bias * rows.get(SCALES_INPUT, slot)[:, :, None, None]


def _positions_of_keys(
    compute: Callable[..., torch.Tensor],
    rows: _Rows,
    slot: Slot,
    queries: torch.Tensor,
    *others: Any,
) -> torch.Tensor:
    """Scale DeBERTa-v2's queries [batch * heads, length, width] instead of its key positions.

    The projected positions have no rows, the queries do: q (s p) is (q s) p.
    """
    return compute(_scale_heads(rows, slot, queries), *others)


def _positions_of_queries(
    compute: Callable[..., torch.Tensor],
    rows: _Rows,
    slot: Slot,
    queries: torch.Tensor,
    keys: torch.Tensor,
    *others: Any,
) -> torch.Tensor:
    """Scale DeBERTa-v2's keys instead of its query positions."""
    return compute(queries, _scale_heads(rows, slot, keys), *others)


def _scale_heads(rows: _Rows, slot: Slot, values: torch.Tensor) -> torch.Tensor:
    if not rows.parts:
        return values
    return values * rows.get(SCALES_INPUT, slot).reshape(-1, 1, values.shape[-1])


# For modules whose output has no rows, by name: the owner's method whose output has, and its
# replacement.
_DETOURS: Mapping[str, Mapping[str, Callable[..., torch.Tensor]]] = {
    "relative_attention_bias": {
        "compute_bias": _position_bias,
        "compute_position_bias": _position_bias,
    },
    "pos_key_proj": {"disentangled_attention_bias": _positions_of_keys},
    "pos_query_proj": {"disentangled_attention_bias": _positions_of_queries},
}


def _forward(
    module: nn.Module,
    path: str,
    rows: _Rows,
    parameters: Mapping[str, tuple[str, Slot]],
    values: torch.Tensor,
) -> torch.Tensor:
    """The module's output with some parameters different for each row."""
    if not rows.parts:
        return type(module).forward(module, values)  # type: ignore[no-any-return]
    weight, bias = (
        rows.get(*parameters[name]) if name in parameters else getattr(module, name)
        for name in ("weight", "bias")
    )
    if isinstance(module, nn.LayerNorm):
        values = functional.layer_norm(values, module.normalized_shape, eps=module.eps)
        values = values * (_beside(values, weight, path) if "weight" in parameters else weight)
    elif "weight" in parameters:
        values = _product(values, weight if isinstance(module, Conv1D) else weight.mT, path)
    else:
        values = values @ (weight if isinstance(module, Conv1D) else weight.T)
    if bias is None:
        return values
    return values + (_beside(values, bias, path) if "bias" in parameters else bias)


def _product(values: torch.Tensor, weights: torch.Tensor, path: str) -> torch.Tensor:
    """`values` [batch, …, in] times a matrix [in, out] for each row of the batch."""
    batch, inputs, outputs = weights.shape
    _check_rows(values, batch, path)
    flat = values.reshape(batch, -1, inputs) @ weights
    return flat.reshape(*values.shape[:-1], outputs)


def _beside(values: torch.Tensor, part: torch.Tensor, path: str) -> torch.Tensor:
    """A part [batch, channels] in a shape that broadcasts with `values` [batch, …, channels].

    `values` may also be a table that all rows share, [1, …, channels], or tokens in one axis with
    the rows, [batch * tokens, channels].
    """
    batch, channels = part.shape
    if values.ndim == 2 or values.shape[0] != 1:
        _check_rows(values, batch, path)
        if values.shape[0] != batch:
            each = values.shape[0] // batch
            part = part[:, None].expand(batch, each, channels).reshape(-1, channels)
    return part[(slice(None), *[None] * (values.ndim - 2))]


def _check_rows(values: torch.Tensor, batch: int, path: str) -> None:
    if values.shape[0] % batch:
        raise UsageError(
            f"{path}: computes {list(values.shape)} for a batch of {batch}, expected the rows of "
            "the batch in the first axis, so that each can have its adapter",
            remedy=_REMEDY,
        )
