"""Labelled examples from files: read, checked row by row, split."""

import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from propulsion_export.errors import DataError
from propulsion_export.training.dataset import Row, is_hub_name, read_dataset

Task = Literal["text-classification", "token-classification"]

COLUMNS: dict[Task, tuple[str, str]] = {
    "text-classification": ("text", "label"),
    "token-classification": ("tokens", "labels"),
}
_HELD_OUT = 10  # every tenth example of a class


@dataclass(frozen=True)
class Columns:
    """Which columns hold the inputs and the labels of a task."""

    task: Task
    text: str
    label: str


@dataclass(frozen=True)
class Example:
    """One input and its label, as text.

    `text` is a string, or for token classification a list of words; `label` is a class name, or one
    for each word.
    """

    text: str | list[str]
    label: str | list[str]

    @property
    def labels(self) -> list[str]:
        """The class names in it: one, or one a word."""
        return [self.label] if isinstance(self.label, str) else self.label


def read_examples(source: Path, columns: Columns) -> list[Example]:
    """Read every row of a JSONL, CSV or Parquet file, or of a data set that `datasets` loads.

    That is a directory, or the name of one on a hub, which reads `owner/name`.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or damaged; a column is missing;
            a text or label in a row is not what the task needs. All bad rows are named.
    """
    rows = list(_reader(source)(source))
    if not rows:
        raise DataError(f"{source}: holds no rows, expected at least one")
    _check_columns(source, rows, columns)
    parse = _text_example if columns.task == "text-classification" else _token_example
    examples, findings = [], []
    for where, row in rows:
        example = parse(row, columns)
        if isinstance(example, str):
            findings.append(f"{source}: {where}: {example}")
        else:
            examples.append(example)
    if findings:
        raise DataError(*findings, remedy="Correct or remove these rows.")
    return examples


def classes_of(source: Path, examples: Sequence[Example]) -> list[str]:
    """The class names, sorted: by number where all are whole numbers, else as text.

    Raises:
        DataError: there is only one class, so that there is nothing to learn.
    """
    names = {label for example in examples for label in example.labels}
    if len(names) < 2:
        raise DataError(
            f"{source}: every row has the label {next(iter(names))!r}, expected two classes or more"
        )
    return sorted(names, key=int if all(map(_is_whole_number, names)) else str)


def check_labels_known(source: Path, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Refuse examples with a label that training never saw.

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
    source: Path, examples: Sequence[Example], seed: int
) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples, a tenth of each class held out.

    At least one example of each class that has two is held out. For token classification all rows
    count as one class. Both parts keep the order of `examples`.

    Raises:
        DataError: no class has two examples.
    """
    by_class: defaultdict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_class[example.label if isinstance(example.label, str) else ""].append(index)
    chooser = random.Random(seed)
    held_out: set[int] = set()
    for name in sorted(by_class):
        members = by_class[name]
        count = min(len(members) - 1, max(1, round(len(members) / _HELD_OUT)))
        held_out |= set(chooser.sample(members, count))
    if not held_out:
        raise DataError(
            f"{source}: holds {len(examples)} rows, too few to hold some out for validation",
            remedy="Name validation data with --validation.",
        )
    training = [example for index, example in enumerate(examples) if index not in held_out]
    return training, [examples[index] for index in sorted(held_out)]


def _reader(source: Path) -> Callable[[Path], Iterator[Row]]:
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


def _read_jsonl(source: Path) -> Iterator[Row]:
    # Not splitlines: a text may hold one of the other characters that it takes for a line's end.
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


def _read_csv(source: Path) -> Iterator[Row]:
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


def _read_parquet(source: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows = pyarrow.parquet.read_table(source).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{source}: is no readable Parquet file ({reason})") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _check_columns(source: Path, rows: Sequence[Row], columns: Columns) -> None:
    found = list(dict.fromkeys(name for _, row in rows for name in row))
    wanted = {"--text-column": columns.text, "--label-column": columns.label}
    missing = {option: name for option, name in wanted.items() if name not in found}
    if missing:
        raise DataError(
            *(
                f"{source}: has no column {name!r}, found {', '.join(map(repr, found))}"
                for name in missing.values()
            ),
            remedy=f"Name the column with {' and '.join(missing)}.",
        )


def _text_example(row: Mapping[str, Any], columns: Columns) -> Example | str:
    """The example in a row, or what is wrong with the row."""
    text, label = row.get(columns.text), _label(row.get(columns.label))
    if not isinstance(text, str):
        return f"{columns.text} is {_shown(text)}, expected a string"
    if not text.strip():
        return f"{columns.text} is empty, expected a text"
    if label is None:
        return f"{columns.label} is {_shown(row.get(columns.label))}, expected a class name"
    return Example(text, label)


def _token_example(row: Mapping[str, Any], columns: Columns) -> Example | str:
    """The example in a row, or what is wrong with the row."""
    words, labels = row.get(columns.text), row.get(columns.label)
    if not isinstance(words, list) or not words:
        return f"{columns.text} is {_shown(words)}, expected a list of words"
    if not isinstance(labels, list):
        return f"{columns.label} is {_shown(labels)}, expected a list of class names"
    if len(words) != len(labels):
        return (
            f"has {len(words)} {columns.text} and {len(labels)} {columns.label}, "
            "expected one label a word"
        )
    for position, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            return f"{columns.text}[{position}] is {_shown(word)}, expected a word"
    names = [_label(label) for label in labels]
    if None in names:
        position = names.index(None)
        shown = _shown(labels[position])
        return f"{columns.label}[{position}] is {shown}, expected a class name"
    return Example(words, [name for name in names if name is not None])


def _label(value: object) -> str | None:
    """The class name, of a string or a whole number; None of anything else."""
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
