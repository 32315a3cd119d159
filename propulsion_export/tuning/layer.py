"""A frozen layer with a trainable scale on its output."""

import math
import warnings
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from propulsion_export.errors import AdapterError, UsageError
from propulsion_export.scaling.layer_rules import folded_parameters, output_width
from propulsion_export.tuning.config import PropulsionConfig


class Float32Parameters(nn.ParameterDict):
    """Parameters by adapter name that follow the model to another device but stay fp32.

    In bf16 a z near 1 does not move: AdamW's steps are smaller than its spacing there.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Float32Parameters":
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            changed: torch.Tensor = fn(tensor)
            same = changed.dtype == tensor.dtype
            return changed if same else tensor.to(changed.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class PropulsionLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Returns the wrapped layer's output times z**degree (arXiv 2409.10927).

    `propulsion_z[adapter]` has shape [output channels], fp32, and starts at 1;
    `propulsion_bias[adapter]`, where it is trained, replaces the layer's own bias inside the
    product; fp32 too, starting at the frozen one. With several active adapters their scales
    multiply.

    The output has the wrapped layer's dtype; a power beyond that dtype's range gives inf there
    (fp16: z above 2.09 at degree 15). A z of 0 has no gradient from degree 2 on.
    """

    adapter_layer_names: tuple[str, ...] = ("propulsion_z", "propulsion_bias")
    other_param_names = ("degree",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PropulsionConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._hold_vectors()
        self.degree: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The frozen parameters while folded ones replace them.
        self._frozen: dict[str, nn.Parameter] = {}
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, config)

    def _hold_vectors(self) -> None:
        self.propulsion_z = Float32Parameters()
        self.propulsion_bias = Float32Parameters()

    def update_layer(self, adapter_name: str, config: PropulsionConfig) -> None:
        """Add an adapter: a vector of ones and, with `train_bias`, a copy of the frozen bias."""
        base = self.get_base_layer()
        # Not the weight's dtype; see Float32Parameters.
        ones = torch.ones(output_width(base), dtype=torch.float32, device=self.weight.device)
        self.propulsion_z[adapter_name] = nn.Parameter(ones)
        self.degree[adapter_name] = config.degree
        bias = getattr(base, "bias", None)
        if config.train_bias and bias is not None:
            copy = bias.detach().to(torch.float32, copy=True)
            self.propulsion_bias[adapter_name] = nn.Parameter(copy)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            return self._frozen_output(x, *args, **kwargs)
        output: torch.Tensor
        if names := self._acting():
            output = self._scaled_output(names, x, *args, **kwargs)
        else:
            output = self.base_layer(x, *args, **kwargs)
        return output

    def _scaled_output(
        self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
        scaled = output
        trained = self._trained_bias(adapters)
        if trained is not None:
            # The frozen bias is in the output already; the difference starts at exactly zero.
            scaled = scaled + (trained.to(dtype) - self.get_base_layer().bias.to(dtype))
        # The product of a bf16 output and an fp32 scale is computed in fp32; the next layer expects
        # the dtype of the base model's output.
        return (scaled * self._scale(adapters, dtype)).to(output.dtype)

    def _frozen_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the layer as it was before the merge, which stays in place.

        A copy of the layer computes it, so that another thread never sees half-swapped parameters.
        """
        base = self.get_base_layer()
        if "forward" in vars(base):  # a hook such as accelerate's, bound to this very object
            call: Callable[..., torch.Tensor] = torch.func.functional_call
            return call(base, self._frozen, (x, *args), kwargs)
        frozen = copy(base)
        frozen._parameters = {**base._parameters, **self._frozen}
        output: torch.Tensor = frozen(x, *args, **kwargs)
        return output

    def _acting(self) -> list[str]:
        """The adapters that a forward pass applies."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.degree]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters, by default the active ones, into new parameters of the wrapped layer.

        The frozen parameters are kept, so `unmerge` is exact, and not written to, so a tensor tied
        to them elsewhere stays as it was. While the adapters are disabled, `forward` computes with
        the frozen parameters.

        Args:
            safe_merge: ignored: the result is always checked.
            adapter_names: the adapters to fold in.

        Raises:
            AdapterError: a folded value is not finite in the weight's dtype.
            BaseModelError: the layer cannot be folded into exactly.
        """
        wanted = check_adapters_to_merge(self, adapter_names) or []
        names = [name for name in wanted if name in self.degree]
        if not names:
            return
        base = self.get_base_layer()
        every = [*self.merged_adapters, *names]
        self._trained_bias(every)  # refuses two trained biases before anything changes
        self._restore()
        folded = self._folded(every)
        _check_finite(type(base).__name__, folded, every)
        self._frozen = {name: base.get_parameter(name) for name in folded}
        for name, values in folded.items():
            setattr(base, name, nn.Parameter(values, requires_grad=False))
        self.merged_adapters = every

    def _folded(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The frozen parameters with these adapters folded in."""
        scale = self._scale(names, torch.float64)
        return folded_parameters(self.get_base_layer(), scale, bias=self._trained_bias(names))

    def unmerge(self) -> None:
        """Put the frozen parameters back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()

    def _restore(self) -> None:
        for name, parameter in self._frozen.items():
            setattr(self.get_base_layer(), name, parameter)
        self._frozen = {}
        self.merged_adapters = []

    def _scale(self, names: list[str], dtype: torch.dtype) -> torch.Tensor:
        return self._product(self.propulsion_z, names, dtype)

    def _product(self, vectors: Any, names: list[str], dtype: torch.dtype) -> torch.Tensor:
        """The product of the adapters' scales, z**degree each."""
        scales = [vectors[name].to(dtype) ** self.degree[name] for name in names]
        product: torch.Tensor = math.prod(scales[1:], start=scales[0])
        return product

    def _trained_bias(self, names: list[str]) -> torch.Tensor | None:
        having = [name for name in names if name in self.propulsion_bias]
        if len(having) > 1:
            raise UsageError(
                f"adapters {', '.join(having)}: each has its own trained bias, expected at most "
                "one of those active at a time",
                remedy="Activate one of them.",
            )
        bias: torch.Tensor | None = self.propulsion_bias[having[0]] if having else None
        return bias

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the layer's device; PEFT's own method would also cast it."""
        target = device or next(self.get_base_layer().parameters()).device
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name].data = parameters[adapter_name].data.to(target)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "PropulsionLayer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self._frozen.values():
            parameter.data = fn(parameter.data)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Model code reads `padding_idx`, `embed_scale` and the like. Names with an underscore
            # are hooks and flags that other libraries set on one module only.
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return f"propulsion.{super().__repr__()}"


def _check_finite(where: str, folded: dict[str, torch.Tensor], adapters: list[str]) -> None:
    bad = [
        f"{where}.{name}: {int((~values.isfinite()).sum())} folded values are not finite in "
        f"{values.dtype}, adapters {', '.join(adapters)}"
        for name, values in folded.items()
        if not values.isfinite().all()
    ]
    if bad:
        raise AdapterError(*bad, remedy="Merge in a dtype with a wider range, such as float32.")
