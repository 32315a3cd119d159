"""What every layout of quantised weights can do."""

from collections.abc import Mapping
from typing import Any, Protocol

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.merging.changes import StoredChange

# GPTQ moves weights that it has not rounded yet to make up for those that it has: for correlated
# inputs, 131,072 weights by at most 3.3 steps of their grid. Few checkpoints say that it was used.
COMPENSATED_STEPS = 4.0


class Layout(Protocol):
    """How a quantised checkpoint stores its linear layers; integers never change."""

    def has(self, path: str) -> bool:
        """Whether the module at `path` is stored in this layout (others are plain floats)."""

    def shape(self, path: str) -> tuple[int, int]:
        """Outputs and inputs of the module at `path`, which this layout has."""

    def scaled(self, path: str, scale: Array) -> Mapping[str, StoredChange]:
        """What is written for the tensors of a module whose outputs are multiplied.

        Args:
            path: of the module, as in the names of the stored tensors.
            scale: float64 [outputs]; may be negative or zero.

        Returns:
            A change for each stored tensor that changes, by name; `path`.bias is not among them.

        Raises:
            BaseModelError: the scale cannot be folded exactly; names the module and the reason.
            AdapterError: a product leaves the range of the scales' dtype; names channel and block.
        """

    def unscaled(self, path: str) -> Mapping[str, StoredChange]:
        """What is written for a module that the adapter leaves alone, where others are scaled.

        Usually nothing: a layout that gives every row a scale of its own must do so in all modules.
        """

    def settings(self) -> Mapping[str, Any]:
        """The `quantization_config` of the merged checkpoint; usually that of the base model."""

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        """One dequantised weight [output, input], and the step of its grid there."""


# A layout's module has `find(settings, tensors) -> Layout | None`: None if `settings`, the
# `quantization_config` of config.json, names another method.
class Find(Protocol):
    """Recognise a layout."""

    def __call__(
        self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> Layout | None:
        """The layout of a checkpoint; None if it is another."""
