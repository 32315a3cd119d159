"""The operations on a bank of adapters, safe in concurrent threads and processes."""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from propulsion_export.adapters.names import is_fit_name
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.bank.registry import (
    BANK_FILE,
    DTYPES,
    REGISTRY_FILE,
    BankRow,
    BankState,
    advance,
    all_rows,
    base_row,
    check_numbers,
    continues,
    count_names,
    drop_row,
    has_name,
    known_names,
    new_change,
    next_file,
    numbers_in_use,
    put_row,
    renumber,
    rows_from,
    rows_named,
)
from propulsion_export.artifacts.bank.row_file import (
    MappedRows,
    append_row,
    bytes_of,
    check_length,
    check_row,
    checksum_of,
    copy_rows,
    describe_array,
    identity_of,
    map_rows,
    row_bytes,
)
from propulsion_export.artifacts.bank.transactions import (
    back_up,
    changing,
    create_registry,
    reading,
)
from propulsion_export.artifacts.manifest import COPY_AGAIN, AdapterEntry
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import ArtifactError, UsageError, unknown_adapters


@dataclass(frozen=True)
class Snapshot:
    """A bank at one moment.

    Attributes:
        version: one more with every change, whichever process makes it; less after a backup of the
            registry was restored.
        change: the random id of the last change; empty in a registry of version 1.
        base: the base model's row.
        rows: the adapters' rows by name.
        mapped: the bank file.
    """

    version: int
    change: str
    base: BankRow
    rows: dict[str, BankRow]
    mapped: MappedRows

    @property
    def values(self) -> Array:
        """The values of all rows, indexed by row number, as `Bank.values()` returns them."""
        return self.mapped.values


@dataclass(frozen=True)
class Bank:
    """The adapters of a bank artifact; threads and processes may use one at the same time.

    Attributes:
        directory: the artifact's directory, absolute.
        width: D, the number of values in a row.
        dtype: the dtype of the values.
    """

    directory: Path
    width: int
    dtype: str

    @classmethod
    def create(cls, directory: Path, base: Array) -> Self:
        """Create a bank that holds only the base model's row.

        Args:
            directory: the artifact's directory; created if it is missing.
            base: the base model's row, [D], of one of DTYPES.

        Raises:
            UsageError: there is a bank already; `base` has another shape or dtype; the disk is
                full.
        """
        directory = user_path(directory).resolve()
        if base.ndim != 1 or not base.size or base.dtype.name not in DTYPES:
            raise UsageError(
                f"{directory}: the base model's row is {describe_array(base)}, expected [D] of one "
                f"of {', '.join(DTYPES)}"
            )
        for file in (directory / BANK_FILE, directory / REGISTRY_FILE):
            if file.exists():
                raise UsageError(f"{file}: exists, expected a directory without a bank")
        data = bytes_of(base)
        replace_file(directory / BANK_FILE, data)
        sizes = (base.dtype.name, base.size, 1, 0)
        state = BankState(BANK_FILE, *sizes, checksum_of(data), new_change())
        create_registry(directory, state)
        return cls(directory, state.width, state.dtype)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open the bank of an artifact, which may be read-only. No row is read.

        Raises:
            ArtifactError: a file is missing; the registry is damaged, of another version, or
                contradicts the bank file.
        """
        directory = user_path(directory).resolve()
        if not (directory / REGISTRY_FILE).is_file():
            raise ArtifactError(
                f"{directory / REGISTRY_FILE}: is missing, expected the registry of a bank",
                remedy=COPY_AGAIN,
            )
        with reading(directory) as (db, state):
            check_numbers(directory, db, state)
            check_length(directory, state)
        return cls(directory, state.width, state.dtype)

    def find_file(self) -> Path:
        """The path of the bank file as the registry names it now; `compact` makes another."""
        with reading(self.directory) as (_, state):
            return self.directory / state.file

    def is_at(self, snapshot: Snapshot) -> bool:
        """Whether the bank is unchanged since `snapshot`, and is not another bank put there.

        Never if its registry is of version 1, which has no ids of changes.
        """
        with reading(self.directory) as (_, state):
            same = identity_of(self.directory, state) == snapshot.mapped.identity
            return same and state.change == snapshot.change != ""

    def __len__(self) -> int:
        """The number of adapters, without the base model."""
        with reading(self.directory) as (db, _):
            return count_names(db)

    def choose(self, names: Sequence[str]) -> tuple[list[BankRow], Array]:
        """The rows of some adapters, and the values of all rows as `values()` returns them.

        Both are read at the same moment. Separate calls of `rows()` and `values()` may not match,
        since `compact` renumbers the rows. The time depends on the number of names, not on the
        number of adapters. The rows are not verified; `check_row` does that.

        Args:
            names: adapters in the order wanted; names may repeat, and BASE_NAME may be among them.

        Raises:
            UnknownAdapterError: the bank has no adapter of one of the names.
        """
        with reading(self.directory) as (db, state):
            found = rows_named(self.directory, db, state, names=names)
            return [found[name] for name in names], map_rows(self.directory, state)

    def rows(self) -> dict[str, BankRow]:
        """The rows of all adapters by name, sorted by name, without the base model."""
        with reading(self.directory) as (db, state):
            return all_rows(self.directory, db, state)

    def values(self) -> Array:
        """All rows, [rows, D], removed adapters' included: a read-only memory map, not a copy."""
        with reading(self.directory) as (_, state):
            return map_rows(self.directory, state)

    def snapshot(self, before: Snapshot | None = None) -> Snapshot:
        """The rows and values at one moment; separate `rows()` and `values()` may not match.

        With an earlier snapshot as `before`, only what has changed since is read, unless the bank
        is not a later state of that one: after a file was restored from a backup, for example.
        """
        with reading(self.directory) as (db, state):
            mapped = MappedRows(self.directory, state)
            if before is None or not _continues(db, state, mapped, before):
                rows = all_rows(self.directory, db, state)
            else:
                rows = before.rows | rows_from(self.directory, db, state, len(before.values))
                if len(rows) != count_names(db):
                    rows = {name: rows[name] for name in known_names(db)}
            return Snapshot(state.version, state.change, base_row(state), rows, mapped)

    def add(
        self, name: str, values: Array, entry: AdapterEntry, *, replace: bool = False
    ) -> BankRow:
        """Append an adapter's row, in a time that does not depend on the number of adapters.

        A process killed at any moment leaves the bank either without the adapter or with it.

        Args:
            name: the adapter's name.
            values: the adapter's row, [D], of the bank's dtype.
            entry: the record of the adapter.
            replace: replace an adapter of that name; the old row stays for those who are reading
                it, until `compact`.

        Raises:
            UsageError: there is an adapter of that name and `replace` is off; the name is not
                allowed; `values` has another shape or dtype; the disk is full or read-only.
            ArtifactError: the registry is damaged, or another process keeps it locked.
        """
        if not is_fit_name(name):
            raise UsageError(f"an adapter cannot be called {name!r}", remedy="Choose another name.")
        with changing(self.directory) as (db, state):
            if not replace and has_name(db, name):
                raise UsageError(
                    f"{self.directory}: has an adapter {name!r} already",
                    remedy="Choose another name, or replace it with --force.",
                )
            data = row_bytes(self.directory, state, values)
            append_row(self.directory, state, data)
            row = BankRow(state.next_row, entry, checksum_of(data), state.file)
            put_row(db, name, row)
            advance(db, state.file, state.next_row + 1)
        return row

    def remove(self, name: str) -> None:
        """Remove an adapter; its row stays for those who are reading it, until `compact`.

        Raises:
            UnknownAdapterError: the bank has no adapter of that name.
            UsageError: the disk is full or read-only.
            ArtifactError: the registry is damaged, or another process keeps it locked.
        """
        with changing(self.directory) as (db, state):
            if not has_name(db, name):
                raise unknown_adapters(self.directory, [name], known_names(db))
            drop_row(db, name)
            advance(db, state.file, state.next_row)

    def copy(self, directory: Path) -> None:
        """Write the bank as it is now into another artifact's directory, which has no bank.

        The registry's file is not copied as a file: closing it would drop the locks that other
        threads of this process hold on it.

        Raises:
            ArtifactError: a row that was copied is not the one that the registry recorded.
        """
        with reading(self.directory) as (db, state):
            (directory / state.file).parent.mkdir(parents=True, exist_ok=True)
            copy_rows(self.directory, state, range(state.next_row), to=directory / state.file)
            copied = map_rows(directory, state)
            for row in (base_row(state), *all_rows(self.directory, db, state).values()):
                check_row(row, copied)
            back_up(db, directory)

    def compact(self) -> None:
        """Drop the rows of removed and replaced adapters: write a new bank file and renumber.

        Memory maps of the old file stay valid. If there is nothing to drop, nothing changes. Rows
        that the registry does not count are dropped too: see `row_file`.

        Raises:
            UsageError: the disk is full or read-only.
            ArtifactError: the registry is damaged, or another process keeps it locked.
        """
        with changing(self.directory) as (db, state):
            kept = numbers_in_use(db)
            if state.next_row == 1 + len(kept):
                return
            file = next_file(state.file)
            copy_rows(self.directory, state, [0, *kept], to=self.directory / file)
            renumber(db, kept)
            advance(db, file, 1 + len(kept))
        with suppress(OSError):  # the next change tries again
            (self.directory / state.file).unlink(missing_ok=True)


def _continues(
    db: sqlite3.Connection, state: BankState, mapped: MappedRows, before: Snapshot
) -> bool:
    """Whether the bank is a later state of the one that `before` has read, in the same file."""
    same = mapped.identity == before.mapped.identity
    return same and continues(db, state, before.version, before.change)
