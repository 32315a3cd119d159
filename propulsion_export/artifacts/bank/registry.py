"""The tables of a bank's registry: one row about the bank, one for each adapter and each change.

Each change has a random id, and the ids of the last ones are kept, so that a reader can tell a
registry that continues the one it has read from one with another history, as a backup has. An
adapter's record has a seal over its name, its entry and the checksum of its row.
"""

import hashlib
import json
import re
import secrets
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from propulsion_export.adapters.names import BASE_NAME, is_fit_name
from propulsion_export.artifacts.file_names import ADAPTERS
from propulsion_export.artifacts.manifest import ADD_ONE, COPY_AGAIN, AdapterEntry
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.base_model.settings import PROBLEM_TYPES
from propulsion_export.errors import ArtifactError, unknown_adapters

BANK_FILE = f"{ADAPTERS}/bank.bin"  # `compact` writes bank-1.bin, then bank-2.bin and so on
REGISTRY_FILE = f"{ADAPTERS}/registry.sqlite"
REGISTRY_VERSION = 2  # 1 has no ids of changes and no seals; the next change adds them
DTYPES = ("float32", "float16", "bfloat16")

_CHANGES_KEPT = 1000  # a reader that has missed more reads and checks all rows again
_BANK_NAME = re.compile(rf"{ADAPTERS}/bank(?:-([1-9]\d{{0,8}}))?\.bin")
_TABLES = (
    "CREATE TABLE bank (file TEXT NOT NULL, dtype TEXT NOT NULL, width INTEGER NOT NULL,"
    " next_row INTEGER NOT NULL, version INTEGER NOT NULL, base_checksum TEXT NOT NULL,"
    " change TEXT NOT NULL)",
    "CREATE TABLE adapters (name TEXT NOT NULL PRIMARY KEY, number INTEGER NOT NULL UNIQUE,"
    " entry TEXT NOT NULL, checksum TEXT NOT NULL, seal TEXT NOT NULL)",
    "CREATE TABLE changes (version INTEGER PRIMARY KEY, change TEXT NOT NULL)",
)


@dataclass(frozen=True)
class BankRow:
    """Where one adapter's row is, the record of the adapter, and the checksum of the row.

    `number` is the row's index in `file`, a path inside the artifact's directory; in another bank
    file the row has another number. `checksum` is `sha256:…` of the row's bytes.
    """

    number: int
    entry: AdapterEntry
    checksum: str
    file: str = BANK_FILE


class BankState(NamedTuple):
    """The registry's record of the bank as a whole.

    `change` is the random id of the last change; empty in a registry of version 1.
    """

    file: str
    dtype: str
    width: int
    next_row: int
    version: int
    base_checksum: str
    change: str

    @property
    def stride(self) -> int:
        """Size of a row in bytes."""
        return self.width * numpy_dtype(self.dtype).itemsize

    @property
    def length(self) -> int:
        """Size of all rows in bytes."""
        return self.next_row * self.stride


# Names of files


def is_bank_file(name: str) -> bool:
    """Whether a path inside an artifact's directory belongs to a bank, which checks it itself."""
    return has_rows(name) or name in (REGISTRY_FILE, f"{REGISTRY_FILE}-journal")


def has_rows(name: str) -> bool:
    """Whether a path inside an artifact's directory is that of a bank file."""
    return _BANK_NAME.fullmatch(name) is not None


def next_file(file: str) -> str:
    """The name of the bank file that replaces `file`."""
    match = _BANK_NAME.fullmatch(file)
    assert match is not None  # read_state has checked it
    return f"{ADAPTERS}/bank-{int(match[1] or 0) + 1}.bin"


# The whole bank


def create_tables(db: sqlite3.Connection, state: BankState) -> None:
    """Create the tables of a registry without adapters."""
    for table in _TABLES:
        db.execute(table)
    db.execute("INSERT INTO bank VALUES (?, ?, ?, ?, ?, ?, ?)", state)
    _record_change(db)
    db.execute(f"PRAGMA user_version = {REGISTRY_VERSION}")


def upgrade(db: sqlite3.Connection) -> None:
    """Add to a registry of version 1 what it lacks; later ones stay as they are."""
    if _version_of(db) == REGISTRY_VERSION:
        return
    db.execute("ALTER TABLE bank ADD COLUMN change TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE adapters ADD COLUMN seal TEXT NOT NULL DEFAULT ''")
    db.execute(_TABLES[-1])
    found = db.execute("SELECT name, entry, checksum FROM adapters").fetchall()
    db.executemany(
        "UPDATE adapters SET seal = ? WHERE name = ?", ((_seal(*each), each[0]) for each in found)
    )
    db.execute("UPDATE bank SET change = ?", (new_change(),))
    _record_change(db)
    db.execute(f"PRAGMA user_version = {REGISTRY_VERSION}")


def read_state(directory: Path, db: sqlite3.Connection) -> BankState:
    """Read the record of the bank as a whole.

    Raises:
        ArtifactError: the registry has another schema version, or an impossible record.
    """
    file = directory / REGISTRY_FILE
    version = _version_of(db)
    if version not in (1, REGISTRY_VERSION):
        newer = version > REGISTRY_VERSION
        raise ArtifactError(
            f"{file}: schema version is {version}, expected {REGISTRY_VERSION}",
            remedy="Upgrade propulsion-export to read it." if newer else COPY_AGAIN,
        )
    columns = BankState._fields if version > 1 else (*BankState._fields[:-1], "''")
    found = db.execute(f"SELECT {', '.join(columns)} FROM bank").fetchall()
    if len(found) != 1 or not _is_possible(state := BankState(*found[0])):
        raise ArtifactError(
            f"{file}: describes the bank as {found}, expected its file, dtype, width and rows",
            remedy=COPY_AGAIN,
        )
    return state


def _is_possible(state: BankState) -> bool:
    return (
        isinstance(state.file, str)
        and has_rows(state.file)
        and state.dtype in DTYPES
        and all(isinstance(n, int) for n in (state.width, state.next_row, state.version))
        and min(state.width, state.next_row) > 0
        and isinstance(state.base_checksum, str)
        and isinstance(state.change, str)
    )


def _version_of(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_numbers(directory: Path, db: sqlite3.Connection, state: BankState) -> None:
    """Refuse row numbers of adapters outside [1, next_row).

    Raises:
        ArtifactError: there is such a number.
    """
    # Two queries: SQLite answers each from the index, but both in one only by a scan.
    (first,) = db.execute("SELECT min(number) FROM adapters").fetchone()
    (last,) = db.execute("SELECT max(number) FROM adapters").fetchone()
    # SQLite sorts text behind all numbers, so that a text among them is the maximum.
    whole = isinstance(first, int) and isinstance(last, int)
    if first is not None and not (whole and 0 < first <= last < state.next_row):
        raise ArtifactError(
            f"{directory / REGISTRY_FILE}: names rows {first} to {last}, expected rows "
            f"from 1 to {state.next_row - 1}",
            remedy=COPY_AGAIN,
        )


def advance(db: sqlite3.Connection, file: str, next_row: int) -> None:
    """Record a change: the bank file, the number of its rows, the next version, a random id."""
    update = "UPDATE bank SET file = ?, next_row = ?, version = version + 1, change = ?"
    db.execute(update, (file, next_row, new_change()))
    _record_change(db)


def new_change() -> str:
    """A random id for a change."""
    return secrets.token_hex(16)


def _record_change(db: sqlite3.Connection) -> None:
    db.execute("REPLACE INTO changes SELECT version, change FROM bank")
    kept = "(SELECT version FROM bank) - ?"
    db.execute(f"DELETE FROM changes WHERE version <= {kept}", (_CHANGES_KEPT,))


def continues(db: sqlite3.Connection, state: BankState, version: int, change: str) -> bool:
    """Whether the registry was once at a version with this change, so that it has its past.

    Not if that is more than _CHANGES_KEPT changes ago, nor ever in a registry of version 1.
    """
    if not (change and state.change):
        return False
    found = db.execute("SELECT change FROM changes WHERE version = ?", (version,)).fetchone()
    return bool(found == (change,))


# The rows of adapters


def base_row(state: BankState) -> BankRow:
    """The base model's row."""
    entry = AdapterEntry(state.base_checksum, BASE_NAME, 0)
    return BankRow(0, entry, state.base_checksum, state.file)


def all_rows(directory: Path, db: sqlite3.Connection, state: BankState) -> dict[str, BankRow]:
    """The rows of all adapters by name, sorted by name, without the base model."""
    found = db.execute(f"SELECT {_columns(state)} FROM adapters ORDER BY name")
    return {columns[0]: _row_of(directory, state, columns) for columns in found}


def rows_from(
    directory: Path, db: sqlite3.Connection, state: BankState, number: int
) -> dict[str, BankRow]:
    """The rows of adapters with this number or a higher one, by name."""
    query = f"SELECT {_columns(state)} FROM adapters WHERE number >= ?"
    found = db.execute(query, (number,))
    return {columns[0]: _row_of(directory, state, columns) for columns in found}


def rows_named(
    directory: Path, db: sqlite3.Connection, state: BankState, *, names: Iterable[str]
) -> dict[str, BankRow]:
    """The rows of some adapters by name; BASE_NAME may be among the names.

    Raises:
        UnknownAdapterError: the bank has no adapter of one of the names.
    """
    query = f"SELECT {_columns(state)} FROM adapters WHERE name = ?"
    found, missing = {}, []
    for name in dict.fromkeys(names):
        if name == BASE_NAME:
            found[name] = base_row(state)
        elif is_fit_name(name) and (columns := db.execute(query, (name,)).fetchone()):
            found[name] = _row_of(directory, state, (name, *columns[1:]))
        else:
            missing.append(name)
    if missing:
        known = [BASE_NAME, *known_names(db)]
        raise unknown_adapters(directory, missing, known, remedy=ADD_ONE)
    return found


def _columns(state: BankState) -> str:
    return f"name, number, entry, checksum, {'seal' if state.change else 'NULL'}"


def _seal(name: str, entry: str, checksum: str) -> str:
    """Digest of an adapter's name, the text of its entry and the checksum of its row."""
    return hashlib.sha256("\0".join((name, entry, checksum)).encode()).hexdigest()


def _row_of(directory: Path, state: BankState, columns: Sequence[Any]) -> BankRow:
    name, number, entry, checksum, seal = columns
    try:
        if state.change and seal != _seal(name, entry, checksum):
            raise ValueError(f"it is not what was recorded for {name!r}")
        read = AdapterEntry(**json.loads(entry))
        labels = None if read.labels is None else tuple(read.labels)
        if read.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type is {read.problem_type!r}")
        if not isinstance(read.chat_template, str | None):
            raise ValueError(f"chat_template is {read.chat_template!r}")
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{directory / REGISTRY_FILE}: the record of the adapter in row {number} is damaged "
            f"({error})",
            remedy=COPY_AGAIN,
        ) from error
    return BankRow(number, replace(read, labels=labels), checksum, state.file)


def has_name(db: sqlite3.Connection, name: str) -> bool:
    """Whether the bank has an adapter of that name."""
    query = "SELECT 1 FROM adapters WHERE name = ?"
    return is_fit_name(name) and db.execute(query, (name,)).fetchone() is not None


def count_names(db: sqlite3.Connection) -> int:
    """The number of adapters."""
    return int(db.execute("SELECT count(*) FROM adapters").fetchone()[0])


def known_names(db: sqlite3.Connection) -> list[str]:
    """The names of all adapters, sorted; one that is damaged into no text is left out."""
    found = db.execute("SELECT name FROM adapters ORDER BY name")
    return [name for (name,) in found if isinstance(name, str)]


def numbers_in_use(db: sqlite3.Connection) -> list[int]:
    """The numbers of all adapters' rows, ascending."""
    return [number for (number,) in db.execute("SELECT number FROM adapters ORDER BY number")]


def put_row(db: sqlite3.Connection, name: str, row: BankRow) -> None:
    """Record an adapter's row; it replaces an earlier one of that name."""
    entry = json.dumps(asdict(row.entry))
    seal = _seal(name, entry, row.checksum)
    db.execute(
        "REPLACE INTO adapters (name, number, entry, checksum, seal) VALUES (?, ?, ?, ?, ?)",
        (name, row.number, entry, row.checksum, seal),
    )


def drop_row(db: sqlite3.Connection, name: str) -> None:
    """Delete the record of an adapter's row."""
    db.execute("DELETE FROM adapters WHERE name = ?", (name,))


def renumber(db: sqlite3.Connection, kept: list[int]) -> None:
    """Renumber the rows in use, `kept` in ascending order, as 1, 2 and so on."""
    # In this order each new number is free: its row has been renumbered or removed.
    db.executemany("UPDATE adapters SET number = ? WHERE number = ?", enumerate(kept, 1))
