"""Read the rows of a directory of data files, each as it is read alone."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from propulsion_export.data.card import Card, read_card
from propulsion_export.data.class_names import with_class_names
from propulsion_export.data.files import kind_of, read_file
from propulsion_export.data.rows import DataRow
from propulsion_export.errors import DataError

# The words that name a split, as in `datasets`.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Files that describe data and hold none.
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json"}


def read_directory(directory: Path) -> Iterator[DataRow]:
    """Read the data files in a directory and its folders, in the order of their names.

    If folders or files are named after splits, only those of `train` are read. A README.md may
    name the files of `train` and the classes, as on a hub.

    Raises:
        DataError: there is no data file, none of `train`, or there are files of several kinds; a
            file is damaged.
    """
    card = read_card(directory)
    files = _files_of(directory, card)
    kinds = sorted({str(kind_of(file)) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{directory}: holds {' and '.join(kinds)} files, expected one kind",
            remedy="Give one of them, or a directory with one kind.",
        )
    return with_class_names(_rows(directory, files), card.features)


def _rows(directory: Path, files: Sequence[Path]) -> Iterator[DataRow]:
    for file in files:
        place = file.relative_to(directory)
        yield from ((f"{place}, {where}", row) for where, row in read_file(file))


def _files_of(directory: Path, card: Card) -> list[Path]:
    """The files to train on: those that the card names, or those of `train`, or all."""
    if card.patterns is not None:
        return _named(directory, card.patterns)
    files = sorted(_data_files(directory))
    rows = [file for file in files if kind_of(file) != ".txt"]  # beside them are licences and notes
    return _of_train(directory, rows or files)


def _named(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """The data files of the patterns, all inside the directory."""
    inside = [one for one in patterns if one and not {"/", ".."} & set(Path(one).parts)]
    found = {file for pattern in inside for file in directory.glob(pattern)}
    files = sorted(file for file in found if file.is_file() and kind_of(file))
    if not files:
        names = ", ".join(map(repr, patterns)) or "none"
        raise DataError(
            f"{directory / 'README.md'}: names as files of 'train' {names}, expected data files in "
            "this directory"
        )
    return files


def _of_train(directory: Path, files: Sequence[Path]) -> list[Path]:
    if not files:
        raise DataError(
            f"{directory}: holds no data files, expected JSONL, CSV, Parquet or text files, or a "
            "data set that `save_to_disk` wrote"
        )
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(directory)), []).append(file)
    if by_split.keys() == {None}:
        return by_split[None]
    if "train" not in by_split:
        found = ", ".join(sorted(split for split in by_split if split))
        raise DataError(f"{directory}: has the splits {found}, expected 'train'")
    return by_split["train"]


def _data_files(directory: Path) -> Iterator[Path]:
    """The data files in a directory and its folders, links followed; nothing hidden."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(directory, onerror=_refuse, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [
            name
            for name in folders
            if not _is_hidden(name) and os.path.realpath(Path(folder, name)) not in seen
        ]
        for name in names:
            file = Path(folder, name)
            if kind_of(file) and not _is_hidden(name) and name not in _NO_DATA and file.is_file():
                yield file


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _split_of(place: Path) -> str | None:
    """The split that a folder's name says, else the file's; None if neither does."""
    for part in place.parts:
        words = set(re.split(r"[-._ 0-9]+", part.lower()))
        for split, names in _SPLITS.items():
            if words & names:
                return split
    return None
