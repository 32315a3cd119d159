"""What a merge writes for one tensor: the bytes that are stored, their products, or new values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from propulsion_export.base_model.tensor_files import Array, StoredTensor


@dataclass(frozen=True)
class Copied:
    """A tensor that is written as it is stored."""

    stored: StoredTensor


@dataclass(frozen=True)
class Scaled:
    """A stored tensor times factors, each product rounded once to the dtype that is written.

    Attributes:
        stored: the tensor, of a floating-point dtype.
        factors: float64, with as many axes as the tensor; each axis is 1 or the tensor's own.
        dtype: the format's name of the dtype to write, such as `BF16`; None: as stored.
    """

    stored: StoredTensor
    factors: Array
    dtype: str | None = None


@dataclass(frozen=True)
class Given:
    """New values, small enough to be in memory, in the dtype that is written."""

    values: Array


@dataclass(frozen=True)
class Computed:
    """New values that are in memory only while their tensor is written.

    Attributes:
        compute: gives them, the same whenever it is called.
        shape: theirs.
        dtype: theirs.
    """

    compute: Callable[[], Array] = field(repr=False)
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def checked(cls, compute: Callable[[], Array]) -> Self:
        """Compute them once, so that what cannot be written is refused at once."""
        values = compute()
        return cls(compute, values.shape, values.dtype)

    @property
    def values(self) -> Array:
        """The values, computed anew."""
        return self.compute()


Change = Copied | Scaled | Given | Computed


@dataclass(frozen=True)
class Dropped:
    """A stored tensor that is not written: what it said is now in the values of others."""


StoredChange = Change | Dropped


def all_changes(
    stored: Mapping[str, StoredTensor], changes: Mapping[str, StoredChange]
) -> dict[str, Change]:
    """What is written for each tensor of a checkpoint: it is copied unless it changes.

    Args:
        stored: the checkpoint's tensors by name.
        changes: what becomes of some of them.
    """
    every = {name: changes.get(name, Copied(tensor)) for name, tensor in stored.items()}
    return {name: change for name, change in every.items() if not isinstance(change, Dropped)}
