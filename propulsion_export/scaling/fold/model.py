"""Fold an adapter into a model in memory."""

from collections.abc import Mapping

import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.dtypes import cast_, dtypes_as_loaded
from propulsion_export.errors import AdapterError
from propulsion_export.scaling.attach import check_fits
from propulsion_export.scaling.expert_rules import folded_expert_weight
from propulsion_export.scaling.fold.ties import (
    find_shared,
    refuse_shared,
    replace_parameters_,
    untie_,
)
from propulsion_export.scaling.layer_rules import folded_parameters


def fold_(
    model: nn.Module, adapter: Adapter, *, dtype: torch.dtype | None = None, untie: bool = False
) -> None:
    """Multiply the adapter's scales into the weights of `model`, in place.

    Folded weights are computed in float64 and rounded once, to the dtype that transformers gives
    them at the precision `dtype` (None: each to its own); all others are cast. Nothing changes if
    anything does not fit.

    Raises:
        AdapterError: the adapter does not fit, or would change nothing.
        BaseModelError: a module cannot be folded exactly, or shares its weight with another one
            and `untie` is off.
    """
    check_fits(model, adapter)
    shared = find_shared(model, adapter)
    refuse_shared(shared, untie=untie)
    dtypes = {} if dtype is None else dtypes_as_loaded(model, dtype)
    folded = {
        path: folded_module(
            _owner(model, path, scale), path, adapter, dtypes.get(_weight(path, scale))
        )
        for path, scale in adapter.scales.items()
    }
    if not adapter.modules and not _changes(model, adapter, folded):
        raise AdapterError(
            f"adapter {adapter.name}: changes no weight of the model, expected an effect",
            remedy="Is this the trained adapter?",
        )
    if shared:
        untie_(model)
    for path, parameters in folded.items():
        replace_parameters_(_owner(model, path, adapter.scales[path]), parameters)
    _replace_saved_modules_(model, adapter, dtypes)
    if dtype is not None:
        cast_(model, dtype)


def folded_module(
    module: nn.Module, path: str, adapter: Adapter, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The new values of the parameters that one scale changes, by name, rounded to `dtype`.

    Args:
        module: the module at `path`; for expert weights, whose path is a parameter's, the module
            that has the parameter.
        path: the path of one of the adapter's scales.
        adapter: the adapter, which may also have a trained bias for the module.
        dtype: the dtype of the new values; None keeps each parameter's own.

    Raises:
        AdapterError: a new value is too large for `dtype`.
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
    """Refuse folded values that are not finite.

    Raises:
        AdapterError: naming the parameters of the module at `path`.
    """
    beyond = [name for name, value in folded.items() if not value.isfinite().all()]
    if beyond:
        raise AdapterError(
            f"{path}: folded, its {' and '.join(beyond)} would hold values too "
            f"large for {str(folded[beyond[0]].dtype).removeprefix('torch.')}",
            remedy="Write float32 or bfloat16 with --dtype.",
        )


def _owner(model: nn.Module, path: str, scale: Scale) -> nn.Module:
    """The module whose parameters a scale changes; an expert scale's path is a parameter's."""
    return model.get_submodule(path.rpartition(".")[0] if scale.values.ndim > 1 else path)


def _weight(path: str, scale: Scale) -> str:
    """The name of the parameter that a scale is multiplied into."""
    return path if scale.values.ndim > 1 else f"{path}.weight"


def _replace_saved_modules_(
    model: nn.Module, adapter: Adapter, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Replace the parameters of the modules that the adapter brings whole."""
    for name, values in adapter.modules.items():
        owner, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        value = torch.from_numpy(values).to(old.device, dtypes.get(name, old.dtype), copy=True)
        replace_parameters_(model.get_submodule(owner), {attribute: value})


def _changes(
    model: nn.Module, adapter: Adapter, folded: dict[str, dict[str, torch.Tensor]]
) -> bool:
    """Whether any folded value differs from the parameter it replaces."""
    for path, parameters in folded.items():
        module = _owner(model, path, adapter.scales[path])
        for name, value in parameters.items():
            if not torch.equal(value, module.get_parameter(name).to(value.dtype)):
                return True
    return False
