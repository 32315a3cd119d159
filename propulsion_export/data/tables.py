"""Read rows of files that hold a table: CSV and Parquet."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from propulsion_export.data.class_names import with_class_names
from propulsion_export.data.lines import decoded
from propulsion_export.data.rows import DataRow
from propulsion_export.errors import DataError, UnavailableError, first_line

_LARGEST_CELL = 2**31 - 1  # in characters: what every platform's `csv` takes
_SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}


def read_csv(file: Path) -> Iterator[DataRow]:
    """Rows of a CSV file with a header; every cell is the text that stands there.

    Raises:
        DataError: it is damaged, two columns have one name, or it is separated by something else
            than commas.
    """
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.DictReader(io.StringIO(decoded(file), newline=""), strict=True)
    try:
        header = reader.fieldnames or ()
        _check_separator(file, header)
        _check_names(file, header)
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"{file}: row {number} has more fields than the header, expected {len(header)}",
                    remedy="Put a text that holds commas in double quotes.",
                )
            yield f"row {number}", row
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num} is not CSV ({error})") from error


def read_parquet(file: Path) -> Iterator[DataRow]:
    """Rows of a Parquet file; class numbers get the names that `datasets` wrote with them.

    Raises:
        DataError: it is damaged, or two columns have one name.
        UnavailableError: pyarrow is not installed.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{file}: only pyarrow reads Parquet, which is not installed",
            remedy="Run: pip install pyarrow.",
        ) from error
    try:
        with file.open("rb") as opened:
            stored = pyarrow.parquet.ParquetFile(opened)
            _check_names(file, stored.schema_arrow.names)
            rows = stored.read().to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: is no readable Parquet file ({first_line(error)})") from error
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    yield from with_class_names(numbered, _features(stored.schema_arrow.metadata or {}))


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """The columns as `datasets` describes them in a file that it wrote; none in another's."""
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}"))
        features = described["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _check_separator(file: Path, header: Sequence[str]) -> None:
    if len(header) != 1:
        return
    for separator, name in _SEPARATORS.items():
        if separator in header[0]:
            raise DataError(
                f"{file}: has the columns {header[0]!r} separated by {name}, expected commas",
                remedy="Save it as CSV with commas.",
            )


def _check_names(file: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"{file}: has two columns named {', '.join(map(repr, twice))}, expected one of a name",
            remedy="Rename or remove one.",
        )
