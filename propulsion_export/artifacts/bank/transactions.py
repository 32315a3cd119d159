"""Read and change a bank in transactions of its registry, with errors a user can act on."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from propulsion_export.artifacts.bank.registry import (
    REGISTRY_FILE,
    BankState,
    create_tables,
    read_state,
    upgrade,
)
from propulsion_export.artifacts.bank.row_file import take_back, tidy
from propulsion_export.artifacts.disk_errors import FULL, disk_errors_in_words
from propulsion_export.artifacts.file_names import ADAPTERS
from propulsion_export.artifacts.manifest import COPY_AGAIN
from propulsion_export.environment.forking import no_fork
from propulsion_export.environment.lock_holders import lock_holder
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import ArtifactError, UsageError

_PATIENCE = 60.0  # seconds to wait for other processes' changes, which take milliseconds
_MAKE_ROOM = "Make room there, then try again."
_CHANGE_A_COPY = "Change a copy of it."
_ON_LOCAL_DISK = "Use a copy of it on a local disk."
_NO_ROOM = {code: text for code, text in FULL.items() if code != errno.EROFS}
_FORBIDDEN = {
    errno.EROFS: FULL[errno.EROFS],
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
}
# The error, the finding and the remedy by SQLite's result code; extended codes are tried first.
_SQLITE_REASONS: dict[int, tuple[type[ArtifactError | UsageError], str, str]] = {
    sqlite3.SQLITE_FULL: (
        UsageError,
        "no space left on the device; nothing was changed",
        _MAKE_ROOM,
    ),
    sqlite3.SQLITE_READONLY_ROLLBACK: (
        ArtifactError,
        "a killed process left it half changed, and it cannot be restored where it is read-only",
        "List its adapters once where it can be written to.",
    ),
    sqlite3.SQLITE_READONLY: (
        UsageError,
        "no permission to write here; nothing was changed",
        _CHANGE_A_COPY,
    ),
    sqlite3.SQLITE_CANTOPEN: (
        UsageError,
        "cannot be opened, or its journal cannot be created; nothing was changed",
        "Check the permissions of its directory.",
    ),
    sqlite3.SQLITE_BUSY: (
        ArtifactError,
        f"stays locked by another process for {_PATIENCE:.0f} s",
        "Try again once that has ended.",
    ),
    sqlite3.SQLITE_IOERR: (ArtifactError, "cannot be read, written or locked", _ON_LOCAL_DISK),
    sqlite3.SQLITE_PROTOCOL: (ArtifactError, "cannot be locked", _ON_LOCAL_DISK),
}
_NO_REGISTRY = (ArtifactError, "is not the registry of a bank", COPY_AGAIN)


@contextmanager
def reading(directory: Path) -> Iterator[tuple[sqlite3.Connection, BankState]]:
    """Read the registry. No change is committed meanwhile, so the bank file it names exists.

    Raises:
        ArtifactError: the registry is damaged, or another process keeps it locked.
    """
    with _in_words(directory):
        db, state = _begin(directory, write=False)
        with closing(db):
            yield db, state


@contextmanager
def changing(directory: Path) -> Iterator[tuple[sqlite3.Connection, BankState]]:
    """Change the registry; one change at a time, and on any error none of it takes effect.

    Raises:
        UsageError: the disk is full or read-only.
        ArtifactError: the registry is damaged, or another process keeps it locked.
    """
    with _in_words(directory):
        db, found = _begin(directory, write=True)
        state = None
        try:
            with closing(db):  # closing rolls back what is not committed
                state = tidy(directory, found)
                upgrade(db)
                yield db, state
                db.execute("COMMIT")
        except (OSError, sqlite3.Error):
            # The disk may be full: free what was appended. Another error would hide the first.
            with suppress(OSError, sqlite3.Error, ArtifactError):
                db, now = _begin(directory, write=True)
                with closing(db):
                    if state is not None and now == found:
                        take_back(directory, state)
            raise


def create_registry(directory: Path, state: BankState) -> None:
    """Create the registry of a bank without adapters.

    Raises:
        UsageError: the disk is full or read-only.
    """
    with _in_words(directory), closing(_connect(directory, "rwc")) as db:
        db.execute("BEGIN IMMEDIATE")
        create_tables(db, state)
        db.execute("COMMIT")


def back_up(db: sqlite3.Connection, directory: Path) -> None:
    """Copy the registry that `db` has open into another artifact's directory.

    Raises:
        UsageError: the disk is full or read-only.
    """
    with _in_words(directory), closing(_connect(directory, "rwc")) as other:
        db.backup(other)


def _begin(directory: Path, *, write: bool) -> tuple[sqlite3.Connection, BankState]:
    try:
        return _begin_as(directory, "rw" if write else "ro", write=write)
    except sqlite3.OperationalError as error:
        if _code(error) != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    # A process was killed during its commit; rolling that back needs write access.
    return _begin_as(directory, "rw", write=write)


def _begin_as(directory: Path, mode: str, *, write: bool) -> tuple[sqlite3.Connection, BankState]:
    db = _connect(directory, mode)
    try:
        # Without EXTRA, a loss of power could bring back a registry that names an older bank file.
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        return db, read_state(directory, db)
    except BaseException:
        db.close()
        raise


def _connect(directory: Path, mode: str) -> sqlite3.Connection:
    address = f"{(directory / REGISTRY_FILE).as_uri()}?mode={mode}"
    return sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None)


@contextmanager
def _in_words(directory: Path) -> Iterator[None]:
    place = directory / ADAPTERS
    try:
        with (
            no_fork(),  # SQLite in a fork would take the locks of other threads for its own
            disk_errors_in_words(place, _NO_ROOM, remedy=_MAKE_ROOM),
            disk_errors_in_words(place, _FORBIDDEN, remedy=_CHANGE_A_COPY),
        ):
            try:
                yield
            except PermissionError as error:
                check_permission(error.filename or place, UsageError)
                raise
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        code = _code(error)
        kind, found, remedy = (
            _SQLITE_REASONS.get(code) or _SQLITE_REASONS.get(code & 0xFF) or _NO_REGISTRY
        )
        busy = code & 0xFF == sqlite3.SQLITE_BUSY
        holder = f", by {lock_holder(directory / REGISTRY_FILE)}" if busy else ""
        found = f"{directory / REGISTRY_FILE}: {found} ({error}{holder})"
        raise kind(found, remedy=remedy) from error


def _code(error: sqlite3.Error) -> int:
    """SQLite's extended result code; errors that Python raises about the content have none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
