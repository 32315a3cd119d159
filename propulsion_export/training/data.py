"""Read labelled examples from a data file, check every row, and hold some out for validation."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from propulsion_export.base_model.tasks import TASKS, Training
from propulsion_export.errors import DataError
from propulsion_export.training.dataset import DataRow
from propulsion_export.training.files import read_rows

_HELD_OUT = 10  # every tenth example of a class

Item = TypeVar("Item")


@dataclass(frozen=True)
class Columns:
    """The columns with the inputs and the labels of a task; None: the task's usual names."""

    task: str
    text: str | None = None
    label: str | None = None

    @property
    def training(self) -> Training:
        """How adapters are trained for the task, with its usual columns."""
        training = TASKS[self.task].training
        assert training is not None
        return training


@dataclass(frozen=True)
class Example:
    """One input and its label, as text.

    `text` is a string, or for token classification a list of words; `label` is a class name, or a
    list with one for each word.
    """

    text: str | list[str]
    label: str | list[str]

    @property
    def labels(self) -> list[str]:
        """The class names as a list: one, or one per word."""
        return [self.label] if isinstance(self.label, str) else self.label

    @property
    def stratum(self) -> str:
        """The group to hold a tenth out of: a text's class, or one group of all word lists."""
        return self.label if isinstance(self.label, str) else ""


def read_examples(source: Path, columns: Columns) -> list[Example]:
    """Read every row of a JSONL, CSV or Parquet file, or of a data set that `datasets` loads.

    Such a data set is a directory, or `owner/name` on a hub.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or damaged; a column is missing;
            a text or label in a row does not fit the task. All bad rows are named.
    """
    rows = read_rows(source)
    text, label = _names(columns)
    check_columns(source, rows, {"--text-column": text, "--label-column": label})
    words = TASKS[columns.task].prediction == "word classes"
    parse = _token_example if words else _text_example
    return parse_rows(source, rows, lambda row: parse(row, text, label))


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


def classes_of(source: Path, examples: Sequence[Example]) -> list[str]:
    """The class names, sorted by number if all are whole numbers, else as text.

    Raises:
        DataError: there is only one class, so there is nothing to learn.
    """
    names = {label for example in examples for label in example.labels}
    if len(names) < 2:
        raise DataError(
            f"{source}: every row has the label {next(iter(names))!r}, expected two classes or more"
        )
    return sorted(names, key=int if all(map(_is_whole_number, names)) else str)


def check_labels_known(source: Path, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Refuse examples with a label that is not in the training data.

    Raises:
        DataError: there is such a label; all of them are named.
    """
    unknown = sorted({label for example in examples for label in example.labels} - set(classes))
    if unknown:
        raise DataError(
            f"{source}: the labels {', '.join(map(repr, unknown))} do not occur in the training "
            f"data, expected only {', '.join(map(repr, classes))}"
        )


def hold_out(
    source: Path,
    items: Sequence[Item],
    seed: int,
    *,
    stratum: Callable[[Item], str],
) -> tuple[list[Item], list[Item]]:
    """Split into training and validation items, a tenth of each stratum held out.

    At least one item of each stratum with two or more is held out. Both parts keep the order of
    `items`.

    Raises:
        DataError: no stratum has two items.
    """
    strata: defaultdict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        strata[stratum(item)].append(index)
    chooser = random.Random(seed)
    held_out: set[int] = set()
    for name in sorted(strata):
        members = strata[name]
        count = min(len(members) - 1, max(1, round(len(members) / _HELD_OUT)))
        held_out |= set(chooser.sample(members, count))
    if not held_out:
        raise DataError(
            f"{source}: holds {len(items)} rows, too few to hold some out for validation",
            remedy="Name validation data with --validation.",
        )
    training = [item for index, item in enumerate(items) if index not in held_out]
    return training, [items[index] for index in sorted(held_out)]


def column_names(rows: Sequence[DataRow]) -> list[str]:
    """The columns that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def check_columns(source: Path, rows: Sequence[DataRow], wanted: Mapping[str, str]) -> None:
    """Refuse rows that lack a column.

    Args:
        source: the file or data set that the rows come from.
        rows: the rows to check.
        wanted: column names by the command's option for them.

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
            remedy=f"Name the column with {' and '.join(missing)}.",
        )


def wrong_text(row: Mapping[str, Any], column: str) -> str | None:
    """The finding if a column's value is not a text to train on, else None."""
    text = row.get(column)
    if not isinstance(text, str):
        return f"{column} is {_shown(text)}, expected a string"
    return None if text.strip() else f"{column} is empty, expected a text"


def _names(columns: Columns) -> tuple[str, str]:
    usual = columns.training
    return columns.text or usual.text, columns.label or usual.label


def _text_example(row: Mapping[str, Any], text: str, label: str) -> Example | str:
    """The example in a row, or the finding if the row is bad."""
    if wrong := wrong_text(row, text):
        return wrong
    name = _label(row.get(label))
    if name is None:
        return f"{label} is {_shown(row.get(label))}, expected a class name"
    return Example(row[text], name)


def _token_example(row: Mapping[str, Any], text: str, label: str) -> Example | str:
    """The example in a row, or the finding if the row is bad."""
    words, labels = row.get(text), row.get(label)
    if not isinstance(words, list) or not words:
        return f"{text} is {_shown(words)}, expected a list of words"
    if not isinstance(labels, list):
        return f"{label} is {_shown(labels)}, expected a list of class names"
    if len(words) != len(labels):
        return f"has {len(words)} {text} and {len(labels)} {label}, expected one label per word"
    for position, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            return f"{text}[{position}] is {_shown(word)}, expected a word"
    names = [_label(name) for name in labels]
    if None in names:
        position = names.index(None)
        return f"{label}[{position}] is {_shown(labels[position])}, expected a class name"
    return Example(words, [name for name in names if name is not None])


def _label(value: object) -> str | None:
    """The class name for a string or a whole number; None for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _shown(value: object) -> str:
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _is_whole_number(name: str) -> bool:
    return name.removeprefix("-").isascii() and name.removeprefix("-").isdigit()
