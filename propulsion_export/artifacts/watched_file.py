"""Notice that a file which others have mapped or loaded is written to, without reading it."""

import hashlib
import os
import time
import weakref
from pathlib import Path
from typing import IO, NamedTuple

_PIECE = 1 << 20  # bytes that are read at a time
_CLOCK_TICK = 20_000_000  # nanoseconds within which two writes may get the same time


class Moment(NamedTuple):
    """When a file last changed, in nanoseconds, and its size in bytes.

    The system sets this time (`ctime`) itself with every write; no program sets it back.
    """

    changed: int
    size: int


class WatchedFile:
    """A file that stays the same one, whatever is put in its place.

    Attributes:
        path: where it was.
        identity: its device and inode.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.path = Path(file.name)
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        stat = os.fstat(self._descriptor)
        self.identity = stat.st_dev, stat.st_ino
        self._written = stat.st_mtime_ns, stat.st_size

    def size(self) -> int:
        """Its size in bytes."""
        return os.fstat(self._descriptor).st_size

    def moment(self) -> Moment | None:
        """When it last changed; None if that is so recent that another write may get its time."""
        stat = os.fstat(self._descriptor)
        recent = abs(time.time_ns() - stat.st_ctime_ns) < _CLOCK_TICK
        return None if recent else Moment(stat.st_ctime_ns, stat.st_size)

    def is_only_replaced(self) -> bool:
        """Whether no path leads to it any more, and its size and time of writing are as before."""
        stat = os.fstat(self._descriptor)
        return stat.st_nlink == 0 and (stat.st_mtime_ns, stat.st_size) == self._written

    def digest(self) -> str:
        """`sha256:…` of its content."""
        digest, place = hashlib.sha256(), 0
        while content := os.pread(self._descriptor, _PIECE, place):
            digest.update(content)
            place += len(content)
        return f"sha256:{digest.hexdigest()}"
