"""The paths that a user writes, and the directories that they lead to."""

import os
from pathlib import Path

from propulsion_export.errors import UsageError


def user_path(path: Path | str) -> Path:
    """A path as the user means it: `~` and `~NAME` are home directories, all else is as written.

    `./~NAME` is no home directory, and neither is `~NAME` where the machine has no such user but
    a file or directory of that name; these are made absolute.

    Raises:
        UsageError: there is no such user, or none of whom the machine knows the home directory.
    """
    written = Path(path)  # which drops a `./` at the start
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
