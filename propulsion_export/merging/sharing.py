"""Files that stay as they are: linked to the base model's, or cloned where the disk can do that."""

import errno
import fcntl
import os
from functools import cache
from pathlib import Path

from propulsion_export.artifacts.artifact import digest_of
from propulsion_export.errors import UsageError

_FICLONE = 0x40049409  # ioctl_ficlone(2)
_NO_CLONE = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTTY,
    errno.EPERM,
}


def link(base: Path, path: Path) -> str:
    """Make `path` a hard link to a file of the base model; returns the file's digest.

    Raises:
        UsageError: the file system has no hard links, or it is another one.
    """
    try:
        os.link(base.resolve(), path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UsageError(
            f"{base}: cannot be linked into {path.parent} ({error.strerror}), expected a file of "
            "your own on the same file system",
            remedy="Write beside the base model, or leave out --share.",
        ) from error
    return _digest(base)


def clone(base: Path, path: Path) -> str | None:
    """Let `path` be a copy that shares the base model's blocks until either is changed.

    Returns:
        The file's digest; None where the file system cannot do that, and `path` does not exist.
    """
    with base.open("rb") as source, path.open("xb") as target:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
            path.unlink()
            return None
    return _digest(base)


@cache
def _digest(base: Path) -> str:
    """Read once for all outputs that share the file."""
    return digest_of(base)
