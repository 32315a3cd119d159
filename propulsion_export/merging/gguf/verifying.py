"""Read a merged GGUF file again and compare it with the file that it was made from."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from propulsion_export.base_model.gguf.block_types import BLOCK_TYPES
from propulsion_export.base_model.gguf.header import Header, TensorPlace, read_header, type_name
from propulsion_export.base_model.tensor_files import Array
from propulsion_export.environment.page_cache import forget_cached
from propulsion_export.errors import BaseModelError, VerificationError
from propulsion_export.merging.gguf.blocks import Bytes
from propulsion_export.merging.gguf.copying import read_range
from propulsion_export.merging.gguf.small_floats import EXACT
from propulsion_export.merging.gguf.writing import Piece, Writer, pieces
from propulsion_export.merging.gguf.written import Written
from propulsion_export.merging.verifying import REMEDY

_PIECE = 1 << 20  # bytes that are compared at a time
_HALF = 2  # bytes of a scale


def verify_file(writer: Writer, source: int, path: Path) -> None:
    """Compare every byte of a file with what was to be written.

    Metadata and the tensors' names, shapes and types are compared as a reader sees them. Quants,
    and tensors that do not change, have to be the base model's bytes; scales and plain numbers the
    base model's times their factor, rounded once.

    Args:
        writer: what wrote it.
        source: a descriptor of the base model's file.
        path: the file written.

    Raises:
        VerificationError: something differs; names the tensors or keys.
    """
    forget_cached(path)
    found = list(_differences(writer, source, path))
    if found:
        raise VerificationError(*found, remedy=REMEDY)


def _differences(writer: Writer, source: int, path: Path) -> Iterator[str]:
    try:
        header = read_header(path)
    except BaseModelError as error:
        yield from error.findings
        return
    with path.open("rb") as opened:
        target = opened.fileno()
        head = writer.head(source)
        different = [*_different_keys(writer, header), *_different_places(writer, header)]
        if not different and read_range(target, 0, len(head)) != head:
            different.append("the header is not what was to be written")
        yield from different
        if different:
            return
        for name, place in header.tensors.items():
            if problem := _difference(writer, source, target, name, place):
                yield f"{name}: {problem}"
        if problem := _between(writer, source, target, header):
            yield problem


def _different_keys(writer: Writer, header: Header) -> Iterator[str]:
    expected = {**writer.header.metadata, **_as_read(writer)}
    for key in expected.keys() | header.metadata.keys():
        if expected.get(key) != header.metadata.get(key):
            yield f"{key}: is not the base model's, or what the merge says"


def _as_read(writer: Writer) -> dict[str, str | list[str]]:
    """The metadata that is added or replaced, as a reader sees it."""
    return {
        key: _plain(value) if isinstance(value, str) else [_plain(each) for each in value]
        for key, value in writer.keys.items()
    }


def _plain(text: str) -> str:
    """A text without the bytes of a path that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _different_places(writer: Writer, header: Header) -> Iterator[str]:
    added = {name: each.place for name, each in writer.plan.added.items()}
    expected = {**writer.header.tensors, **added}
    for name in expected.keys() | header.tensors.keys():
        ours, theirs = expected.get(name), header.tensors.get(name)
        if ours is None or theirs is None or (ours.shape, ours.kind) != (theirs.shape, theirs.kind):
            yield f"{name}: is not there, or has another shape or type"


def _difference(
    writer: Writer, source: int, target: int, name: str, place: TensorPlace
) -> str | None:
    """What is wrong with a tensor of the file; None if nothing is."""
    written = writer.plan.changed.get(name) or writer.plan.added.get(name)
    if written is None or (written.factors is None and written.given is None):
        start = (written.place if written else writer.header.tensors[name]).start
        same = _same(source, start, target, place.start, place.size)
        return None if same else "is not the base model's tensor"
    start = place.start
    for piece in pieces(source, written):
        found = np.frombuffer(read_range(target, start, piece.content.size), np.uint8)
        start += piece.content.size
        if problem := _wrong(written, piece, found.reshape(piece.content.shape)):
            return problem
    return None


def _wrong(written: Written, piece: Piece, found: Bytes) -> str | None:
    quants = _quants(type_name(written.place.kind), found)
    if quants is not None and not np.array_equal(found[..., quants], piece.stored[..., quants]):
        return _at(found[..., quants] != piece.stored[..., quants], piece, "quants are not those")
    if not np.array_equal(found, piece.content):
        return _at(found != piece.content, piece, "scales or numbers are not products")
    return None


def _at(different: Bytes, piece: Piece, problem: str) -> str:
    return f"row {piece.first + int(np.argwhere(different)[0][0])}: its {problem} of the base model"


def _quants(kind: str, content: Bytes) -> Array | None:
    """Which bytes of a block never change; None for plain numbers."""
    if kind not in BLOCK_TYPES:
        return None
    kept = np.ones(content.shape[-1], np.bool_)
    kept[: EXACT.get(kind, 0)] = False
    for offset in BLOCK_TYPES[kind].floats:
        kept[offset : offset + _HALF] = False
    return np.flatnonzero(kept)


def _between(writer: Writer, source: int, target: int, header: Header) -> str | None:
    """What is wrong with bytes that belong to no tensor; None if nothing is."""
    size = os.fstat(target).st_size
    moved = header.sections.data - writer.header.sections.data
    places = sorted(header.tensors.values(), key=lambda place: place.start)
    ends = [header.sections.data, *(place.start + place.size for place in places)]
    starts = [*(place.start for place in places), size]
    for end, start in zip(ends, starts, strict=True):
        if writer.plan.added and end >= writer.copied_to(source) + moved:
            same = not any(read_range(target, end, start - end))
        else:
            same = _same(source, end - moved, target, end, start - end)
        if not same:
            return f"the bytes from {end} on, between tensors, are not the base model's"
    return None


def _same(source: int, start: int, target: int, place: int, size: int) -> bool:
    """Whether a range of the base model's file is one of the file written."""
    for first in range(0, size, _PIECE):
        count = min(_PIECE, size - first)
        if read_range(source, start + first, count) != read_range(target, place + first, count):
            return False
    return True
