"""The numbers of a GGUF file's tensors, without quantisation."""

from typing import Any

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.gguf.block_types import BLOCK_TYPES
from propulsion_export.base_model.gguf.header import Header, TensorPlace, type_name
from propulsion_export.errors import BaseModelError

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def read_values(header: Header, name: str) -> Array:
    """A tensor in float32, rows first, in memory of its own.

    Raises:
        BaseModelError: the package gguf has no dequantisation of its type.
    """
    place = header.tensors[name]
    content = np.fromfile(header.file, np.uint8, place.size, offset=place.start)
    return _numbers(header, name, content).reshape(place.shape)


def read_value(header: Header, name: str, index: tuple[int, ...]) -> float:
    """One number of a tensor, by its position on every axis; only its block is read.

    Raises:
        BaseModelError: as for `read_values`.
    """
    content, inside = _block_at(header, name, index)
    return float(_numbers(header, name, content)[inside])


def read_step(header: Header, name: str, index: tuple[int, ...]) -> float:
    """How far apart the values are that the grid of a quantised tensor has at a position.

    Where the levels are not evenly spaced, it is the widest gap between two of them; where they
    are entries of a code book, the magnitude of the block's largest number. 0 for plain numbers.
    """
    kind = type_name(header.tensors[name].kind)
    if kind not in BLOCK_TYPES:
        return 0.0
    read = BLOCK_TYPES[kind]
    content, inside = _block_at(header, name, index)
    if read.scales is None:
        return float(np.abs(_numbers(header, name, content)).max())
    quants = np.ones(content.size, bool)
    for start, stop in read.scales:
        quants[start:stop] = False
    ends = (_numbers(header, name, np.where(quants, filled, content)) for filled in _ENDS)
    first, last = (float(numbers[inside]) for numbers in ends)
    return abs(last - first) / read.span


def _block_at(header: Header, name: str, index: tuple[int, ...]) -> tuple[Bytes, int]:
    """The bytes of the block that holds a number, and its position there."""
    place = header.tensors[name]
    entries, size = block_size(place)
    block, inside = divmod(int(np.ravel_multi_index(index, place.shape)), entries)
    start = place.start + block * size
    return np.fromfile(header.file, np.uint8, size, offset=start), inside


def block_size(place: TensorPlace) -> tuple[int, int]:
    """How many numbers a block of a tensor has, and how many bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    entries, size = GGML_QUANT_SIZES[GGMLQuantizationType(place.kind)]
    return entries, size


def _numbers(header: Header, name: str, content: Bytes) -> Array:
    """The numbers of whole blocks, one behind the other."""
    from gguf import GGMLQuantizationType, dequantize

    place = header.tensors[name]
    if place.kind in _PLAIN:
        plain: Array = content.view(_PLAIN[place.kind]).astype(np.float32, copy=False)
        return plain
    # The package works through a few rows at a time: a row of one block each takes 9 times as long.
    entries, size = block_size(place)
    row = place.shape[-1] // entries * size
    rows = content.reshape(-1, row if content.size % row == 0 else size)
    try:
        numbers: Array = dequantize(rows, GGMLQuantizationType(place.kind)).reshape(-1)
    except NotImplementedError as error:
        raise BaseModelError(
            f"{header.file}: {name} is of the type {type_name(place.kind)}, which the package gguf "
            "cannot turn into numbers",
            remedy="Quantise the model to another type, such as Q4_K or Q8_0.",
        ) from error
    return numbers


def read_factors(header: Header, name: str) -> list[float]:
    """The numbers of a short tensor; none where the file has no such tensor."""
    if name not in header.tensors:
        return []
    return [float(str(number)) for number in read_values(header, name).ravel()]


_PLAIN: dict[int, Any] = {0: np.float32, 1: np.float16, 28: np.float64}
_ENDS = (np.uint8(0x00), np.uint8(0xFF))
