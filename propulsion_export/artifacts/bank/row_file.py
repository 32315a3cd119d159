"""Append, copy, map and verify the rows of a bank file.

A row that is in the file stays there, whether the registry counts it or not: after a registry was
restored from a backup, other processes may still have the rows mapped that it does not know.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.bank.registry import (
    BankRow,
    BankState,
    has_rows,
)
from propulsion_export.artifacts.file_names import ADAPTERS
from propulsion_export.artifacts.manifest import COPY_AGAIN
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.watched_file import Moment, WatchedFile
from propulsion_export.errors import ArtifactError, UsageError


def check_length(directory: Path, state: BankState) -> int:
    """The bank file's length in bytes.

    Raises:
        ArtifactError: the file is missing, or too short for the rows that the registry counts.
    """
    file = directory / state.file
    if not file.is_file():
        raise ArtifactError(f"{file}: is missing", remedy=COPY_AGAIN)
    if (length := file.stat().st_size) < state.length:
        raise ArtifactError(
            f"{file}: has {length} bytes, expected {state.next_row} rows of {state.stride} bytes",
            remedy=COPY_AGAIN,
        )
    return length


def tidy(directory: Path, state: BankState) -> BankState:
    """Remove what killed changes left behind: half a row, other bank files.

    No other change may be in progress.

    Returns:
        `state`, with all whole rows of the file counted. Those that the registry does not count
        were left by a killed change or belong to a registry that was replaced by a backup.

    Raises:
        ArtifactError: the bank file is missing, too short or another bank's.
    """
    length = check_length(directory, state)
    _check_first_row(directory, state)
    remove_others(directory, state)
    whole = state._replace(next_row=length // state.stride)
    if length > whole.length:
        os.truncate(directory / state.file, whole.length)
    return whole


def take_back(directory: Path, state: BankState) -> None:
    """Remove what a failed change has written; `state` is the one that it began with."""
    remove_others(directory, state)
    if check_length(directory, state) > state.length:
        os.truncate(directory / state.file, state.length)


def remove_others(directory: Path, state: BankState) -> None:
    """Remove the bank files that the registry does not name; memory maps of them stay valid."""
    for path in (directory / ADAPTERS).iterdir():
        name = f"{ADAPTERS}/{path.name}"
        if has_rows(name) and name != state.file:
            path.unlink(missing_ok=True)


def _check_first_row(directory: Path, state: BankState) -> None:
    with (directory / state.file).open("rb") as file:
        if checksum_of(file.read(state.stride)) != state.base_checksum:
            raise ArtifactError(
                f"{directory / state.file}: row 0 is not the base model's that the registry "
                "recorded; nothing was changed",
                remedy=COPY_AGAIN,
            )


def map_rows(directory: Path, state: BankState) -> Array:
    """All rows, [next_row, D] of the bank's dtype, as a read-only memory map.

    Raises:
        ArtifactError: the bank file is missing or too short.
    """
    check_length(directory, state)
    dtype, shape = numpy_dtype(state.dtype), (state.next_row, state.width)
    return np.memmap(directory / state.file, dtype, mode="r", shape=shape)


def identity_of(directory: Path, state: BankState) -> tuple[int, int]:
    """Device and inode of the bank file, which another file of the same name does not have."""
    stat = (directory / state.file).stat()
    return stat.st_dev, stat.st_ino


class MappedRows(WatchedFile):
    """The rows of a bank file at one moment.

    Attributes:
        values: [rows, D], a read-only memory map.
    """

    def __init__(self, directory: Path, state: BankState) -> None:
        check_length(directory, state)
        dtype, shape = numpy_dtype(state.dtype), (state.next_row, state.width)
        with (directory / state.file).open("rb") as file:
            super().__init__(file)
            self.values: Array = np.memmap(file, dtype, mode="r", shape=shape)

    def moment(self) -> Moment | None:
        """See `WatchedFile.moment`.

        Raises:
            ArtifactError: the file has become too short for the rows.
        """
        if (size := self.size()) < self.values.nbytes:
            raise ArtifactError(
                f"{self.path}: has become shorter, {size} bytes, expected {self.values.nbytes}",
                remedy=COPY_AGAIN,
            )
        return super().moment()


def check_row(row: BankRow, values: Array) -> None:
    """Compare a row in a memory map of the bank with its checksum.

    Raises:
        ArtifactError: they differ.
    """
    if (found := checksum_of(bytes_of(values[row.number]))) != row.checksum:
        raise ArtifactError(
            f"{getattr(values, 'filename', row.file)}: row {row.number} is {found}, expected "
            f"{row.checksum}",
            remedy=COPY_AGAIN,
        )


def row_bytes(directory: Path, state: BankState, values: Array) -> bytes:
    """The bytes to write for one row.

    Raises:
        UsageError: `values` is not [D] of the bank's dtype.
    """
    if values.shape != (state.width,) or values.dtype.name != state.dtype:
        raise UsageError(
            f"{directory}: the adapter's row is {describe_array(values)}, expected "
            f"[{state.width}] of {state.dtype}"
        )
    return bytes_of(values)


def bytes_of(values: Array) -> bytes:
    """Values as the bytes in the file, in this machine's byte order."""
    return np.ascontiguousarray(values, numpy_dtype(values.dtype.name)).tobytes()


def append_row(directory: Path, state: BankState, data: bytes) -> None:
    """Write a row after the last one and flush it to the disk."""
    descriptor = os.open(directory / state.file, os.O_WRONLY)
    try:
        _write_at(descriptor, data, state.length)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_rows(directory: Path, state: BankState, numbers: Iterable[int], *, to: Path) -> None:
    """Write rows of the bank file, in the order of `numbers`, to a new file, and flush it."""
    with (directory / state.file).open("rb") as old, to.open("xb") as new:
        os.fchmod(new.fileno(), os.fstat(old.fileno()).st_mode & 0o777)
        for number, kept in enumerate(numbers):
            row = os.pread(old.fileno(), state.stride, kept * state.stride)
            _write_at(new.fileno(), row, number * state.stride)
        os.fsync(new.fileno())
    descriptor = os.open(to.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)


def checksum_of(data: bytes) -> str:
    """`sha256:…` of a row's bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def describe_array(values: Array) -> str:
    """Shape and dtype for a message."""
    return f"{list(values.shape)} of {values.dtype.name}"
