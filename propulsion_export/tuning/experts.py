"""Frozen experts that share a three-dimensional parameter, with a trainable scale for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from propulsion_export.scaling.expert_rules import (
    expert_weights,
    folded_expert_weight,
    scale_shape,
    spread,
)
from propulsion_export.tuning.config import PropulsionConfig
from propulsion_export.tuning.layer import Float32Parameters, PropulsionLayer


class ExpertVectors(nn.Module):
    """The vectors of one weight, by adapter name; shape [experts, outputs].

    It is a module named like the weight, so that a saved vector is called
    `<path of the weight>.propulsion_z`. PEFT uses it like the dictionary inside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.propulsion_z = Float32Parameters()

    def keys(self) -> Any:
        return self.propulsion_z.keys()

    def values(self) -> Any:
        return self.propulsion_z.values()

    def items(self) -> Any:
        return self.propulsion_z.items()

    def __contains__(self, name: str) -> bool:
        return name in self.propulsion_z

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter: nn.Parameter = self.propulsion_z[name]
        return parameter

    def __setitem__(self, name: str, value: nn.Parameter) -> None:
        self.propulsion_z[name] = value

    def __delitem__(self, name: str) -> None:
        del self.propulsion_z[name]


class PropulsionExperts(PropulsionLayer):
    """Computes with every expert's weights times z**degree, z one vector per expert and weight.

    Without biases that is the output times z**degree, (x W^T) * z**k = x (diag(z**k) W)^T, which
    the experts' own kernels compute for all of them at once. The product is computed in fp32 and
    cast to the weights' dtype, so 16-bit weights are rounded as a merge rounds them.

    The vectors of each weight are in a child module named like the weight.
    """

    def _hold_vectors(self) -> None:
        self.adapter_layer_names = tuple(expert_weights(self.base_layer))
        for name in self.adapter_layer_names:
            setattr(self, name, ExpertVectors())

    def update_layer(self, adapter_name: str, config: PropulsionConfig) -> None:
        """Add an adapter, with vectors of ones."""
        base = self.get_base_layer()
        for name, weight in expert_weights(base).items():
            ones = torch.ones(scale_shape(base, name), dtype=torch.float32, device=weight.device)
            self._vectors(name)[adapter_name] = nn.Parameter(ones)
        self.degree[adapter_name] = config.degree
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _scaled_output(
        self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        scaled = {
            weight: self._scaled_weight(weight, adapters) for weight in self.adapter_layer_names
        }
        call: Callable[..., torch.Tensor] = torch.func.functional_call
        return call(self.base_layer, scaled, (x, *args), kwargs)

    def _vectors(self, weight: str) -> ExpertVectors:
        vectors = self._modules[weight]
        assert isinstance(vectors, ExpertVectors)
        return vectors

    def _scaled_weight(self, name: str, adapters: list[str]) -> torch.Tensor:
        base = self.get_base_layer()
        weight = base.get_parameter(name)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = self._product(self._vectors(name), adapters, dtype)
        product: torch.Tensor = weight.to(dtype) * spread(base, scale)
        return product.to(weight.dtype)

    def _folded(self, names: list[str]) -> dict[str, torch.Tensor]:
        base = self.get_base_layer()
        scales = {
            weight: self._product(self._vectors(weight), names, torch.float64).detach()
            for weight in self.adapter_layer_names
        }
        return {
            weight: folded_expert_weight(base, weight, scale) for weight, scale in scales.items()
        }

    def _trained_bias(self, names: list[str]) -> None:
        return None
