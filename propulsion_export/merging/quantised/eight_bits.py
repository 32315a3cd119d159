"""A weight in bitsandbytes' 8-bit form: int8 [outputs, inputs], and `SCB`, float32 [outputs].

A weight is its integer times SCB / 127. SCB was a row's largest magnitude; every reader only
multiplies by it (bitsandbytes 0.50, `int8_vectorwise_dequant` and `int8_mm_dequant`), so that it
may be negative or zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.changes import Change
from propulsion_export.merging.quantised.scales import scaled_scales

_LARGEST = 127  # the integer of a row's largest magnitude


@dataclass(frozen=True)
class EightBits:
    """The weight of one module."""

    path: str
    tensors: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, compared with what is stored."""
        weight, scales = self.tensors.get(f"{self.path}.weight"), self.tensors[f"{self.path}.SCB"]
        if weight is None or weight.dtype != "I8" or scales.shape != weight.shape[:1]:
            found = "no weight" if weight is None else f"{weight.dtype} {list(weight.shape)}"
            raise BaseModelError(
                f"{self.path}: has {found} beside SCB {list(scales.shape)}, expected I8 "
                "[outputs, inputs] beside SCB [outputs]",
                remedy="Copy the base model again.",
            )
        self._check_order()
        outputs, inputs = weight.shape
        return outputs, inputs

    def scaled(self, scale: Array) -> Mapping[str, Change]:
        """What becomes of SCB; scale: float64 [outputs]."""
        name, _ = f"{self.path}.SCB", self.shape
        return scaled_scales(self.path, name, self.tensors[name], scale)

    def entry(self, place: tuple[int, int]) -> tuple[float, float]:
        """One dequantised weight [output, input], and the step of its grid there."""
        step = self.tensors[f"{self.path}.SCB"][place[0],] / _LARGEST
        return self.tensors[f"{self.path}.weight"][place] * step, abs(step)

    def _check_order(self) -> None:
        order = self.tensors.get(f"{self.path}.weight_format")
        if order is not None and order.read().any():
            raise BaseModelError(
                f"{self.path}: its int8 weights are in tiles (weight_format {order.read()}), "
                "expected rows (0)",
                remedy="Save the base model again with bitsandbytes 0.45 or later.",
            )
