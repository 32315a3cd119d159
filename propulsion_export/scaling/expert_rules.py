"""Fold a scale into a three-dimensional weight, which holds all experts of a mixture.

Such a scale has shape [experts, output channels], and the path of the parameter. The attribute
`is_transposed` of the module, as in transformers' experts, says which axis of the weight holds the
outputs; a module without it is refused.
"""

import torch
from torch import nn

from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.layer_rules import narrowed


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds experts in its own parameters, scalable or not."""
    named = "Expert" in type(module).__name__ and not isinstance(module, nn.Linear)
    return named and next(module.parameters(recurse=False), None) is not None


def reason_against_experts(module: nn.Module) -> str | None:
    """Why the experts in this module cannot be scaled exactly, or None."""
    name = type(module).__name__
    own = dict(module.named_parameters(recurse=False))
    if not isinstance(getattr(module, "is_transposed", None), bool):
        return f"a {name} has no is_transposed to name the axis that holds the outputs"
    other = [key for key, weight in own.items() if weight.ndim != 3]
    if getattr(module, "has_bias", False) or other:
        extra = f" ({', '.join(other)})" if other else ""
        return f"a {name} has more than weights{extra}; a bias of experts cannot be scaled"
    return None


def expert_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that can be scaled, by name: [experts, outputs, inputs] or its transpose."""
    if not is_experts(module) or reason_against_experts(module):
        return {}
    return dict(module.named_parameters(recurse=False))


def scale_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """[experts, output channels] of one weight of `expert_weights`."""
    experts, rows, columns = expert_weights(module)[name].shape
    return (experts, columns if module.is_transposed else rows)


def spread(module: nn.Module, scale: torch.Tensor) -> torch.Tensor:
    """A scale [experts, outputs] with an axis for the inputs, to multiply the weight by."""
    return scale[:, None, :] if module.is_transposed else scale[:, :, None]


def folded_expert_weight(
    module: nn.Module, name: str, scale: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The weight times its scale: computed in float64, rounded once to `dtype` (None: its own).

    The experts have no bias, so x (diag(s) W)^T is (x W^T) * s for each of them.

    Raises:
        AdapterError: the scale has another shape.
        BaseModelError: the module's experts cannot be scaled, or are quantised.
    """
    kind = type(module).__name__
    weights = expert_weights(module)
    if name not in weights:
        raise BaseModelError(f"{kind}.{name}: there is no rule to scale this parameter")
    weight = weights[name].detach()
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise BaseModelError(
            f"{kind}: its weight is quantised ({weight.dtype}), expected floating point",
            remedy="Load the base model without quantisation.",
        )
    if scale.shape != scale_shape(module, name):
        raise AdapterError(
            f"{kind}.{name}: the adapter has values of shape {list(scale.shape)}, the base model "
            f"{list(scale_shape(module, name))}",
            remedy="Was the adapter trained on this base model?",
        )
    wide, target = spread(module, scale.to(weight.device, torch.float64)), dtype or weight.dtype
    folded = torch.empty_like(weight, dtype=target)
    for expert, matrix in enumerate(weight):  # one at a time: all in float64 may not fit
        folded[expert] = narrowed(matrix.double() * wide[expert], target)
    return folded
