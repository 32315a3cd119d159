"""The modules of a quantised checkpoint, found by the names of its tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.changes import Change, Given, Scaled
from propulsion_export.merging.quantised.layout import Layout

# How a scale lies over a weight: one factor a row, a column, or an entry of a norm's weight; a norm
# `plus one` multiplies by 1 + weight.
PlainRule = Literal["rows", "columns", "norm", "norm plus one"]
RuleOf = Callable[[str], PlainRule | None]
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

    def parameter(self, name: str) -> str:
        """The same for the name of a parameter."""
        path, _, last = name.rpartition(".")
        return f"{self.stored(path)}.{last}"

    def misfits(self, path: str, scale: Array) -> Iterator[str]:
        """Why a scale [outputs] does not fit the module that an adapter has at `path`."""
        stored = self.stored(path)
        if not self._has(stored):
            yield f"{path}: the checkpoint has no such module"
            return
        quantised = self.layout.has(stored)
        weight = None if quantised else self.tensors[f"{stored}.weight"]
        if weight is not None and not is_floating(weight):
            yield f"{path}: its weight is {weight.dtype} and has no scales of this layout"
            return
        shape = weight.shape if weight is not None else self.layout.shape(stored)
        if len(scale) not in (shape[:1] if quantised else shape):
            kind = "quantised weight" if quantised else "weight"
            found = f"the base model a {kind} {list(shape)}"
            yield f"{path}: the adapter has {len(scale)} scales, {found}"

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.tensors))

    def _has(self, path: str) -> bool:
        return self.layout.has(path) or f"{path}.weight" in self.tensors


def plain_change(path: str, stored: StoredTensor, scale: Array, rule_of: RuleOf | None) -> Change:
    """The change of a weight that is not quantised.

    Args:
        path: of its module, for messages and for `rule_of`.
        stored: the weight; a Linear layer's outputs are its rows, an embedding's its columns.
        scale: float64 [outputs].
        rule_of: what says how the scale lies over a weight whose shape does not; None: nothing can.

    Raises:
        BaseModelError: nothing says how the scale lies over the weight.
        AdapterError: a norm's weight is too large for its dtype.
    """
    rule = _rule_by_shape(stored, scale) or (rule_of(path) if rule_of is not None else None)
    match rule:
        case "rows":
            return Scaled(stored, scale[:, None])
        case "columns":
            return Scaled(stored, scale[None, :])
        case "norm":
            return Scaled(stored, scale)
        case "norm plus one":
            return _shifted(path, stored, scale)
    raise BaseModelError(
        f"{path}: is not quantised, and its weight {list(stored.shape)} does not say how outputs "
        "lie over it",
        remedy="Merge into the checkpoint that is not quantised, or train without this module.",
    )


def _rule_by_shape(stored: StoredTensor, scale: Array) -> PlainRule | None:
    """Linear layers and embeddings, unless they are square: a norm may add 1 to its weight."""
    if len(stored.shape) != 2 or stored.shape[0] == stored.shape[1]:
        return None
    return "rows" if stored.shape[0] == len(scale) else "columns"


def _shifted(path: str, stored: StoredTensor, scale: Array) -> Given:
    """The weight w of a norm that multiplies by 1 + w: (1 + w) s - 1."""
    values = rounded((1 + stored.read().astype(np.float64)) * scale - 1, DTYPES[stored.dtype])
    if not np.isfinite(values.astype(np.float64)).all():
        raise AdapterError(f"{path}.weight: folded, it would be too large for {stored.dtype}")
    return Given(values)


def is_floating(stored: StoredTensor) -> bool:
    """Whether a tensor's own values are what a model computes with."""
    return stored.dtype in _FLOATS
