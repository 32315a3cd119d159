"""Copy a range of one file to the end of another, in the kernel where it can."""

import errno
import os
from collections.abc import Callable

from propulsion_export.errors import BaseModelError

_PIECE = 1 << 20
_AT_ONCE = 1 << 26  # bytes that the kernel copies in one call
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_CANNOT |= {errno.EIO}  # on which side, reading and writing apart tell
_REMEDY = "Copy the file again."


def copy_range(
    source: int, target: int, start: int, size: int, report: Callable[[int], None]
) -> None:
    """Copy bytes to where the target's descriptor stands, and move that on.

    Args:
        source: the descriptor to read.
        target: the one to write.
        start: the first byte in the source.
        size: how many bytes.
        report: called with the number of bytes of each part that is copied.

    Raises:
        BaseModelError: the source ends before, or cannot be read.
        OSError: what writing reports.
    """
    left = size
    try:
        while left:
            place, count = start + size - left, min(left, _AT_ONCE)
            copied = _moved(os.copy_file_range(source, target, count, place))
            left -= copied
            report(copied)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    while left:
        piece = read_range(source, start + size - left, min(_PIECE, left))
        write_all(target, piece)
        left -= len(piece)
        report(len(piece))


def read_range(source: int, start: int, size: int) -> bytes:
    """Bytes of a file.

    Raises:
        BaseModelError: it ends before, or cannot be read.
    """
    found = b""
    while len(found) < size:
        try:
            piece = os.pread(source, size - len(found), start + len(found))
        except OSError as error:
            raise BaseModelError(f"cannot be read ({error.strerror})", remedy=_REMEDY) from error
        _moved(len(piece))
        found += piece
    return found


def write_all(target: int, content: bytes | memoryview) -> None:
    """Write all of it; a single write may stop before."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(target, rest) :]


def _moved(count: int) -> int:
    if count == 0:
        raise BaseModelError("has become shorter while it was read", remedy=_REMEDY)
    return count
