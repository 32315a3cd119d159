"""Read the rows of a JSONL, CSV or Parquet file, or of a data set, without checking them."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.errors import DataError, first_line
from propulsion_export.training.dataset import DataRow, is_hub_name, read_dataset

# Endings of the files that `datasets` reads in a directory.
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst")


def read_rows(source: Path) -> list[DataRow]:
    """Read every row of a file, or of what `datasets` loads: a directory or `owner/name` on a hub.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or damaged.
    """
    inside = (file for file in sorted(source.rglob("*")) if file.suffix.lower() in _DATA)
    refuse_pointers(inside if source.is_dir() else [source], DataError)
    rows = list(_reader(source)(source))
    if not rows:
        raise DataError(f"{source}: holds no rows, expected at least one")
    return rows


def _reader(source: Path) -> Callable[[Path], Iterator[DataRow]]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    suffix = source.suffix.lower()
    if source.is_dir() or (suffix not in readers and is_hub_name(source)):
        return read_dataset
    if not source.exists():
        raise DataError(
            f"{source}: does not exist, expected a file or directory with data, or the name of a "
            "data set on a hub, owner/name"
        )
    if suffix not in readers:
        raise DataError(
            f"{source}: has the suffix {source.suffix!r}, expected one of {', '.join(readers)}"
        )
    return readers[suffix]


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: byte {error.start} is not UTF-8 text", remedy="Save the file as UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error


def _read_jsonl(source: Path) -> Iterator[DataRow]:
    # Not splitlines: it also splits at characters that a JSON text may contain.
    for number, line in enumerate(_read_text(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{source}: line {number} is not JSON ({error})",
                remedy="Each line must hold one JSON object.",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{source}: line {number} holds a {type(row).__name__}, expected a JSON object",
                remedy="Each line must hold one JSON object.",
            )
        yield f"line {number}", row


def _read_csv(source: Path) -> Iterator[DataRow]:
    reader = csv.DictReader(io.StringIO(_read_text(source), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"{source}: row {number} has more fields than the header, expected "
                    f"{len(reader.fieldnames or [])}",
                    remedy="Put a text that holds commas in double quotes.",
                )
            yield f"row {number}", row
    except csv.Error as error:
        raise DataError(f"{source}: line {reader.line_num} is not CSV ({error})") from error


def _read_parquet(source: Path) -> Iterator[DataRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows = pyarrow.parquet.read_table(source).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: is no readable Parquet file ({first_line(error)})") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
