"""Read what a GGUF file says of itself: metadata, and where each tensor lies.

The format: `GGUF`, a version, the number of tensors and of metadata keys, the keys with their
values, the tensors' names, sizes, types and offsets, then the tensors. Little endian. Reference:
docs/gguf.md of ggml-org/ggml.
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from propulsion_export.base_model.gguf.source import MAGIC
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import BaseModelError

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where `general.alignment` does not say
_MOST_AXES = 4
_STRING, _ARRAY = 8, 9
# Metadata types that have a fixed size, as `struct` writes them.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS |= {12: "d"}
_COPY_AGAIN = "Copy or download the file again."


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in the file.

    Attributes:
        shape: in the order of torch, rows first.
        kind: the number of the tensor's type, such as 0 for F32.
        start: the first byte, from the start of the file.
        size: how many bytes it has.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Sections:
    """Where the parts of a header lie in the file, for who copies them.

    Attributes:
        keys: the first byte and the one behind the last of each metadata key with its value.
        entries: the same of all that is said of the tensors.
        data: the first byte of the tensors.
        alignment: every tensor begins at a multiple of it, counted from `data`.
    """

    keys: Mapping[str, tuple[int, int]]
    entries: tuple[int, int]
    data: int
    alignment: int


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file and the places of its tensors, by name."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]
    sections: Sections = field(repr=False)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as `llama`."""
        return str(self.metadata["general.architecture"])

    def own(self) -> dict[str, Any]:
        """The metadata under the architecture's name, without that prefix."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
        }

    def types(self) -> dict[str, int]:
        """How many tensors there are of each type, by its name, most frequent first."""
        names = Counter(type_name(place.kind) for place in self.tensors.values())
        return dict(names.most_common())


def type_name(kind: int) -> str:
    """The name of a tensor type, such as `Q4_K`."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def read_header(file: Path) -> Header:
    """Read the header of a GGUF file; the file's content is not loaded.

    Raises:
        BaseModelError: it is no GGUF file of version 2 or 3, little endian, or it is truncated or
            damaged.
    """
    status = file.stat()
    return _read(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(file: Path, size: int, _: int) -> Header:
    try:
        with file.open("rb") as opened:
            if size == 0:
                raise BaseModelError(f"{file}: is empty, expected a GGUF file", remedy=_COPY_AGAIN)
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(file, content).header()
    except OSError as error:
        check_permission(file, BaseModelError)
        raise BaseModelError(f"{file}: cannot be read ({error})") from error


class _Reader:
    """Reads one value behind the other."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file, self.content, self.place = file, content, 0

    def header(self) -> Header:
        tensor_count, key_count = self._counts()
        metadata, keys = {}, {}
        for _ in range(key_count):
            first = self.place
            key = self._string()
            (kind,) = self._numbers("I")
            metadata[key] = self._value(kind)
            keys[key] = (first, self.place)
        self._check_keys(metadata)
        first = self.place
        entries = [self._tensor() for _ in range(tensor_count)]
        step = metadata.get("general.alignment", _ALIGNMENT)
        data = -(-self.place // step) * step
        tensors = {}
        for name, shape, kind, offset in entries:
            tensors[name] = self._placed(name, shape, kind, data + offset)
        sections = Sections(keys, (first, self.place), data, step)
        return Header(self.file, metadata, tensors, sections)

    def _counts(self) -> tuple[int, int]:
        if self.content[: len(MAGIC)] != MAGIC:
            raise BaseModelError(
                f"{self.file}: does not begin with {MAGIC.decode()}, expected a GGUF file",
                remedy=_COPY_AGAIN,
            )
        self.place = len(MAGIC)
        (version,) = self._numbers("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = "big endian" if swapped in _VERSIONS else f"of version {version}"
            raise BaseModelError(
                f"{self.file}: is a GGUF file {found}, expected version 2 or 3, little endian",
                remedy="Convert the model again with a current llama.cpp.",
            )
        tensors, keys = self._numbers("QQ")
        return tensors, keys

    def _check_keys(self, metadata: Mapping[str, Any]) -> None:
        if not isinstance(metadata.get("general.architecture"), str):
            raise BaseModelError(
                f"{self.file}: has no general.architecture, expected its name", remedy=_COPY_AGAIN
            )
        step = metadata.get("general.alignment", _ALIGNMENT)
        if type(step) is not int or step < 1:
            raise BaseModelError(
                f"{self.file}: general.alignment is {step!r}, expected a number", remedy=_COPY_AGAIN
            )
        if metadata.get("split.count", 0) > 1:
            raise BaseModelError(
                f"{self.file}: is one of {metadata['split.count']} parts, expected a whole file",
                remedy="Join the parts with llama.cpp's `llama-gguf-split --merge`.",
            )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (axes,) = self._numbers("I")
        if axes > _MOST_AXES:
            raise self._damaged(f"{name} has {axes} axes")
        shape = self._numbers("Q" * axes)
        kind, offset = self._numbers("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorPlace:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            entries, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError as error:
            raise BaseModelError(
                f"{self.file}: {name} is of the type {kind}, which the package gguf does not know",
                remedy="Run: pip install --upgrade gguf.",
            ) from error
        if shape and shape[-1] % entries:
            raise self._damaged(
                f"rows of {name} have {shape[-1]} numbers, no multiple of {entries}"
            )
        place = TensorPlace(shape, kind, start, math.prod(shape) // entries * size)
        if place.start + place.size > len(self.content):
            raise self._damaged(
                f"has {len(self.content)} bytes, expected at least {place.start + place.size} "
                f"for {name}"
            )
        return place

    def _value(self, kind: int) -> Any:
        if kind in _FORMATS:
            return self._numbers(_FORMATS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        raise self._damaged(f"a value is of the type {kind}")

    def _array(self) -> list[Any]:
        kind, count = self._numbers("IQ")
        if kind in _FORMATS:
            self._check_room(count * struct.calcsize(_FORMATS[kind]))
            return list(self._numbers(f"{count}{_FORMATS[kind]}"))
        self._check_room(count * 8)
        return [self._value(kind) for _ in range(count)]

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        self._check_room(length)
        text = self.content[self.place : self.place + length]
        self.place += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text is no UTF-8: {error}") from error

    def _numbers(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        self._check_room(size)
        found = struct.unpack_from(f"<{form}", self.content, self.place)
        self.place += size
        return found

    def _check_room(self, size: int) -> None:
        if self.place + size > len(self.content):
            raise self._damaged("ends inside its header")

    def _damaged(self, problem: str) -> BaseModelError:
        return BaseModelError(
            f"{self.file}: is truncated or damaged ({problem})", remedy=_COPY_AGAIN
        )
