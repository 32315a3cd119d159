"""Lock an artifact's directory: shared to read its adapters, exclusive to change them.

The lock is on the directory itself, so that no lock file is left behind, and the system releases it
when a process is killed. A forked process inherits the descriptor, and with it the lock: it closes
the descriptor at once, and the lock is released explicitly, so that no fork keeps it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from propulsion_export.environment.forking import no_fork
from propulsion_export.environment.lock_holders import lock_holder
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import ArtifactError

_PATIENCE = 60.0  # seconds to wait for other processes
_PAUSE = 0.01  # seconds between attempts
# Descriptors that this process holds a lock with.
_held: set[int] = set()


@contextmanager
def exclusive_lock(artifact: Path | str) -> Iterator[None]:
    """Keep other processes from reading or changing the artifact's adapters meanwhile.

    Raises:
        ArtifactError: there is no such directory; its file system has no locks; another process
            keeps it locked.
    """
    try:
        descriptor = _open(user_path(artifact))
    except OSError as error:
        raise ArtifactError(
            f"{artifact}: cannot be opened ({error.strerror}), expected an artifact directory"
        ) from error
    try:
        try:
            _lock(descriptor, fcntl.LOCK_EX, artifact)
        except OSError as error:
            raise ArtifactError(
                f"{artifact}: cannot be locked ({error.strerror})",
                remedy="Change a copy of it on a local disk.",
            ) from error
        yield
    finally:
        _release(descriptor)


@contextmanager
def shared_lock(artifact: Path) -> Iterator[None]:
    """Keep other processes from changing the artifact's adapters meanwhile.

    Without a directory, or on a file system without locks, nothing can change (`exclusive_lock`
    refuses), so nothing is locked.

    Raises:
        ArtifactError: another process keeps it locked.
    """
    descriptor = None
    try:
        with suppress(OSError):
            descriptor = _open(artifact)
            _lock(descriptor, fcntl.LOCK_SH, artifact)
        yield
    finally:
        if descriptor is not None:
            _release(descriptor)


def _open(directory: Path) -> int:
    with no_fork():  # a fork closes the descriptors that it finds in `_held`
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _held.add(descriptor)
    return descriptor


def _release(descriptor: int) -> None:
    if descriptor not in _held:  # this process is a fork, which closed it
        return
    with no_fork():
        _held.remove(descriptor)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _lock(descriptor: int, kind: int, artifact: Path | str) -> None:
    """Wait for a lock, which others hold for seconds; give up on one held by a stopped process."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise ArtifactError(
                    f"{artifact}: stays locked for {_PATIENCE:.0f} s by "
                    f"{lock_holder(user_path(artifact))}",
                    remedy="Try again once that has ended.",
                ) from error
            time.sleep(_PAUSE)
        else:
            return
