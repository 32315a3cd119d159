"""Find parameters that several modules share, refuse to fold into them, or untie them."""

from typing import Any

import numpy as np
import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import BaseModelError


def check_untied(model: nn.Module, adapter: Adapter, *, untie: bool) -> None:
    """Refuse to fold into parameters that several modules share, or untie them if `untie` is on.

    After untying, no two modules of `model` (which may be on the meta device) share a parameter,
    and its configuration says so.

    Raises:
        BaseModelError: naming the modules that share a parameter, and what untying costs.
    """
    shared = find_shared(model, adapter)
    refuse_shared(shared, untie=untie)
    if shared:
        untie_(model)


def find_shared(model: nn.Module, adapter: Adapter) -> list[str]:
    """A finding for each parameter that the adapter changes and another module must keep."""
    owners: dict[int, list[str]] = {}
    for name, parameter in _parameters_by_module(model):
        owners.setdefault(id(parameter), []).append(name)
    findings = []
    for name, parameter in _parameters_by_module(model):
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


def refuse_shared(shared: list[str], *, untie: bool) -> None:
    """Refuse what `find_shared` found, unless `untie` is on.

    Raises:
        BaseModelError: something was found.
    """
    if shared and not untie:
        raise BaseModelError(
            *shared,
            remedy="Accept that with --untie, or export with --mode switchable, which keeps the "
            "scale as a multiply of its own.",
        )


def untie_(model: nn.Module) -> None:
    """Give each parameter that several modules share a copy in all but the first of them."""
    seen: set[int] = set()
    for name, parameter in _parameters_by_module(model):
        if id(parameter) in seen:
            owner, _, attribute = name.rpartition(".")
            copy = parameter.detach().clone()
            replace_parameters_(model.get_submodule(owner), {attribute: copy})
        seen.add(id(parameter))
    for config in _configs(model):
        if not always_ties(config):
            config.tie_word_embeddings = False


def replace_parameters_(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give a module new parameters by name, without writing into the old ones.

    A parameter that another module shares stays as it was there.
    """
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))


def _parameters_by_module(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of every module; a shared one once for each module that has it."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _same(adapter: Adapter, one: str, other: str) -> bool:
    """Whether the adapter gives both shared parameters the same value, so that they stay shared."""
    values, others = adapter.modules.get(one), adapter.modules.get(other)
    return values is not None and others is not None and np.array_equal(values, others)


def _configs(model: nn.Module) -> list[Any]:
    """The model's configuration, and its text part's, which some model classes read instead."""
    config = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def always_ties(config: Any) -> bool:
    """Whether the configuration's class ignores `tie_word_embeddings` and always ties, as T5's.

    The original T5 scales the decoder's output because weights are tied, so a configuration
    without the tie would change what it computes. It is not needed either: transformers does not
    tie weights that a checkpoint stores separately and with different values.
    """
    untied = config.to_dict() | {"tie_word_embeddings": False}
    return bool(type(config).from_dict(untied).tie_word_embeddings)
