"""Parameters that two modules share: found, refused, untied."""

from typing import Any

import numpy as np
import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import BaseModelError


def check_untied(model: nn.Module, adapter: Adapter, *, untie: bool) -> None:
    """Refuse to fold into parameters that two modules share, or untie them when that is allowed.

    Untied, every parameter of `model` is its own, also one on the meta device, and the model's
    configuration says so.

    Raises:
        BaseModelError: naming the pair and what untying costs.
    """
    shared = _shared(model, adapter)
    _refuse(shared, untie=untie)
    if shared:
        _untie_(model)


def _refuse(shared: list[str], *, untie: bool) -> None:
    if shared and not untie:
        raise BaseModelError(
            *shared,
            remedy="Accept that with --untie, or export with --mode switchable, which keeps the "
            "scale as a multiply of its own.",
        )


def _shared(model: nn.Module, adapter: Adapter) -> list[str]:
    """A finding for each parameter that the adapter changes and another module must keep."""
    owners: dict[int, list[str]] = {}
    for name, parameter in _own_parameters(model):
        owners.setdefault(id(parameter), []).append(name)
    findings = []
    for name, parameter in _own_parameters(model):
        scaled = name in adapter.scales or name.rpartition(".")[0] in adapter.scales
        sharing = owners[id(parameter)]
        others = [other for other in sharing if other != name and not _same(adapter, name, other)]
        if others and (scaled or name in adapter.modules):
            what = "shares its weight with" if scaled else "is shared with"
            subject = name.removesuffix(".weight") if scaled else name
            size = parameter.numel() * parameter.element_size() * (len(sharing) - 1) / 2**20
            findings.append(
                f"{subject}: {what} {' and '.join(others)}, which the adapter must not change; "
                f"untying them adds {size:.1f} MiB"
            )
    return findings


def _own_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of every module, tied ones once for each module."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _same(adapter: Adapter, one: str, other: str) -> bool:
    """Whether the adapter gives both tied parameters one value, so that the tie may stay."""
    values, others = adapter.modules.get(one), adapter.modules.get(other)
    return values is not None and others is not None and np.array_equal(values, others)


def _untie_(model: nn.Module) -> None:
    """Give every parameter that is tied to an earlier one a copy of its own."""
    seen: set[int] = set()
    for name, parameter in _own_parameters(model):
        if id(parameter) in seen:
            owner, _, attribute = name.rpartition(".")
            _replace_(model.get_submodule(owner), {attribute: parameter.detach().clone()})
        seen.add(id(parameter))
    for config in _configs(model):
        if not _always_ties(config):
            config.tie_word_embeddings = False


def _configs(model: nn.Module) -> list[Any]:
    """The configuration, and that of its text part, which some classes ask too."""
    config = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _always_ties(config: Any) -> bool:
    """Whether the class says that weights are tied whatever it is told, as T5's does.

    T5 of the first version scales the decoder's output because weights are tied, so saying that
    they are not would change what it computes. transformers does not tie weights that a checkpoint
    holds apart, with different values, whatever the configuration says.
    """
    told = config.to_dict() | {"tie_word_embeddings": False}
    return bool(type(config).from_dict(told).tie_word_embeddings)


def _replace_(module: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    for name, value in parameters.items():
        # A new parameter, not a write into the old one: a tied weight stays as it was elsewhere.
        setattr(module, name, nn.Parameter(value, requires_grad=False))
