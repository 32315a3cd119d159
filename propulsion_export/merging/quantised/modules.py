"""The modules of a quantised checkpoint, found by the names of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.quantised.layout import Layout

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Modules:
    """Which modules a checkpoint has, and how they are stored."""

    layout: Layout
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def quantised(self) -> tuple[str, ...]:
        """Paths of the quantised modules, in the order of their tensors."""
        paths = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        return tuple(path for path in paths if self.layout.has(path))

    def stored(self, path: str) -> str:
        """A module's path as the checkpoint has it.

        An adapter's paths are those of the model that it was trained on, which may have the prefix
        of a head model where the checkpoint has none, or the other way round.
        """
        without = path.partition(".")[2]
        prefixed = [f"{prefix}.{path}" for prefix in self._prefixes]
        found = [name for name in (path, without, *prefixed) if name and self._has(name)]
        return found[0] if len(found) == 1 or path in found else path

    def misfit(self, path: str, scale: Array) -> str | None:
        """Why a scale [outputs] does not fit the module at `path`; None if it does."""
        if not self._has(path):
            return f"{path}: the checkpoint has no such module"
        if self.layout.has(path):
            outputs, inputs = self.layout.shape(path)
            return None if len(scale) == outputs else _other_width(scale, (outputs, inputs), path)
        stored = self.tensors[f"{path}.weight"]
        if not is_floating(stored):
            return f"{path}: its weight is {stored.dtype} without scales that are known"
        return None if len(scale) in stored.shape else _other_width(scale, stored.shape, path)

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.tensors))

    def _has(self, path: str) -> bool:
        return self.layout.has(path) or f"{path}.weight" in self.tensors


def plain_factors(path: str, stored: StoredTensor, scale: Array) -> Array:
    """The factors of a weight that is not quantised, with as many axes as it has.

    Args:
        path: of its module, for messages.
        stored: the weight; a Linear layer's outputs are its rows, an embedding's its columns.
        scale: float64 [outputs].

    Raises:
        BaseModelError: the shape does not say along which axis the outputs lie, or whether a norm
            multiplies by its weight or by 1 + weight.
    """
    if len(stored.shape) == 2 and stored.shape[0] != stored.shape[1]:
        return scale[:, None] if stored.shape[0] == len(scale) else scale[None, :]
    what = (
        "a square weight does not say along which axis its outputs lie"
        if len(stored.shape) == 2
        else "a norm's weight does not say whether 1 is added to it"
    )
    raise BaseModelError(
        f"{path}: is not quantised, and {what}",
        remedy="Merge into the checkpoint that is not quantised, or train without this module.",
    )


def is_floating(stored: StoredTensor) -> bool:
    """Whether a tensor's own values are what a model computes with."""
    return stored.dtype in _FLOATS


def _other_width(scale: Array, shape: tuple[int, ...], path: str) -> str:
    return f"{path}: the adapter has {len(scale)} scales, the base model a weight {list(shape)}"
