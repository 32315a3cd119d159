"""Fold an adapter into a model in memory."""

import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.errors import AdapterError
from propulsion_export.scaling.attach import check_fits
from propulsion_export.scaling.expert_rules import folded_expert_weight
from propulsion_export.scaling.fold.ties import _refuse, _replace_, _shared, _untie_
from propulsion_export.scaling.layer_rules import folded_parameters


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
    shared = _shared(model, adapter)
    _refuse(shared, untie=untie)
    folded = {
        path: folded_module(model.get_submodule(_owner(path, scale)), path, adapter, dtype)
        for path, scale in adapter.scales.items()
    }
    changed = _changes(model, adapter, folded) or bool(adapter.modules)
    if not changed:
        raise AdapterError(
            f"adapter {adapter.name}: changes no weight of the model, expected an effect",
            remedy="Is this the trained adapter?",
        )
    if shared:
        _untie_(model)
    for path, parameters in folded.items():
        _replace_(model.get_submodule(_owner(path, adapter.scales[path])), parameters)
    for name, values in adapter.modules.items():
        owner, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        value = torch.from_numpy(values).to(old.device, dtype or old.dtype, copy=True)
        _replace_(model.get_submodule(owner), {attribute: value})
    if dtype is not None:
        model.to(dtype)


def folded_module(
    module: nn.Module, path: str, adapter: Adapter, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """New values for what one scale changes in its module, by parameter name, rounded to `dtype`.

    Args:
        module: the one at `path`; for expert weights, whose path is a parameter's, its owner.
        path: of a scale of the adapter.
        adapter: has the scale, and perhaps a trained bias.
        dtype: None: each parameter's own.

    Raises:
        AdapterError: one of them is beyond what `dtype` can hold.
    """
    scale, bias = adapter.scales[path], adapter.biases.get(path)
    values = torch.from_numpy(scale.values)
    if values.ndim > 1:
        name = path.rpartition(".")[2]
        folded = {name: folded_expert_weight(module, name, values, dtype)}
    else:
        inside = None if bias is None else torch.from_numpy(bias)
        folded = folded_parameters(module, values, side=scale.side, bias=inside, dtype=dtype)
    check_finite(path, folded)
    return folded


def check_finite(path: str, folded: dict[str, torch.Tensor]) -> None:
    """Refuse folded values that their dtype has no number for."""
    beyond = [name for name, value in folded.items() if not value.isfinite().all()]
    if beyond:
        raise AdapterError(
            f"{path}: folded, its {' and '.join(beyond)} would hold values that "
            f"{str(folded[beyond[0]].dtype).removeprefix('torch.')} has no number for",
            remedy="Write float32 or bfloat16 with --dtype.",
        )


def _owner(path: str, scale: Scale) -> str:
    """The module a scale belongs to; that of experts has the path of a parameter."""
    return path.rpartition(".")[0] if scale.values.ndim > 1 else path


def _changes(
    model: nn.Module, adapter: Adapter, folded: dict[str, dict[str, torch.Tensor]]
) -> bool:
    return any(
        not torch.equal(
            value,
            model.get_submodule(_owner(path, adapter.scales[path]))
            .get_parameter(name)
            .to(value.dtype),
        )
        for path, parameters in folded.items()
        for name, value in parameters.items()
    )
