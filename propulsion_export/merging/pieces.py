"""Cut the tensors of weight files into pieces that fit the cache, for one or several outputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor
from propulsion_export.merging.changes import Change, Computed, Copied, Given, Scaled
from propulsion_export.merging.files import WeightFile, size_of
from propulsion_export.merging.products import BLOCK, Products

_COPIED = 1 << 19  # bytes of a piece that is only copied and hashed


@dataclass(frozen=True)
class Target:
    """Where a piece goes.

    Attributes:
        output: the index of the output.
        offset: in the output's file.
        products: multiplies the piece first; None if it is written as it is.
    """

    output: int
    offset: int
    products: Products | None = None


@dataclass(frozen=True)
class Piece:
    """A run of bytes that is read once and written to each target.

    Attributes:
        name: the tensor's name, for messages.
        source: the bytes in memory, or the tensor in a file from which they are read.
        first: the first byte in the source.
        count: of bytes.
        element: the number of the first element in the tensor.
        targets: where they go.
    """

    name: str
    source: memoryview | StoredTensor
    first: int
    count: int
    element: int
    targets: tuple[Target, ...]


@dataclass
class _Cursor:
    """How far the pieces of one output's file have come."""

    offset: int = 0


class Pieces:
    """The pieces of one file of each output, which have tensors of the same names in one order.

    Attributes:
        products: those of each output, by tensor.
    """

    def __init__(self, files: Sequence[WeightFile]) -> None:
        self._files = files
        self._cursors = [_Cursor() for _ in files]
        self.products = [
            {name: Products(c) for name, c in file.changes.items() if isinstance(c, Scaled)}
            for file in files
        ]

    def __iter__(self) -> Iterator[Piece]:
        for output, file in enumerate(self._files):
            yield self._given("the header", memoryview(file.header), output)
        for name in self._files[0].changes:
            yield from self._of_tensor(name, [file.changes[name] for file in self._files])

    def _of_tensor(self, name: str, changes: list[Change]) -> Iterator[Piece]:
        readers: dict[StoredTensor, list[int]] = {}
        for output, change in enumerate(changes):
            if isinstance(change, Given | Computed):
                yield self._given(name, _bytes_of(change.values), output)
            else:
                readers.setdefault(change.stored, []).append(output)
        for stored, outputs in readers.items():
            yield from self._read(name, stored, outputs, changes)

    def _read(
        self, name: str, stored: StoredTensor, outputs: list[int], changes: list[Change]
    ) -> Iterator[Piece]:
        """The pieces of one stored tensor, for the outputs that are made from it."""
        width = DTYPES[stored.dtype].itemsize
        plain = all(isinstance(changes[output], Copied) for output in outputs)
        length = _COPIED if plain else BLOCK * width
        # A GGUF file's are computed as a whole.
        source = stored if type(stored) is StoredTensor else _bytes_of(stored.read())
        for first in range(0, stored.size, length):
            count = min(length, stored.size - first)
            targets = tuple(self._target(name, o, changes[o], count // width) for o in outputs)
            yield Piece(name, source, first, count, first // width, targets)

    def _given(self, name: str, data: memoryview, output: int) -> Piece:
        target = self._advance(output, len(data))
        return Piece(name, data, 0, len(data), 0, (target,))

    def _target(self, name: str, output: int, change: Change, elements: int) -> Target:
        size = elements * size_of(change) // max(1, _elements(change))
        return self._advance(output, size, self.products[output].get(name))

    def _advance(self, output: int, size: int, products: Products | None = None) -> Target:
        cursor = self._cursors[output]
        target = Target(output, cursor.offset, products)
        cursor.offset += size
        return target


def _elements(change: Change) -> int:
    assert isinstance(change, Copied | Scaled)
    return change.stored.size // DTYPES[change.stored.dtype].itemsize


def _bytes_of(values: Array) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
