"""Read the texts, or lists of words, that a model is to answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from propulsion_export.base_model.tasks import TASKS
from propulsion_export.data.files import read_file
from propulsion_export.data.lines import TEXT, read_lines
from propulsion_export.data.rows import (
    DataRow,
    column_names,
    parse_rows,
    wrong_text,
    wrong_words,
)
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.errors import DataError


def read_texts(file: Path, task: str) -> list[str | list[str]]:
    """The texts of a data file, from the column `text` or the task's own column for training.

    A file without a suffix holds one text per line. For token classification a row may be a list
    of words, as in training.

    Raises:
        DataError: the file is missing, empty or damaged; it has neither column, or both; a row has
            no text.
    """
    refuse_pointers([file], DataError)
    rows = list(read_file(file) if file.suffix else read_lines(file))
    if not rows:
        raise DataError(f"{file}: is empty, expected at least one text")
    column = _column(file, rows, task)
    lists = TASKS[task].prediction == "word classes"
    parsed = parse_rows(file, rows, lambda row: _parsed(row, column, lists=lists))
    return [text for (text,) in parsed]


def _column(file: Path, rows: Sequence[DataRow], task: str) -> str:
    training = TASKS[task].training
    columns = dict.fromkeys((TEXT, training.text if training else TEXT))
    found = column_names(rows)
    there = [column for column in columns if column in found]
    expected = " or ".join(map(repr, columns))
    if not there:
        raise DataError(
            f"{file}: has no column {expected}, found {', '.join(map(repr, found))}",
            remedy="Rename the column of texts.",
        )
    if len(there) > 1:
        raise DataError(
            f"{file}: has the columns {' and '.join(map(repr, there))}, expected one of them",
            remedy="Remove the one that is not to be read.",
        )
    return there[0]


def _parsed(row: Mapping[str, Any], column: str, *, lists: bool) -> tuple[str | list[str]] | str:
    """The text in a row, or the finding if the row is bad."""
    value: Any = row.get(column)
    words = lists and isinstance(value, list)
    wrong = wrong_words(column, value) if words else wrong_text(row, column)
    return wrong or (value,)
