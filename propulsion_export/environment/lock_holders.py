"""Which process keeps a file or directory locked, as far as the system says."""

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")  # Linux; other systems do not say
_LONGEST_COMMAND = 80


def lock_holder(path: Path) -> str:
    """Who holds a lock on a file or directory, for a message.

    Returns:
        A process with its number and command, such as `process 12 (python server.py)`, or another
        thread of this one; `another process` where the system says nothing.
    """
    found = _holding(path) or _recorded(path)
    others = [process for process in found if process != os.getpid()]
    if others:
        return _described(others[0])
    return "another thread of this process" if found else "another process"


def _holding(path: Path) -> list[int]:
    """Processes with an open descriptor that is locked: a fork may hold what another locked."""
    return list(dict.fromkeys(_descriptors(path)))


def _descriptors(path: Path) -> Iterator[int]:
    target = os.path.realpath(path)
    for descriptor in _PROC.glob("[1-9]*/fd/*"):
        try:
            if os.readlink(descriptor) != target:  # noqa: PTH115 - not a path, and compared as text
                continue
            notes = (descriptor.parent.parent / "fdinfo" / descriptor.name).read_text()
        except OSError:  # another user's process, or it has ended meanwhile
            continue
        if any(line.startswith("lock:") for line in notes.splitlines()):
            yield int(descriptor.parent.parent.name)


def _recorded(path: Path) -> list[int]:
    """The processes that locked it, as in `1: FLOCK ADVISORY WRITE 12 08:01:34 0 EOF`."""
    try:
        inode = str(path.stat().st_ino)
        lines = (_PROC / "locks").read_text().splitlines()
    except OSError:
        return []
    columns = [line.split() for line in lines]
    return [
        int(each[4])
        for each in columns
        if len(each) > 5 and each[1] != "->" and each[5].rpartition(":")[2] == inode
    ]


def _described(process: int) -> str:
    try:
        words = (_PROC / str(process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"process {process}, which has ended, or a fork of it"
    command = " ".join(os.fsdecode(b" ".join(words)).split())
    short = command if len(command) <= _LONGEST_COMMAND else f"{command[: _LONGEST_COMMAND - 3]}..."
    return f"process {process} ({short})" if command else f"process {process}"
