"""Read a merged checkpoint again and compare it with what it was made from."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from propulsion_export.artifacts.artifact import digest_of
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor, stored_tensors
from propulsion_export.environment.page_cache import forget_cached
from propulsion_export.errors import BaseModelError, VerificationError
from propulsion_export.merging.changes import Change, Computed, Copied, Given, Scaled
from propulsion_export.merging.files import WeightFile
from propulsion_export.merging.plan import written_dtype, written_shape
from propulsion_export.merging.writing import Output

REMEDY = "Merge again; if it differs again, check the disk and the memory."
_ROWS = 8  # of each tensor, the first and the last among them


def verify_output(output: Output, digests: Mapping[str, str]) -> None:
    """Compare the weight files of an output with their digests and with the base model.

    Every byte is read from the disk and hashed; names, shapes and dtypes are compared, and of every
    tensor some rows: recomputed in float64 from the base model's, they have to be the same bits.

    Args:
        output: what was written.
        digests: of its files, by name, taken while they were written.

    Raises:
        VerificationError: something differs; names the file or the tensors.
    """
    findings = [
        finding
        for file in output.files
        for finding in _differences(output.directory / file.name, file, digests[file.name])
    ]
    if findings:
        raise VerificationError(*findings, remedy=REMEDY)


def _differences(path: Path, file: WeightFile, digest: str) -> Iterator[str]:
    forget_cached(path)
    if digest_of(path) != digest:
        yield f"{path.name}: what is on the disk is not what was written"
        return
    try:
        found = stored_tensors(path)
    except BaseModelError as error:
        yield from error.findings
        return
    if found.keys() != file.changes.keys():
        different = sorted(found.keys() ^ file.changes.keys())
        yield f"{path.name}: has other tensors than planned ({different[0]}, …)"
        return
    for name, change in file.changes.items():
        if problem := _difference(found[name], change):
            yield f"{name}: {problem}"


def _difference(found: StoredTensor, change: Change) -> str | None:
    planned = (written_dtype(change), written_shape(change))
    if (found.dtype, found.shape) != planned:
        return f"is {found.dtype} {list(found.shape)}, expected {planned[0]} {list(planned[1])}"
    if isinstance(change, Computed):
        change = Given(change.values)
    rows = _flat_rows(found.shape)[0]
    for row in _sample(rows):
        if not np.array_equal(_bits(_row(found, row)), _bits(_expected(change, row))):
            return f"row {row} is not the base model's row times its scale"
    return None


def _sample(rows: int) -> list[int]:
    """Some rows, the same for a tensor of the same size."""
    if rows <= _ROWS:
        return list(range(rows))
    chosen = random.Random(rows).sample(range(1, rows - 1), _ROWS - 2)
    return sorted({0, rows - 1, *chosen})


def _flat_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: its last axis, and how often it has it."""
    columns = shape[-1] if shape else 1
    return int(np.prod(shape[:-1], dtype=np.int64)) if columns else 0, columns


def _row(stored: StoredTensor, row: int) -> Array:
    columns = _flat_rows(stored.shape)[1]
    width = columns * DTYPES[stored.dtype].itemsize
    if type(stored) is not StoredTensor:  # a GGUF file's, computed as a whole
        values: Array = stored.read().reshape(-1, columns)[row]
        return values
    return StoredTensor(stored.file, stored.offset + row * width, (columns,), stored.dtype).read()


def _expected(change: Copied | Scaled | Given, row: int) -> Array:
    if isinstance(change, Given):
        given: Array = change.values.reshape(_flat_rows(change.values.shape))[row]
        return given
    values = _row(change.stored, row)
    if not isinstance(change, Scaled):
        return values
    shape = change.stored.shape or (1,)
    place = np.unravel_index(row, shape[:-1]) if len(shape) > 1 else ()
    factors = np.broadcast_to(np.asarray(change.factors, np.float64), shape)[place]
    return rounded(values.astype(np.float64) * factors, DTYPES[written_dtype(change)])


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint8)
