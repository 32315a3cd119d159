"""Copy a range of one file to the end of another, in the kernel where it can."""

import errno
import os

from propulsion_export.errors import BaseModelError

_PIECE = 1 << 20
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def copy_range(source: int, target: int, start: int, size: int) -> None:
    """Copy bytes to where the target's descriptor stands, and move that on.

    Raises:
        BaseModelError: the source ends before.
        OSError: what reading or writing reports.
    """
    left = size
    try:
        while left:
            left -= _moved(os.copy_file_range(source, target, left, start + size - left))
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    while left:
        piece = os.pread(source, min(_PIECE, left), start + size - left)
        _moved(len(piece))
        write_all(target, piece)
        left -= len(piece)


def write_all(target: int, content: bytes | memoryview) -> None:
    """Write all of it; a single write may stop before."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(target, rest) :]


def _moved(count: int) -> int:
    if count == 0:
        raise BaseModelError(
            "the base model's file has become shorter while it was read", remedy="Merge again."
        )
    return count
