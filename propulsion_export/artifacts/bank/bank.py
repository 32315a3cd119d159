"""A bank of adapters: what one does with it, in threads and processes at the same time."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from propulsion_export.adapters.names import is_fit_name
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.bank.registry import (
    BANK_FILE,
    COPY_AGAIN,
    DTYPES,
    REGISTRY_FILE,
    BankRow,
    State,
    advance,
    all_rows,
    base_row,
    check_numbers,
    count_names,
    drop_row,
    has_name,
    known_names,
    next_file,
    numbers_in_use,
    put_row,
    renumber,
    rows_from,
    rows_named,
)
from propulsion_export.artifacts.bank.row_file import (
    append_row,
    bytes_of,
    check_length,
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
from propulsion_export.artifacts.manifest import AdapterEntry
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.errors import ArtifactError, UsageError, unknown_adapters


@dataclass(frozen=True)
class Snapshot:
    """A bank at one moment.

    Attributes:
        version: a number that grows with every change, whichever process makes it.
        base: the base model's row.
        rows: of the adapters, by name.
        values: what the rows are numbers of, as `Bank.values()` gives them.
        identity: of the file that they are mapped from.
    """

    version: int
    base: BankRow
    rows: dict[str, BankRow]
    values: Array
    identity: tuple[int, int]


@dataclass(frozen=True)
class Bank:
    """The adapters of a bank artifact; threads and processes may use one at the same time.

    Attributes:
        directory: the artifact's, absolute.
        width: D, how many values a row has.
        dtype: of the values.
    """

    directory: Path
    width: int
    dtype: str

    @classmethod
    def create(cls, directory: Path, base: Array) -> Self:
        """Make a bank that holds the base model alone.

        Args:
            directory: the artifact's; made if it is missing.
            base: what the base model feeds, [D], of one of DTYPES.

        Raises:
            UsageError: there is one already; `base` is no such array; the disk is full.
        """
        directory = directory.expanduser().resolve()
        if base.ndim != 1 or not base.size or base.dtype.name not in DTYPES:
            raise UsageError(
                f"{directory}: a row is {describe_array(base)}, expected [D] of {DTYPES}"
            )
        for file in (directory / BANK_FILE, directory / REGISTRY_FILE):
            if file.exists():
                raise UsageError(f"{file}: exists, expected a directory without a bank")
        data = bytes_of(base)
        replace_file(directory / BANK_FILE, data)
        state = State(BANK_FILE, base.dtype.name, base.size, 1, 0, checksum_of(data))
        create_registry(directory, state)
        return cls(directory, state.width, state.dtype)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open the bank of an artifact, which may be read-only; no row is read.

        Raises:
            ArtifactError: a file is missing; the registry is damaged, of another version, or
                contradicts the bank file.
        """
        directory = directory.expanduser().resolve()
        if not (directory / REGISTRY_FILE).is_file():
            raise ArtifactError(
                f"{directory / REGISTRY_FILE}: is missing, expected the registry of a bank",
                remedy=COPY_AGAIN,
            )
        with reading(directory) as (db, state):
            check_numbers(directory, db, state)
            check_length(directory, state)
        return cls(directory, state.width, state.dtype)

    @property
    def file(self) -> Path:
        """The bank file of this moment; `compact` makes another."""
        with reading(self.directory) as (_, state):
            return self.directory / state.file

    def is_at(self, snapshot: Snapshot) -> bool:
        """Whether nothing has changed since, nor another bank taken this one's place."""
        with reading(self.directory) as (_, state):
            same = identity_of(self.directory, state) == snapshot.identity
            return same and state.version == snapshot.version

    def __len__(self) -> int:
        """How many adapters there are, the base model not counted."""
        with reading(self.directory) as (db, _):
            return count_names(db)

    def choose(self, names: Sequence[str]) -> tuple[list[BankRow], Array]:
        """The rows of adapters, and the values that they are numbers of, as `values()` gives them.

        Both are of one moment, which `rows()` and `values()` in turn may not be: `compact` numbers
        the rows anew. The work depends on how many names there are, not on how many adapters.
        `check_row` compares a row's bytes with its checksum.

        Args:
            names: in the order of the rows; any of them repeatedly, and BASE_NAME.

        Raises:
            UnknownAdapterError: there is no adapter of one of the names.
        """
        with reading(self.directory) as (db, state):
            found = rows_named(self.directory, db, state, names=names)
            return [found[name] for name in names], map_rows(self.directory, state)

    def rows(self) -> dict[str, BankRow]:
        """The rows of all adapters by name, in the order of their names, without the base model."""
        with reading(self.directory) as (db, state):
            return all_rows(self.directory, db, state)

    def values(self) -> Array:
        """All rows so far, [rows, D], removed adapters' too: a read-only memory map, no copy."""
        with reading(self.directory) as (_, state):
            return map_rows(self.directory, state)

    def snapshot(self, before: Snapshot | None = None) -> Snapshot:
        """Rows and values of one moment, which `rows()` and `values()` in turn may not be.

        Since the one `before`, if it is told, only what has changed is read.
        """
        with reading(self.directory) as (db, state):
            identity = identity_of(self.directory, state)
            values = map_rows(self.directory, state)
            if before is None or before.identity != identity:
                rows = all_rows(self.directory, db, state)
            else:
                rows = before.rows | rows_from(self.directory, db, state, len(before.values))
                if len(rows) != count_names(db):
                    rows = {name: rows[name] for name in known_names(db)}
            return Snapshot(state.version, base_row(state), rows, values, identity)

    def add(
        self, name: str, values: Array, entry: AdapterEntry, *, replace: bool = False
    ) -> BankRow:
        """Append an adapter's row, in a time that does not depend on how many there are.

        A kill at any moment leaves the bank without the adapter, or with it.

        Args:
            name: what it is called from now on.
            values: what it feeds, [D], of the bank's dtype.
            entry: what it was made from.
            replace: an adapter of that name may be there; whoever reads its row goes on doing so.

        Raises:
            UsageError: there is one of that name and `replace` is off; no adapter may be called
                so; `values` is no row of this bank; the disk is full or read-only.
            ArtifactError: the registry is damaged, or other processes keep it locked.
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
        """Forget an adapter; its row stays for those who are reading it, until `compact`.

        Raises:
            UnknownAdapterError: there is none of that name.
            UsageError: the disk is full or read-only.
            ArtifactError: the registry is damaged, or other processes keep it locked.
        """
        with changing(self.directory) as (db, state):
            if not has_name(db, name):
                raise unknown_adapters(self.directory, [name], known_names(db))
            drop_row(db, name)
            advance(db, state.file, state.next_row)

    def copy(self, directory: Path) -> None:
        """Write the bank of this moment below another artifact's directory, which has none.

        Not by copying the registry's file: closing that would drop other threads' locks on it.
        """
        with reading(self.directory) as (db, state):
            (directory / state.file).parent.mkdir(parents=True, exist_ok=True)
            copy_rows(self.directory, state, range(state.next_row), to=directory / state.file)
            back_up(db, directory)

    def compact(self) -> None:
        """Give back the rows of removed and replaced adapters: a new bank file, numbered anew.

        Memory maps of the old file stay what they are. If there is nothing to give back, nothing
        changes.

        Raises:
            UsageError: the disk is full or read-only.
            ArtifactError: the registry is damaged, or other processes keep it locked.
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
