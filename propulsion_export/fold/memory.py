"""Fold an adapter into a model in memory."""

import torch
from torch import nn

from propulsion_export.adapter import Adapter
from propulsion_export.attach import check_fits
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.folding_rules import folded_parameters


def fold_(
    model: nn.Module, adapter: Adapter, *, dtype: torch.dtype | None = None, untie: bool = False
) -> None:
    """Change the weights of `model`, in place, to what `adapter` makes of its outputs.

    Folded weights are computed in float64 and rounded once to `dtype` (None: each to its own);
    all others are cast. Nothing is changed when anything does not fit.

    Raises:
        AdapterError: the adapter does not fit, or would change nothing.
        BaseModelError: a module cannot be folded exactly, or shares its weight with another one
            and `untie` is off.
    """
    check_fits(model, adapter)
    check_untied(model, adapter, untie=untie)
    folded = {
        path: _folded(model.get_submodule(path), adapter, path, dtype) for path in adapter.scales
    }
    changed = _changes(model, folded) or bool(adapter.modules)
    if not changed:
        raise AdapterError(
            f"adapter {adapter.name}: changes no weight of the model, expected an effect",
            remedy="Is this the trained adapter?",
        )
    for path, parameters in folded.items():
        _replace_(model.get_submodule(path), parameters)
    for name, values in adapter.modules.items():
        owner, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        value = torch.from_numpy(values).to(old.device, old.dtype, copy=True)
        _replace_(model.get_submodule(owner), {attribute: value})
    if dtype is not None:
        model.to(dtype)


def check_untied(model: nn.Module, adapter: Adapter, *, untie: bool) -> None:
    """Refuse to fold into a weight that two modules share, unless they may be untied.

    Raises:
        BaseModelError: naming the pair and what untying costs.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = []
    for path in adapter.scales:
        weight = getattr(model.get_submodule(path), "weight", None)
        others = [n for n in owners.get(id(weight), []) if n != f"{path}.weight"]
        if isinstance(weight, torch.Tensor) and others:
            size = weight.numel() * weight.element_size() / 2**20
            shared.append(
                f"{path}: shares its weight with {others[0]}, which the scale must not change; "
                f"untying them adds {size:.1f} MiB"
            )
    if shared and not untie:
        raise BaseModelError(
            *shared,
            remedy="Accept that with --untie, or keep the scale separate with --mode switchable.",
        )
    if shared and hasattr(model, "config"):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _folded(
    module: nn.Module, adapter: Adapter, path: str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    scale = adapter.scales[path]
    bias = adapter.biases.get(path)
    return folded_parameters(
        module,
        torch.from_numpy(scale.values),
        side=scale.side,
        bias=None if bias is None else torch.from_numpy(bias),
        dtype=dtype,
    )


def _changes(model: nn.Module, folded: dict[str, dict[str, torch.Tensor]]) -> bool:
    return any(
        not torch.equal(value, getattr(model.get_submodule(path), name).to(value.dtype))
        for path, parameters in folded.items()
        for name, value in parameters.items()
    )


def _replace_(module: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    for name, value in parameters.items():
        # A new parameter, not a write into the old one: a tied weight stays as it was elsewhere.
        setattr(module, name, nn.Parameter(value, requires_grad=False))
