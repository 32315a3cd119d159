"""Read rows of files that hold one row on each line: JSONL, and plain text."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from propulsion_export.data.rows import DataRow
from propulsion_export.errors import DataError

TEXT = "text"  # the column of a file of plain texts
_OBJECTS = "Write one JSON object on each line, or a list of them in a .json file."


def read_lines(file: Path) -> Iterator[DataRow]:
    """Rows of a text file: each line that is not blank is the `text` of one."""
    for number, line in enumerate(re.split("\r\n|\r|\n", decoded(file)), start=1):
        if line.strip():
            yield f"line {number}", {TEXT: line}


def read_jsonl(file: Path) -> Iterator[DataRow]:
    """Rows of a file with one JSON object on each line; blank lines are skipped."""
    # Not splitlines: it also splits at characters that a JSON text may contain.
    for number, line in enumerate(decoded(file).split("\n"), start=1):
        if line.strip():
            where = f"line {number}"
            yield where, _object(file, where, _parsed(file, where, line))


def read_json(file: Path) -> Iterator[DataRow]:
    """Rows of a file with one list of JSON objects, or with one object on each line."""
    text = decoded(file)
    if not text.lstrip().startswith("["):
        yield from read_jsonl(file)
        return
    for number, item in enumerate(_parsed(file, "the file", text), start=1):
        yield f"item {number}", _object(file, f"item {number}", item)


def decoded(file: Path) -> str:
    """The text of a UTF-8 file, which may be gzipped, without a byte-order mark.

    Line ends are as in the file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is damaged.
    """
    try:
        content = file.read_bytes()
        if file.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not UTF-8 text", remedy="Save the file as UTF-8."
        ) from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot be read ({reason})") from error


def _parsed(file: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {where} is not JSON ({error})", remedy=_OBJECTS) from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has two values named {twice!r}")
    return found


def _object(file: Path, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{file}: {where} holds a {type(row).__name__}, expected a JSON object",
            remedy=_OBJECTS,
        )
    return row
