"""Slots for adapters that are not trained yet: the tensors that an adapter may bring."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.errors import UsageError
from propulsion_export.scaling.expert_rules import expert_weights, scale_shape
from propulsion_export.scaling.layer_rules import output_width
from propulsion_export.tuning.config import PropulsionConfig
from propulsion_export.tuning.placement import resolve_targets


@dataclass(frozen=True)
class SlotOptions:
    """Which slots to make for adapters to come; None and False: the default.

    Attributes:
        placement: `attention`, `all` or a regular expression for module paths, as for training.
        max_labels: how many labels a head may have.
        train_bias: whether the biases of the scaled modules have slots too.
    """

    placement: str | None = None
    max_labels: int | None = None
    train_bias: bool = False

    def __post_init__(self) -> None:
        if self.max_labels is not None and self.max_labels < 1:
            raise UsageError(f"--max-labels: {self.max_labels}, expected at least 1")

    @property
    def given(self) -> list[str]:
        """The command-line options that differ from their default."""
        options = {
            "--placement": self.placement is not None,
            "--max-labels": self.max_labels is not None,
            "--train-bias": self.train_bias,
        }
        return [option for option, is_given in options.items() if is_given]


def slots_for(base: BaseModel, options: SlotOptions) -> Adapter:
    """An identity adapter with a tensor for everything that an adapter of a placement may bring.

    Args:
        base: the base model, its head as wide as the widest head to come.
        options: which modules have slots.

    Returns:
        Scales of ones, the base model's own biases, and, of a head that counts labels, zeros where
        the checkpoint has none.

    Raises:
        UsageError: the placement matches nothing, or a module that cannot be scaled.
    """
    config = PropulsionConfig(target_modules=options.placement or "all")
    targets = resolve_targets(base.model, config)
    modules = {path: m for path, m in base.model.named_modules() if path in targets}
    scales = {
        f"{path}.{name}": Scale(np.ones(scale_shape(module, name)))
        for path, module in modules.items()
        for name in expert_weights(module)
    }
    plain = {path: module for path, module in modules.items() if not expert_weights(module)}
    scales |= {path: Scale(np.ones(output_width(module))) for path, module in plain.items()}
    biases = {
        path: module.bias
        for path, module in plain.items()
        if options.train_bias and getattr(module, "bias", None) is not None
    }
    if options.train_bias and not biases:
        raise UsageError(
            "--train-bias: no module of the placement has a bias", remedy="Leave it out."
        )
    return Adapter(
        name="slots",
        scales=scales,
        biases={path: _values(bias) for path, bias in biases.items()},
        modules={name: _head_values(base, name) for name in head_parameters(base)},
    )


def head_parameters(base: BaseModel) -> list[str]:
    """All parameters of the modules outside the base model, where a head counts labels."""
    if not base.label_parameters:
        return []
    inner = f"{base.model.base_model_prefix}."
    return [name for name, _ in base.model.named_parameters() if not name.startswith(inner)]


def _head_values(base: BaseModel, name: str) -> Array:
    values = _values(base.model.get_parameter(name))
    return np.zeros_like(values) if name in base.missing else values


def _values(parameter: Any) -> Array:
    values: Array = parameter.detach().double().cpu().numpy()
    return values
