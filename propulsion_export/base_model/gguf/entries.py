"""A parameter that tensors of a GGUF file make, as a whole or entry by entry. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from propulsion_export.base_model.gguf.conversions import (
    GATE_AND_UP,
    Array,
    Conversion,
    conversion_of,
)
from propulsion_export.base_model.gguf.header import Header
from propulsion_export.base_model.gguf.values import read_step, read_value, read_values

Place = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A parameter in a GGUF file, not in memory.

    Attributes:
        header: of the file.
        names: the tensors; none for a bias that the file leaves out, which is zero.
        conversion: how they become the parameter.
        shape: of the parameter.
        dtype: of its numbers.
    """

    header: Header = field(repr=False)
    names: tuple[str, ...]
    conversion: Conversion = field(repr=False)
    shape: tuple[int, ...]
    dtype: str = "float32"

    def array(self) -> Array:
        """The whole parameter, in memory of its own."""
        if not self.names:
            return np.zeros(self.shape, np.float32)
        return self.conversion.values([read_values(self.header, name) for name in self.names])

    def __getitem__(self, place: Place) -> float:
        """One entry, by its position on every axis."""
        if not self.names:
            return 0.0
        name, index = self._in_file(place)
        return float(np.float32(read_value(self.header, name, index) - self.conversion.added))

    def step(self, place: Place) -> float:
        """How far apart the values of the tensor's grid are at an entry; 0 if it has none."""
        return read_step(self.header, *self._in_file(place)) if self.names else 0.0

    @property
    def is_vector(self) -> bool:
        """Whether its tensors have one axis."""
        return len(self.header.tensors[self.names[0]].shape) == 1

    def numbered_rows(self) -> tuple[list[Array], Array]:
        """The rows of the tensors (entries of vectors), numbered through, and as the parameter.

        Returns:
            The numbers in the shape of each tensor, and arranged as in the parameter. The axis of
            the tensors' columns has the length 1.
        """
        shapes = [self.header.tensors[name].shape for name in self.names]
        numbers = _numbered(shapes if self.is_vector else [(*shape[:-1], 1) for shape in shapes])
        return numbers, self.conversion.arranged(numbers)

    def _in_file(self, place: Place) -> tuple[str, Place]:
        """The tensor that holds an entry, and its position there."""
        numbers, arranged = self.numbered_rows()
        # The axis that was left out has the length 1.
        line = int(arranged[tuple(np.minimum(place, np.subtract(arranged.shape, 1)))])
        column = place[0 if self.conversion.transposed else -1]
        for name, mine in zip(self.names, numbers, strict=True):
            if mine.flat[0] <= line <= mine.flat[-1]:
                *rows, last = (int(i) for i in np.unravel_index(line - mine.flat[0], mine.shape))
                return name, (*rows, last if self.is_vector else column)
        raise AssertionError(f"{place} is in none of {self.names}")


def _numbered(shapes: list[Place]) -> list[Array]:
    """Arrays of these shapes whose entries are numbered through."""
    found, first = [], 0
    for shape in shapes:
        found.append(first + np.arange(np.prod(shape, dtype=np.int64)).reshape(shape))
        first += found[-1].size
    return found


def conversion_for(
    architecture: str, names: tuple[str, ...], config: Mapping[str, Any]
) -> Conversion:
    """How tensors become a parameter; `architecture` and `config` as for `conversion_of`."""
    if len(names) > 1:
        return GATE_AND_UP
    return conversion_of(architecture, names[0] if names else "", config)
