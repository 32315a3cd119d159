"""Read and multiply pieces of tensors in a thread of its own, a few ahead of the one that writes.

Products are many short calls, each of which takes Python's lock again; hashing and writing are few
long ones without it. So one thread does the one and one the other: two threads that do both wait
for each other.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import numpy as np

from propulsion_export.base_model.tensor_files import Array, StoredTensor, shortened
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.pieces import Piece, Target
from propulsion_export.merging.products import BLOCK

_AHEAD = 8  # buffers
_LENGTH = BLOCK * np.dtype(np.float64).itemsize  # of a buffer, in bytes: no piece is longer


@dataclass(frozen=True)
class Block:
    """Bytes to write; valid until the next one is asked for.

    Attributes:
        output: the index of the output.
        offset: in the output's file.
        data: the bytes.
    """

    output: int
    offset: int
    data: memoryview


class Reader:
    """The blocks of weight files, in the order of their pieces; iterate over it once, in `with`.

    Raises, while iterating:
        AdapterError: a product is not finite in its dtype; names the tensor.
        BaseModelError: a file of the base model cannot be read, or was shortened.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = pieces
        self._sources: dict[Path, int] = {}
        self._stored = np.empty(_LENGTH, np.uint8)  # what is read to be multiplied
        self._free: SimpleQueue[Array | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Block, Array] | None] = SimpleQueue()
        self._stopped = False
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        for _ in range(_AHEAD):
            self._free.put(np.empty(_LENGTH, np.uint8))
        self._reading = self._pool.submit(self._read_all)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped = True
        self._free.put(None)  # ends the thread where it waits for a buffer
        self._pool.shutdown()
        for descriptor in self._sources.values():
            os.close(descriptor)

    def __iter__(self) -> Iterator[Block]:
        while (found := self._ready.get()) is not None:
            block, buffer = found
            yield block
            self._free.put(buffer)
        self._reading.result()

    def _read_all(self) -> None:
        try:
            for piece in self._pieces:
                if self._stopped or not self._read(piece):
                    return
        finally:
            self._ready.put(None)

    def _read(self, piece: Piece) -> bool:
        """Make the blocks of a piece; false where the writer has stopped."""
        if isinstance(piece.source, memoryview):
            return self._multiply(piece, piece.source[piece.first : piece.first + piece.count])
        if [target.products for target in piece.targets] == [None]:
            return self._copy(piece, piece.source)
        data = self._stored.data[: piece.count]
        _read_into(data, self._source(piece.source.file), piece.source, piece.first)
        return self._multiply(piece, data)

    def _copy(self, piece: Piece, stored: StoredTensor) -> bool:
        """Read straight into the buffer that is written."""
        buffer = self._free.get()
        if buffer is None:
            return False
        (target,), data = piece.targets, buffer.data[: piece.count]
        _read_into(data, self._source(stored.file), stored, piece.first)
        self._ready.put((Block(target.output, target.offset, data), buffer))
        return True

    def _multiply(self, piece: Piece, data: memoryview) -> bool:
        for target in piece.targets:
            if (buffer := self._free.get()) is None:
                return False
            written = _written(piece, target, data, buffer)
            self._ready.put((Block(target.output, target.offset, written), buffer))
        return True

    def _source(self, file: Path) -> int:
        if file not in self._sources:
            self._sources[file] = os.open(file, os.O_RDONLY)
        return self._sources[file]


def _written(piece: Piece, target: Target, data: memoryview, buffer: Array) -> memoryview:
    """What is written of a piece to a target; in `buffer`, unless it is in memory anyway."""
    if target.products is None and isinstance(piece.source, memoryview):
        return data
    if target.products is None:
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        return buffer.data[: len(data)]
    try:
        return target.products.block(data, piece.element, buffer).data
    except AdapterError as error:
        named = (f"{piece.name}: {finding}" for finding in error.findings)
        raise AdapterError(*named, remedy=error.remedy) from error


def _read_into(view: memoryview, descriptor: int, stored: StoredTensor, first: int) -> None:
    """Fill `view` with a tensor's bytes from byte `first` on."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], stored.offset + first + done)
        except OSError as error:
            raise BaseModelError(
                f"{stored.file}: cannot be read ({error.strerror})", remedy="Copy it again."
            ) from error
        if count == 0:
            raise shortened(stored.file)
        done += count
