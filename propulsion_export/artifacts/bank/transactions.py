"""Looks at a bank and changes of it, each one transaction of the registry, and errors in words."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from propulsion_export.artifacts.bank.registry import (
    COPY_AGAIN,
    REGISTRY_FILE,
    State,
    create_tables,
    read_state,
)
from propulsion_export.artifacts.bank.row_file import tidy
from propulsion_export.artifacts.file_names import ADAPTERS
from propulsion_export.artifacts.staging import FULL, disk_errors_in_words
from propulsion_export.errors import ArtifactError, UsageError

_PATIENCE = 60.0  # seconds to wait for other processes' changes, each of which takes milliseconds
_MAKE_ROOM = "Make room there, then try again."
_CHANGE_A_COPY = "Change a copy of it."
_ON_LOCAL_DISK = "Use a copy of it on a local disk."
_NO_ROOM = {code: text for code, text in FULL.items() if code != errno.EROFS}
_FORBIDDEN = {
    errno.EROFS: FULL[errno.EROFS],
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
}
# By SQLite's result code, the extended one first: whose fault it is, what was found, the way out.
_SQLITE_REASONS: dict[int, tuple[type[ArtifactError | UsageError], str, str]] = {
    sqlite3.SQLITE_FULL: (
        UsageError,
        "no space left on the device; nothing was changed",
        _MAKE_ROOM,
    ),
    sqlite3.SQLITE_READONLY_ROLLBACK: (
        ArtifactError,
        "a killed process left it half changed, and here it cannot be restored",
        "List its adapters once where it can be written to.",
    ),
    sqlite3.SQLITE_READONLY: (
        UsageError,
        "no permission to write here; nothing was changed",
        _CHANGE_A_COPY,
    ),
    sqlite3.SQLITE_CANTOPEN: (
        UsageError,
        "cannot be opened, or no journal be made beside it; nothing was changed",
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
_NO_REGISTRY = (ArtifactError, "is no registry of a bank", COPY_AGAIN)


@contextmanager
def reading(directory: Path) -> Iterator[tuple[sqlite3.Connection, State]]:
    """One look at the registry. No change ends within it, so the file it names is there.

    Raises:
        ArtifactError: it is damaged, or another process keeps it locked.
    """
    with _in_words(directory):
        db, state = _begin(directory, write=False)
        with closing(db):
            yield db, state


@contextmanager
def changing(directory: Path) -> Iterator[tuple[sqlite3.Connection, State]]:
    """A change of the registry, one after the other; it is as if it had not begun on any error.

    Raises:
        UsageError: the disk is full or read-only.
        ArtifactError: it is damaged, or another process keeps it locked.
    """
    with _in_words(directory):
        db, state = _begin(directory, write=True)
        try:
            with closing(db):  # which takes back what is not committed
                tidy(directory, state)
                yield db, state
                db.execute("COMMIT")
        except (OSError, sqlite3.Error):
            # Space is what may be lacking. The error in hand says more than another one would.
            with suppress(OSError, sqlite3.Error, ArtifactError):
                db, state = _begin(directory, write=True)
                with closing(db):
                    tidy(directory, state)
            raise


def create_registry(directory: Path, state: State) -> None:
    """Make the registry of a bank without adapters.

    Raises:
        UsageError: the disk is full or read-only.
    """
    with _in_words(directory), closing(_connect(directory, "rwc")) as db:
        db.execute("BEGIN IMMEDIATE")
        create_tables(db, state)
        db.execute("COMMIT")


def back_up(db: sqlite3.Connection, directory: Path) -> None:
    """Write the registry that `db` reads as that of another directory.

    Raises:
        UsageError: the disk is full or read-only.
    """
    with _in_words(directory), closing(_connect(directory, "rwc")) as other:
        db.backup(other)


def _begin(directory: Path, *, write: bool) -> tuple[sqlite3.Connection, State]:
    try:
        return _begin_as(directory, "rw" if write else "ro", write=write)
    except sqlite3.OperationalError as error:
        if _code(error) != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    # A process was killed while it committed: only who may write can take back what it had begun.
    return _begin_as(directory, "rw", write=write)


def _begin_as(directory: Path, mode: str, *, write: bool) -> tuple[sqlite3.Connection, State]:
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
            disk_errors_in_words(place, _NO_ROOM, remedy=_MAKE_ROOM),
            disk_errors_in_words(place, _FORBIDDEN, remedy=_CHANGE_A_COPY),
        ):
            yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        code = _code(error)
        kind, found, remedy = (
            _SQLITE_REASONS.get(code) or _SQLITE_REASONS.get(code & 0xFF) or _NO_REGISTRY
        )
        raise kind(f"{directory / REGISTRY_FILE}: {found} ({error})", remedy=remedy) from error


def _code(error: sqlite3.Error) -> int:
    """SQLite's extended result code; what Python refuses of a database's content has none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
