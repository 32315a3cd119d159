"""Read the rows of a data file by its suffix, without checking what they hold."""

from collections.abc import Callable, Iterator
from pathlib import Path

from propulsion_export.data.lines import read_json, read_jsonl, read_lines
from propulsion_export.data.rows import DataRow
from propulsion_export.data.tables import read_csv, read_parquet
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.errors import DataError

_READERS: dict[str, Callable[[Path], Iterator[DataRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_lines,
}


def read_file(file: Path) -> Iterator[DataRow]:
    """Read the rows of a JSONL, CSV, Parquet or text file.

    Raises:
        DataError: the file is missing, of an unknown kind or damaged.
    """
    if not file.exists():
        raise DataError(f"{file}: does not exist, expected a file with data")
    refuse_pointers([file], DataError)
    kind = kind_of(file)
    if kind is None:
        raise DataError(
            f"{file}: has the suffix {file.suffix!r}, expected one of {', '.join(_READERS)}"
        )
    return _READERS[kind](file)


def kind_of(file: Path) -> str | None:
    """The suffix that says how a file is read, without `.gz`; None if it is not read."""
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in _READERS else None
