"""The paths that a user writes, and the directories that they lead to."""

import os
from pathlib import Path

from propulsion_export.environment.locale_encoding import LOCALE_REMEDY, unread_bytes
from propulsion_export.errors import UsageError


def user_path(path: Path | str) -> Path:
    """A path as the user means it: `~` and `~NAME` are home directories, all else is as written.

    `./~NAME` is no home directory, and neither is `~NAME` where the machine has no such user but
    a file or directory of that name; these are made absolute.

    Raises:
        UsageError: there is no such user, or none of whom the machine knows the home directory; it
            is relative, and the current directory has been deleted; the locale cannot read it.
    """
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
        UsageError: see `user_path`.
    """
    written = user_path(path)
    try:
        real = os.path.realpath(written)
    except ValueError:  # a zero byte: whoever reads it says what is wrong
        return written
    kept = not written.is_absolute() and real == os.path.abspath(written)  # noqa: PTH100
    return written if kept else Path(real)


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
