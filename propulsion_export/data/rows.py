"""Rows of data, the columns they have, and the checks of single values."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from propulsion_export.environment.locale_encoding import LOCALE_REMEDY, unread_bytes
from propulsion_export.errors import DataError

# The name of a row in messages, such as "line 3" or "row 3", and the row as it is in the file.
DataRow = tuple[str, Mapping[str, Any]]

Item = TypeVar("Item")

_LONGEST_SHOWN = 40
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class UnnamedClass:
    """A class number that the data set has no name for.

    Attributes:
        number: the number; -1 says that a row has no label.
        count: how many classes have names.
    """

    number: int
    count: int

    def __str__(self) -> str:
        meaning = ", which says that the row has no label" if self.number == -1 else ""
        return f"class number {self.number}{meaning}"


def parse_rows(
    source: Path, rows: Sequence[DataRow], parse: Callable[[Mapping[str, Any]], Item | str]
) -> list[Item]:
    """Parse every row; for a bad row, `parse` returns the finding as a string.

    Raises:
        DataError: there are bad rows; all of them are named.
    """
    items: list[Item] = []
    findings = []
    for where, row in rows:
        item = parse(row)
        if isinstance(item, str):
            findings.append(f"{source}: {where}: {item}")
        else:
            items.append(item)
    if findings:
        raise DataError(*findings, remedy="Correct or remove these rows.")
    return items


def column_names(rows: Sequence[DataRow]) -> list[str]:
    """The columns that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def check_columns(
    source: Path, rows: Sequence[DataRow], wanted: Mapping[str, str], *, remedy: str | None = None
) -> None:
    """Refuse rows that lack a column.

    Args:
        source: the file or data set that the rows come from.
        rows: the rows to check.
        wanted: column names by the command's option for them.
        remedy: what to do; default: name the column with its option.

    Raises:
        DataError: a column is missing from all rows.
    """
    found = column_names(rows)
    missing = {option: name for option, name in wanted.items() if name not in found}
    if missing:
        raise DataError(
            *(
                f"{source}: has no column {name!r}, found {', '.join(map(repr, found))}"
                for name in missing.values()
            ),
            remedy=remedy or f"Name the column with {' and '.join(missing)}.",
        )


def wrong_text(row: Mapping[str, Any], column: str) -> str | None:
    """The finding if a column's value is not a text to read, else None."""
    text = row.get(column)
    if not isinstance(text, str):
        return f"{column} is {shown(text)}, expected a string"
    if not text.strip():
        return f"{column} is empty, expected a text"
    return half_character(column, text)


def wrong_words(place: str, words: object) -> str | None:
    """The finding if a value is not a list of words, else None."""
    if not isinstance(words, list | tuple) or not words:
        return f"{place} is {shown(words)}, expected a list of words"
    for position, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            return f"{place}[{position}] is {shown(word)}, expected a word"
        if wrong := half_character(f"{place}[{position}]", word):
            return wrong
    return None


def wrong_label(place: str, value: object) -> str | None:
    """The finding if a value is not a class name, else None.

    Args:
        place: the column, with the position in a list of labels.
        value: what is found there.
    """
    if isinstance(value, UnnamedClass):
        return f"{place} is {value}, expected 0 to {value.count - 1}"
    if not isinstance(value, int) and not (isinstance(value, str) and value.strip()):
        return f"{place} is {shown(value)}, expected a class name"
    return half_character(place, str(value))


def half_character(place: str, text: str) -> str | None:
    """The finding if a text holds half a character, which no tokenizer reads, else None."""
    found = _SURROGATE.search(text)
    if found is None:
        return None
    if finding := unread_bytes(text):
        return f"{place} {finding}. {LOCALE_REMEDY.removesuffix('.')}"
    code = ord(found[0])
    # What a command line's bytes become where they are no UTF-8, see PEP 383.
    byte = f"; or a byte that is no UTF-8, {code - 0xDC00:#x}" if 0xDC80 <= code <= 0xDCFF else ""
    return (
        f"{place} holds half a character (the lone surrogate \\u{code:04x} at {found.start()}"
        f"{byte}), expected whole ones"
    )


def class_name(value: str | int) -> str:
    """The class name for a string, a whole number, or a JSON `true` or `false`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def shown(value: object) -> str:
    """A value as a message shows it, on one line of at most 40 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
