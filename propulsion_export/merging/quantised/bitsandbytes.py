"""Checkpoints that bitsandbytes quantised: LLM.int8, and NF4 or FP4 with or without nesting.

The layout is found module by module, since bitsandbytes reads it so: a module with `SCB` has 8
bits, one with `weight.absmax` 4. See `eight_bits` and `four_bits`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.merging.changes import StoredChange
from propulsion_export.merging.quantised.eight_bits import EightBits
from propulsion_export.merging.quantised.four_bits import FourBits


def find(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> "Bitsandbytes | None":
    """The layout of a checkpoint of bitsandbytes; older ones do not name their method."""
    named = settings.get("quant_method") == "bitsandbytes"
    unnamed = "quant_method" not in settings and (
        settings.get("load_in_8bit") or settings.get("load_in_4bit")
    )
    return Bitsandbytes(settings, tensors) if named or unnamed else None


@dataclass(frozen=True)
class Bitsandbytes:
    """The linear layers of a checkpoint of bitsandbytes; a `Layout`."""

    base_settings: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def has(self, path: str) -> bool:
        """Whether the module at `path` is quantised."""
        return f"{path}.SCB" in self.tensors or f"{path}.weight.absmax" in self.tensors

    def shape(self, path: str) -> tuple[int, int]:
        """Outputs and inputs of the module at `path`, which this layout has."""
        return self._weight(path).shape

    def scaled(self, path: str, scale: Array) -> Mapping[str, StoredChange]:
        """What becomes of the tensors of the module at `path`, scale: float64 [outputs].

        Raises:
            BaseModelError: blocks cross rows, or the module is damaged or of an unknown form.
            AdapterError: a product leaves float32, or what the layer computes in.
        """
        return self._weight(path).scaled(scale)

    def unscaled(self, path: str) -> Mapping[str, StoredChange]:
        """Nothing: a module that is nested may stay so."""
        return {}

    def settings(self) -> Mapping[str, Any]:
        """The base model's settings, without double quantisation.

        Readers take it from each module's tensors, so that a layer that nobody scaled may keep it.
        """
        return {
            name: False if name == "bnb_4bit_use_double_quant" else value
            for name, value in self.base_settings.items()
        }

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        """One dequantised weight [output, input], and the step of its grid there."""
        return self._weight(path).entry(place)

    def _weight(self, path: str) -> EightBits | FourBits:
        kind = EightBits if f"{path}.SCB" in self.tensors else FourBits
        return kind(path, self.tensors)
