"""Read labelled examples from a data file, check every row, and hold some out for validation."""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.base_model.tasks import TASKS, Training
from propulsion_export.data.messages import MESSAGES
from propulsion_export.data.rows import (
    DataRow,
    Item,
    check_columns,
    class_name,
    column_names,
    parse_rows,
    shown,
    wrong_label,
    wrong_text,
    wrong_words,
)
from propulsion_export.data.sources import read_rows
from propulsion_export.errors import DataError

_HELD_OUT = 10  # every tenth example of a class
_MOST_DIGITS = 4000  # Python reads no number of more than 4300


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
    """Read every row of a file, of a directory, or of the data set `owner/name` on a hub.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or damaged; a column is missing;
            a text or label in a row does not fit the task; two labels differ only in how they are
            written. All bad rows are named.
    """
    rows = read_rows(source)
    text, label = _names(columns)
    talks = MESSAGES in column_names(rows)
    remedy = "Train on conversations with --task text-generation." if talks else None
    wanted = {"--text-column": text, "--label-column": label}
    check_columns(source, rows, wanted, remedy=remedy)
    words = TASKS[columns.task].prediction == "word classes"
    parse = _token_example if words else _text_example
    examples = parse_rows(source, rows, lambda row: parse(row, text, label))
    _check_kinds(source, rows, label)
    _check_distinct(source, rows, examples)
    return examples


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


def _names(columns: Columns) -> tuple[str, str]:
    usual = columns.training
    return columns.text or usual.text, columns.label or usual.label


def _text_example(row: Mapping[str, Any], text: str, label: str) -> Example | str:
    """The example in a row, or the finding if the row is bad."""
    if wrong := wrong_text(row, text) or wrong_label(label, row.get(label)):
        return wrong
    return Example(row[text], class_name(row[label]))


def _token_example(row: Mapping[str, Any], text: str, label: str) -> Example | str:
    """The example in a row, or the finding if the row is bad."""
    words: Any = row.get(text)
    labels: Any = row.get(label)
    if wrong := wrong_words(text, words):
        return wrong
    if not isinstance(labels, list):
        return f"{label} is {shown(labels)}, expected a list of class names"
    if len(words) != len(labels):
        return f"has {len(words)} {text} and {len(labels)} {label}, expected one label per word"
    for position, name in enumerate(labels):
        if wrong := wrong_label(f"{label}[{position}]", name):
            return wrong
    return Example(words, [class_name(name) for name in labels])


def _check_kinds(source: Path, rows: Sequence[DataRow], label: str) -> None:
    """Refuse a directory in which one file has class numbers and another one class names."""
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for where, row in rows:
        file = where.rpartition(", ")[0]  # empty where the source is one file
        values = row[label] if isinstance(row[label], list) else [row[label]]
        kinds[file] |= {_kind_of(value) for value in values}
    numbered = next((file for file, found in kinds.items() if found == {"number"}), None)
    named = next((file for file, found in kinds.items() if found == {"name"}), None)
    if numbered is not None and named is not None:
        raise DataError(
            f"{source}: {numbered} has class numbers and {named} class names, expected one of both",
            remedy="Write the names in every file.",
        )


def _kind_of(label: object) -> str:
    if isinstance(label, bool):
        return "truth"
    named = isinstance(label, str) and not _is_whole_number(label)
    return "name" if named else "number"


def _check_distinct(source: Path, rows: Sequence[DataRow], examples: Sequence[Example]) -> None:
    """Refuse classes that differ only in how their names are written."""
    first: dict[str, str] = {}
    for (where, _), example in zip(rows, examples, strict=True):
        for name in example.labels:
            first.setdefault(name, where)
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for name in first:
        spellings[_as_read(name)].append(f"{name!r} ({first[name]})")
    findings = [
        f"{source}: the labels {' and '.join(names)} differ only in how they are written"
        for names in spellings.values()
        if len(names) > 1
    ]
    if findings:
        raise DataError(*findings, remedy="Write each class in one way.")


def _as_read(name: str) -> str:
    """A class name without differences that a reader does not see, or takes for none."""
    name = unicodedata.normalize("NFC", name).strip()
    if _is_whole_number(name):
        return str(int(name))
    return name.lower() if name.lower() in ("true", "false") else name


def _is_whole_number(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS
