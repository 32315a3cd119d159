"""Files that stay as they are: linked to the base model's, or cloned where the disk can do that."""

import errno
import fcntl
import os
from pathlib import Path

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


def link(base: Path, path: Path) -> None:
    """Make `path` a hard link to a file of the base model.

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


def clone(base: Path, path: Path) -> bool:
    """Let `path` be a copy that shares the base model's blocks until either is changed.

    Returns:
        Whether the file system can do that; if not, `path` does not exist.
    """
    with base.open("rb") as source, path.open("xb") as target:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
            path.unlink()
            return False
    return True
