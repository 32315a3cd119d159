"""The paths that a user writes, and the directories that they lead to."""

import os
from pathlib import Path

from propulsion_export.environment.locale_encoding import LOCALE_REMEDY, is_utf8, unread_bytes
from propulsion_export.errors import UsageError


def user_path(path: Path | str) -> Path:
    """A path as the user means it: `~` and `~NAME` are home directories, all else is as written.

    `./~NAME` is no home directory, and neither is `~NAME` where the machine has no such user but
    a file or directory of that name; these are made absolute.

    Raises:
        UsageError: it is no path; there is no such user, or none of whom the machine knows the home
            directory; it is relative, and the current directory has been deleted; the locale cannot
            read it.
    """
    if not isinstance(path, (str, os.PathLike)):  # Python's callers have no checker, perhaps
        raise UsageError(f"{path!r}: is no path, expected a str or a pathlib.Path")
    written = Path(path)  # which drops a `./` at the start
    if finding := unread_bytes(str(path)):
        raise UsageError(f"{str(path)!a}: {finding}", remedy=LOCALE_REMEDY)
    if not written.is_absolute():
        check_current_directory()
    if str(path).startswith("./") and str(written).startswith("~"):
        return written.absolute()
    try:
        return written.expanduser()
    except RuntimeError as error:  # what pathlib raises where there is no home directory
        if os.path.lexists(written):
            return written.absolute()
        raise UsageError(
            f"{path}: this machine knows no home directory {written.parts[0]}, expected one, or a "
            f"path such as ./{path}"
        ) from error


def real_directory(path: Path | str) -> Path:
    """The directory that a path leads to now, whatever its links lead to later.

    A relative path that goes through no link stays as the user wrote it.

    Raises:
        UsageError: see `user_path`; it holds a zero byte or half a character, which no path can.
    """
    written = user_path(path)
    try:
        real = os.path.realpath(written)
    except ValueError as error:
        raise UsageError(
            f"{str(path)!a}: holds a zero byte or half a character, expected a path"
        ) from error
    kept = not written.is_absolute() and real == os.path.abspath(written)  # noqa: PTH100
    return written if kept else Path(real)


def check_is_utf8(path: Path) -> None:
    """Refuse a path that runtimes cannot open, because some of its bytes are no UTF-8.

    Raises:
        UsageError: it holds such a byte; a relative path also where the current directory does.
    """
    whole = os.path.abspath(path)  # noqa: PTH100
    if not is_utf8(whole):
        raise UsageError(
            f"{whole!a}: the path is not UTF-8, which runtimes need to open it",
            remedy="Rename the directory.",
        )


def check_current_directory() -> None:
    """Refuse a current directory that paths cannot start from.

    Raises:
        UsageError: it has been deleted, or the locale cannot read its name.
    """
    try:
        here = str(Path.cwd())
    except FileNotFoundError as error:
        raise UsageError(
            "the current directory has been deleted, expected one that is there",
            remedy="Change to another directory.",
        ) from error
    if finding := unread_bytes(here):
        raise UsageError(f"the current directory, {here!a}: {finding}", remedy=LOCALE_REMEDY)
