"""Write a GGUF file with a plan carried out: the other bytes are copied as they are."""

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from propulsion_export.base_model.gguf.header import Header, TensorPlace, type_name
from propulsion_export.base_model.gguf.metadata import Text, with_keys
from propulsion_export.base_model.gguf.values import block_size
from propulsion_export.base_model.tensor_files import Array
from propulsion_export.environment.progress import Progress
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.gguf.blocks import FLOATS, Bytes, Lost, plain_rows, scaled_rows
from propulsion_export.merging.gguf.copying import copy_range, read_range, write_all
from propulsion_export.merging.gguf.plan import Plan
from propulsion_export.merging.gguf.written import Written
from propulsion_export.merging.meter import Meter

_PIECE = 1 << 20  # bytes of a tensor that are changed at a time
_COUNTS = 8  # the first byte of the numbers of tensors and keys


@dataclass
class Writer:
    """Writes one file.

    Attributes:
        header: of the base model's file.
        plan: what becomes of its tensors.
        keys: metadata to add or replace.
        allow_range: write the nearest number where a type cannot hold a product.
        progress: called with the share done and what is being done.
        changed: whether any tensor has got other bytes so far.
        nearest: with `allow_range`, the first number of each tensor that its type cannot hold.
    """

    header: Header
    plan: Plan
    keys: Mapping[str, Text]
    allow_range: bool
    progress: Progress
    changed: bool = field(default=False, init=False)
    nearest: dict[str, str] = field(default_factory=dict, init=False)

    def write(self, source: int, target: int) -> None:
        """Write the file to a descriptor that stands at its start; `source` is the base model's.

        Raises:
            AdapterError: a type cannot hold a product and `allow_range` is off; names the tensor,
                the channel and the block.
            BaseModelError: the base model's file cannot be read, or has become shorter.
            OSError: what writing reports.
        """
        try:
            self._write_all(source, target, Meter(self._size(source), self.progress))
        except BaseModelError as error:
            findings = (f"{self.header.file}: {finding}" for finding in error.findings)
            raise BaseModelError(*findings, remedy=error.remedy) from error

    def _write_all(self, source: int, target: int, meter: Meter) -> None:
        write_all(target, self.head(source))
        first = end = self.header.sections.data
        for name, place in sorted(self.header.tensors.items(), key=lambda item: item[1].start):
            if name in self.plan.changed:
                copy_range(source, target, end, place.start - end, meter.add)
                self._write(source, target, self.plan.changed[name], meter)
                end = place.start + place.size
        stop = self.copied_to(source)
        copy_range(source, target, end, stop - end, meter.add)
        end = stop - first
        for name, offset in self._offsets().items():
            write_all(target, bytes(offset - end))
            self._write(source, target, self.plan.added[name], meter)
            end = offset + self.plan.added[name].place.size

    def _size(self, source: int) -> int:
        """How many bytes are written behind the header, but for some between added tensors."""
        added = sum(each.place.size for each in self.plan.added.values())
        return self.copied_to(source) - self.header.sections.data + added

    def copied_to(self, source: int) -> int:
        """The first byte of the base model's file that has no place before the added tensors."""
        return self._last if self.plan.added else os.fstat(source).st_size

    @property
    def _last(self) -> int:
        """The first byte behind the base model's tensors."""
        ends = (place.start + place.size for place in self.header.tensors.values())
        return max(ends, default=self.header.sections.data)

    def _offsets(self) -> dict[str, int]:
        """Where the added tensors begin, behind the others, counted from the first of all."""
        found, end = {}, self._last - self.header.sections.data
        for name, each in self.plan.added.items():
            found[name] = end + -end % self.header.sections.alignment
            end = found[name] + each.place.size
        return found

    def head(self, source: int) -> bytes:
        """Everything before the tensors."""
        sections, added = self.header.sections, self.plan.added
        kept = read_range(source, 0, sections.entries[1])
        keys, count = with_keys(kept, sections.keys, self.keys)
        counts = struct.pack("<QQ", len(self.header.tensors) + len(added), count)
        head = kept[:_COUNTS] + counts + keys + kept[slice(*sections.entries)]
        for name, offset in self._offsets().items():
            head += _entry(name, added[name].place, offset)
        return head + bytes(-len(head) % sections.alignment)

    def _write(self, source: int, target: int, written: Written, meter: Meter) -> None:
        if written.factors is None and written.given is None:
            copy_range(source, target, written.place.start, written.place.size, meter.add)
            return
        for piece in pieces(source, written):
            if piece.lost is not None:
                self._accept(written, piece.lost, piece.first)
            self.changed = self.changed or not np.array_equal(piece.stored, piece.content)
            write_all(target, piece.content.reshape(-1).data)
            meter.add(piece.content.size)

    def _accept(self, written: Written, lost: Lost, first: int) -> None:
        finding = _finding(written, lost, first)
        if not self.allow_range:
            raise AdapterError(
                f"{self.header.file}: {finding}",
                remedy="Accept the nearest number with --allow-range.",
            )
        self.nearest.setdefault(written.name, finding)


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor that changes.

    Attributes:
        stored: their bytes in the base model's file, rows first; none where values are given.
        content: the bytes to write, in the same shape.
        lost: the first number that its type cannot hold.
        first: the number of the first row.
    """

    stored: Bytes
    content: Bytes
    lost: Lost | None
    first: int


def pieces(source: int, written: Written) -> Iterator[Piece]:
    """A tensor that changes, some rows after the other."""
    kind = type_name(written.place.kind)
    if written.given is not None:
        content, lost = plain_rows(written.given[None].astype(np.float64), kind)
        yield Piece(np.empty(0, np.uint8), content, lost, 0)
        return
    shape, size, factors = _layout(written)
    rows = max(1, _PIECE // size)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        content = _read(source, written.place.start + first * size, count * size)
        stored = content.reshape(count, *shape[1:])
        chosen = factors[first : first + count] if factors.shape[0] > 1 else factors
        yield Piece(stored, *scaled_rows(stored, chosen, kind), first)


def _layout(written: Written) -> tuple[tuple[int, ...], int, Array]:
    """The shape of a tensor's bytes, rows first, the size of a row, and the rows' factors."""
    assert written.factors is not None
    shape, (entries, size) = written.place.shape, block_size(written.place)
    *leading, columns = shape if len(shape) > 1 else (1, *shape)
    rows, blocks = int(np.prod(leading)), columns // entries
    factors = written.factors.reshape(-1, written.factors.shape[-1])
    if len(shape) == 1:
        factors = written.factors.reshape(1, -1)
    elif factors.shape[-1] == 1:
        spread = np.broadcast_to(written.factors[..., 0], shape[:-1])
        factors = spread.reshape(-1, 1)
    plain = type_name(written.place.kind) in FLOATS
    bytes_shape = (rows, blocks * size) if plain else (rows, blocks, size)
    return bytes_shape, blocks * size, factors


def _read(source: int, start: int, size: int) -> Bytes:
    return np.frombuffer(read_range(source, start, size), np.uint8)


def _finding(written: Written, lost: Lost, first: int) -> str:
    """Where a number is that its type cannot hold, and what it would be."""
    row = first + lost.row
    channel = row
    if written.channels is not None:
        flat = written.channels.ravel()
        by_column = written.channels.shape[-1] > 1
        channel = int(flat[lost.block if by_column else row])
    return (
        f"{written.name}, channel {channel}, block {lost.block}: it would be "
        f"{lost.product:.4g}, which {lost.problem}"
    )


def _entry(name: str, place: TensorPlace, offset: int) -> bytes:
    """What the header says of a tensor."""
    text = name.encode()
    sizes = tuple(reversed(place.shape))
    head = struct.pack("<Q", len(text)) + text + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}QIQ", *sizes, place.kind, offset)
