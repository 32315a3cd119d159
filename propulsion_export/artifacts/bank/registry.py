"""What the registry says: of the whole bank, and whose each of its rows is."""

import json
import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from propulsion_export.adapters.names import BASE_NAME, is_fit_name
from propulsion_export.artifacts.file_names import ADAPTERS
from propulsion_export.artifacts.manifest import ADD_ONE, AdapterEntry
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.errors import ArtifactError, unknown_adapters

BANK_FILE = f"{ADAPTERS}/bank.bin"  # until rows are given back: then bank-1.bin, and so on
REGISTRY_FILE = f"{ADAPTERS}/registry.sqlite"
REGISTRY_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
COPY_AGAIN = "Copy the whole directory again, or export again."

_BANK_NAME = re.compile(rf"{ADAPTERS}/bank(?:-([1-9]\d{{0,8}}))?\.bin")
_TABLES = (
    "CREATE TABLE bank (file TEXT NOT NULL, dtype TEXT NOT NULL, width INTEGER NOT NULL,"
    " next_row INTEGER NOT NULL, version INTEGER NOT NULL, base_checksum TEXT NOT NULL)",
    "CREATE TABLE adapters (name TEXT NOT NULL PRIMARY KEY, number INTEGER NOT NULL UNIQUE,"
    " entry TEXT NOT NULL, checksum TEXT NOT NULL)",
)


@dataclass(frozen=True)
class BankRow:
    """One adapter's row: where it lies, what it was made from and what its bytes must be.

    `number` counts in `file` alone, a path inside the artifact's directory: another file numbers
    its rows anew. `checksum` is `sha256:…` of the row's bytes.
    """

    number: int
    entry: AdapterEntry
    checksum: str
    file: str = BANK_FILE


class State(NamedTuple):
    """What the registry says of the whole bank."""

    file: str
    dtype: str
    width: int
    next_row: int
    version: int
    base_checksum: str

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return self.width * numpy_dtype(self.dtype).itemsize

    @property
    def length(self) -> int:
        """Bytes of all rows that count."""
        return self.next_row * self.stride


# Names of files


def is_bank_file(name: str) -> bool:
    """Whether a path inside an artifact's directory is the bank's, which vouches for it itself."""
    return has_rows(name) or name in (REGISTRY_FILE, f"{REGISTRY_FILE}-journal")


def has_rows(name: str) -> bool:
    """Whether a path inside an artifact's directory is the name of a file of rows."""
    return _BANK_NAME.fullmatch(name) is not None


def next_file(file: str) -> str:
    """The name that the file of rows gets when it is written anew."""
    match = _BANK_NAME.fullmatch(file)
    assert match is not None  # as read_state has seen to
    return f"{ADAPTERS}/bank-{int(match[1] or 0) + 1}.bin"


# The whole bank


def create_tables(db: sqlite3.Connection, state: State) -> None:
    """Make a registry without adapters."""
    for table in _TABLES:
        db.execute(table)
    db.execute("INSERT INTO bank VALUES (?, ?, ?, ?, ?, ?)", state)
    db.execute(f"PRAGMA user_version = {REGISTRY_VERSION}")


def read_state(directory: Path, db: sqlite3.Connection) -> State:
    """What it says of the whole bank.

    Raises:
        ArtifactError: it is of another version, or says what cannot be.
    """
    file = directory / REGISTRY_FILE
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != REGISTRY_VERSION:
        newer = version > REGISTRY_VERSION
        raise ArtifactError(
            f"{file}: schema version is {version}, expected {REGISTRY_VERSION}",
            remedy="Upgrade propulsion-export to read it." if newer else COPY_AGAIN,
        )
    found = db.execute(f"SELECT {', '.join(State._fields)} FROM bank").fetchall()
    if len(found) != 1 or not _is_possible(state := State(*found[0])):
        raise ArtifactError(
            f"{file}: says {found} of the bank, expected its file, dtype, width and rows",
            remedy=COPY_AGAIN,
        )
    return state


def _is_possible(state: State) -> bool:
    return (
        isinstance(state.file, str)
        and has_rows(state.file)
        and state.dtype in DTYPES
        and all(isinstance(n, int) for n in (state.width, state.next_row, state.version))
        and min(state.width, state.next_row) > 0
        and isinstance(state.base_checksum, str)
    )


def check_numbers(directory: Path, db: sqlite3.Connection, state: State) -> None:
    """Refuse rows of adapters that are not among those that count, [1, next_row).

    Raises:
        ArtifactError: there is such a row.
    """
    # Two questions, because SQLite answers each from the index and both only from a scan.
    (first,) = db.execute("SELECT min(number) FROM adapters").fetchone()
    (last,) = db.execute("SELECT max(number) FROM adapters").fetchone()
    # A text is more than any number, so that one of another kind is the last.
    whole = isinstance(first, int) and isinstance(last, int)
    if first is not None and not (whole and 0 < first <= last < state.next_row):
        raise ArtifactError(
            f"{directory / REGISTRY_FILE}: names rows {first} to {last}, expected rows "
            f"from 1 to {state.next_row - 1}",
            remedy=COPY_AGAIN,
        )


def advance(db: sqlite3.Connection, file: str, next_row: int) -> None:
    """End a change: where the rows are now, and how many."""
    changed = "UPDATE bank SET file = ?, next_row = ?, version = version + 1"
    db.execute(changed, (file, next_row))


# Whose each row is


def base_row(state: State) -> BankRow:
    """The base model's row."""
    entry = AdapterEntry(state.base_checksum, BASE_NAME, 0)
    return BankRow(0, entry, state.base_checksum, state.file)


def all_rows(directory: Path, db: sqlite3.Connection, state: State) -> dict[str, BankRow]:
    """The rows of all adapters by name, in the order of their names, without the base model."""
    found = db.execute("SELECT name, number, entry, checksum FROM adapters ORDER BY name")
    return {name: _row_of(directory, state, columns) for name, *columns in found}


def rows_from(
    directory: Path, db: sqlite3.Connection, state: State, number: int
) -> dict[str, BankRow]:
    """The rows of adapters, by name, that have this number or a higher one."""
    asked = "SELECT name, number, entry, checksum FROM adapters WHERE number >= ?"
    found = db.execute(asked, (number,))
    return {name: _row_of(directory, state, columns) for name, *columns in found}


def rows_named(
    directory: Path, db: sqlite3.Connection, state: State, *, names: Iterable[str]
) -> dict[str, BankRow]:
    """The rows of some adapters by name, of which BASE_NAME may be one.

    Raises:
        UnknownAdapterError: there is no adapter of one of the names.
    """
    asked = "SELECT number, entry, checksum FROM adapters WHERE name = ?"
    found, missing = {}, []
    for name in dict.fromkeys(names):
        if name == BASE_NAME:
            found[name] = base_row(state)
        elif is_fit_name(name) and (columns := db.execute(asked, (name,)).fetchone()):
            found[name] = _row_of(directory, state, columns)
        else:
            missing.append(name)
    if missing:
        known = [BASE_NAME, *known_names(db)]
        raise unknown_adapters(directory, missing, known, remedy=ADD_ONE)
    return found


def _row_of(directory: Path, state: State, columns: Sequence[Any]) -> BankRow:
    number, entry, checksum = columns
    try:
        read = AdapterEntry(**json.loads(entry))
        labels = None if read.labels is None else tuple(read.labels)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{directory / REGISTRY_FILE}: cannot tell of whom row {number} is ({error})",
            remedy=COPY_AGAIN,
        ) from error
    return BankRow(number, replace(read, labels=labels), checksum, state.file)


def has_name(db: sqlite3.Connection, name: str) -> bool:
    """Whether there is an adapter of that name."""
    asked = "SELECT 1 FROM adapters WHERE name = ?"
    return is_fit_name(name) and db.execute(asked, (name,)).fetchone() is not None


def count_names(db: sqlite3.Connection) -> int:
    """How many adapters there are."""
    return int(db.execute("SELECT count(*) FROM adapters").fetchone()[0])


def known_names(db: sqlite3.Connection) -> list[str]:
    """The names of all adapters, in order."""
    return [name for (name,) in db.execute("SELECT name FROM adapters ORDER BY name")]


def numbers_in_use(db: sqlite3.Connection) -> list[int]:
    """The numbers of all adapters' rows, ascending."""
    return [number for (number,) in db.execute("SELECT number FROM adapters ORDER BY number")]


def put_row(db: sqlite3.Connection, name: str, row: BankRow) -> None:
    """Give an adapter a row, whether or not it has one."""
    db.execute(
        "REPLACE INTO adapters (name, number, entry, checksum) VALUES (?, ?, ?, ?)",
        (name, row.number, json.dumps(asdict(row.entry)), row.checksum),
    )


def drop_row(db: sqlite3.Connection, name: str) -> None:
    """Forget an adapter."""
    db.execute("DELETE FROM adapters WHERE name = ?", (name,))


def renumber(db: sqlite3.Connection, kept: list[int]) -> None:
    """Number the rows anew: what was `kept`, ascending, is 1, 2 and so on."""
    # In this order each new number is free: the row that had it has moved or is gone.
    db.executemany("UPDATE adapters SET number = ? WHERE number = ?", enumerate(kept, 1))
