"""Fold a scale into a module's own parameters: one exact rule per layer kind."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propulsion_export.artifacts.rounding import rounded_to_odd
from propulsion_export.errors import AdapterError, BaseModelError

# Norms of transformers share no class with those of torch, only the ending of their name.
_NORM_ENDINGS = ("RMSNorm", "LayerNorm")
# Subclasses of nn.Linear whose own forward computes the same.
_PLAIN_LINEARS = ("FalconLinear",)

LayerKind = Literal["linear", "conv1d", "embedding", "norm"]
Parameters = dict[str, torch.Tensor]


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The rule for the module; None if it has no output channels to scale."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    named_like_a_norm = type(module).__name__.endswith(_NORM_ENDINGS)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) or named_like_a_norm:
        weight = module._parameters.get("weight")
        return "norm" if weight is not None and weight.ndim == 1 else None
    return None


def output_width(module: nn.Module) -> int:
    """The number of channels in the last axis of the module's output.

    Raises:
        BaseModelError: there is no rule for this kind of module.
    """
    layer: Any = module
    match layer_kind(module):
        case "linear":
            return int(layer.out_features)
        case "conv1d":
            return int(layer.nf)
        case "embedding":
            return int(layer.embedding_dim)
        case "norm":
            return int(layer.weight.numel())
        case None:
            raise _without_rule(module)


def input_width(module: nn.Module) -> int:
    """The number of channels in the last axis of the module's input.

    Raises:
        BaseModelError: the input of this kind of module cannot be scaled in its weight.
    """
    layer: Any = module
    match layer_kind(module):
        case "linear":
            return int(layer.in_features)
        case "conv1d":
            return int(layer.weight.shape[0])
        case "embedding" | "norm" | None:
            raise _without_rule(module, "the input of", "Linear or Conv1D")


def folded_parameters(
    module: nn.Module,
    scale: torch.Tensor,
    *,
    side: str = "output",
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Parameters:
    """New values for the module's own parameters, so that it computes the scaled output by itself.

    The module is left as it is. Values are computed in float64 and rounded once. By arXiv
    2409.10927 the frozen bias is inside the product: (x W^T + b) * s = x (diag(s) W)^T + s * b.

    Args:
        module: nn.Linear, Conv1D, nn.Embedding, a layer norm or an RMS norm, unwrapped.
        scale: the scale, of shape [channels] of its side.
        side: `output`, or `input` for the feed-forward modules of (IA)^3.
        bias: a bias of shape [output channels] that replaces the module's own inside the product.
        dtype: the dtype to round to; None: each parameter's own.

    Returns:
        The parameters that change, by name.

    Raises:
        BaseModelError: the module has no exact rule.
        AdapterError: the scale or the bias does not fit the module.
    """
    check_foldable(module)
    weight = _own(module, "weight").detach().double()
    wide = scale.detach().to(weight)
    if side == "input":
        _check_width(module, wide, input_width(module), "inputs")
        changed = {"weight": weight * (wide[:, None] if isinstance(module, Conv1D) else wide)}
        if bias is not None:
            changed["bias"] = _bias_inside(module, bias)
    else:
        _check_width(module, wide, output_width(module), "outputs")
        changed = {"weight": _scaled_weight(module, weight, wide)}
        if bias is not None or module._parameters.get("bias") is not None:
            changed["bias"] = _bias_inside(module, bias) * wide
    return {
        name: narrowed(values, dtype or _own(module, name).dtype)
        for name, values in changed.items()
    }


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 `values` as `dtype`, on the same device, rounded once."""
    if dtype.itemsize >= torch.float32.itemsize:
        return values.to(dtype)
    odd = torch.from_numpy(rounded_to_odd(values.cpu().numpy()))
    return odd.to(values.device, dtype)


def _scaled_weight(module: nn.Module, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Linear):
        return weight * scale[:, None]
    if layer_kind(module) == "norm" and adds_one(module):
        return (1 + weight) * scale - 1
    # Conv1D, nn.Embedding and norms keep the output channels in the last axis.
    return weight * scale


def _bias_inside(module: nn.Module, trained: torch.Tensor | None) -> torch.Tensor:
    """The bias that the scale multiplies, float64: the trained one if there is one."""
    own = module._parameters.get("bias")
    if own is None:
        raise AdapterError(
            f"{type(module).__name__}: the adapter has a trained bias, the layer has none",
            remedy="Was the adapter trained on this base model?",
        )
    if trained is None:
        return own.detach().double()
    _check_width(module, trained, own.numel(), "bias entries")
    return trained.detach().to(device=own.device, dtype=torch.float64)


def check_foldable(module: nn.Module) -> None:
    """Refuse a module that a scale cannot be folded into exactly."""
    name = type(module).__name__
    if layer_kind(module) is None:
        raise _without_rule(module)
    weight = module._parameters.get("weight")
    if weight is None:
        raise BaseModelError(f"{name}: has no weight of its own, expected one to fold into")
    # One byte is float8, a floating point type whose values mean nothing without their scales.
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise BaseModelError(
            f"{name}: its weight is quantised ({weight.dtype}), expected floating point",
            remedy="Load the base model without quantisation.",
        )
    if isinstance(module, nn.Linear) and not is_plain_linear(module):
        raise BaseModelError(
            f"{name}: overrides nn.Linear's forward, so a scaled weight may not give a scaled "
            "output"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise BaseModelError(f"{name}: max_norm rescales its rows, so a folded scale is lost")


def is_plain_linear(linear: nn.Linear) -> bool:
    """Whether it computes x W^T + b and nothing else."""
    return type(linear).forward is nn.Linear.forward or type(linear).__name__ in _PLAIN_LINEARS


def adds_one(norm: nn.Module) -> bool:
    """Whether a norm multiplies by (1 + weight), as those of Gemma do; found by running it.

    A plain norm gives zero for a weight of 0, the other kind for a weight of -1.
    """
    if type(norm) in (nn.LayerNorm, nn.RMSNorm) or not _output_for_weight(norm, 0.0).any():
        return False
    if not _output_for_weight(norm, -1.0).any():
        return True
    raise BaseModelError(
        f"{type(norm).__name__}: its output is proportional neither to its weight nor to 1 + weight"
    )


def _output_for_weight(norm: nn.Module, value: float) -> torch.Tensor:
    """The norm's output for a probe input, with every weight `value` and no bias."""
    own = dict(norm.named_parameters(recurse=False))
    # A norm without weights, on the meta device, computes all the same.
    device = {name: "cpu" if values.is_meta else values.device for name, values in own.items()}
    changed = {name: torch.zeros_like(v, device=device[name]) for name, v in own.items()}
    changed["weight"] = weight = torch.full_like(changed["weight"], value)
    probe = torch.linspace(-1, 2, 2 * weight.numel(), dtype=weight.dtype, device=weight.device)
    call: Callable[..., torch.Tensor] = torch.func.functional_call
    with torch.no_grad():
        return call(norm, changed, (probe.reshape(2, -1),))


def _check_width(module: nn.Module, values: torch.Tensor, width: int, what: str) -> None:
    if values.shape != (width,):
        raise AdapterError(
            f"{type(module).__name__}: the adapter has values of shape {list(values.shape)}, "
            f"the base model {width} {what}",
            remedy="Was the adapter trained on this base model?",
        )


def _own(module: nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _without_rule(
    module: nn.Module,
    what: str = "",
    expected: str = "Linear, Conv1D, Embedding or a norm with a one-dimensional weight",
) -> BaseModelError:
    subject = f"{what} this class" if what else "this class"
    return BaseModelError(
        f"{type(module).__name__}: there is no rule to scale {subject}, expected {expected}"
    )
