"""Where the tensors of a checkpoint lie in its safetensors files; read without torch.

The format: 8 bytes, little endian, the header's length; the header, JSON; the tensors' bytes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import BaseModelError

Array = npt.NDArray[Any]

# The numpy types of the format's dtypes.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, not in memory.

    Attributes:
        file: the file.
        offset: where in the file its first byte is.
        shape: its shape; row-major.
        dtype: the format's name of its dtype, such as `BF16`.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Array:
        """The whole tensor, in memory of its own.

        Raises:
            BaseModelError: the file has become shorter since its header was read.
        """
        return self._bytes(self.offset, self.size).view(DTYPES[self.dtype]).reshape(self.shape)

    def blocks(self, count: int) -> Iterator[Array]:
        """Its values in order, flat, at most `count` of them at a time.

        Raises:
            BaseModelError: the file has become shorter since its header was read.
        """
        dtype, total = DTYPES[self.dtype], math.prod(self.shape)
        for first in range(0, total, count):
            size = min(count, total - first) * dtype.itemsize
            yield self._bytes(self.offset + first * dtype.itemsize, size).view(dtype)

    def __getitem__(self, place: tuple[int, ...]) -> float:
        """One entry, by its position on every axis."""
        dtype = DTYPES[self.dtype]
        start = self.offset + int(np.ravel_multi_index(place, self.shape)) * dtype.itemsize
        return float(self._bytes(start, dtype.itemsize).view(dtype)[0])

    def _bytes(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        data = np.fromfile(self.file, np.uint8, count, offset=start)
        if data.size != count:
            raise shortened(self.file)
        return data


def shortened(file: Path) -> BaseModelError:
    """The error that a file has fewer bytes than its header says."""
    return BaseModelError(
        f"{file}: is truncated, was it changed while it was read?", remedy="Copy it again."
    )


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the order of their offsets.

    Raises:
        BaseModelError: the file is truncated or damaged, or has a dtype that is not in `DTYPES`.
    """
    try:
        return _stored_tensors(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check_permission(file, BaseModelError)
        raise BaseModelError(
            f"{file}: is truncated or damaged ({error})", remedy="Copy it again."
        ) from error


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header has {length} bytes, expected at most {_LONGEST_HEADER}")
        header = json.loads(content.read(length))
    header.pop("__metadata__", None)
    found: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise BaseModelError(
                f"{file}: {name} is of the type {entry['dtype']}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        tensor = StoredTensor(file, 8 + length + end, tuple(entry["shape"]), entry["dtype"])
        if entry["data_offsets"] != [end, end + tensor.size]:
            raise ValueError(f"{name} is at {entry['data_offsets']}, expected it at {end}")
        found[name], end = tensor, end + tensor.size
    if file.stat().st_size != 8 + length + end:
        raise ValueError(f"it has {file.stat().st_size} bytes, expected {8 + length + end}")
    return found


def file_metadata(file: Path) -> dict[str, str]:
    """The texts that the header of a safetensors file has beside its tensors.

    Raises:
        OSError, ValueError, AttributeError: the file cannot be read; `stored_tensors` says why.
    """
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    return dict(header.get("__metadata__") or {})
