"""One lock on an artifact's directory: many may read at a time, or one may change its adapters.

The lock is on the directory itself, so that none is left behind, not even by a killed process.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from propulsion_export.errors import ArtifactError


@contextmanager
def locked(artifact: Path) -> Iterator[None]:
    """Let nobody else change or read the artifact's adapters meanwhile.

    Raises:
        ArtifactError: there is no such directory, or its file system has no locks.
    """
    try:
        descriptor = _open(artifact.expanduser())
    except OSError as error:
        raise ArtifactError(
            f"{artifact}: cannot be opened ({error.strerror}), expected an artifact directory"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        os.close(descriptor)
        raise ArtifactError(
            f"{artifact}: cannot be locked ({error.strerror})",
            remedy="Change a copy of it on a local disk.",
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_still(artifact: Path) -> Iterator[None]:
    """Let nobody change the artifact's adapters meanwhile.

    Of no directory, or of one without locks, nobody changes any.
    """
    descriptor = None
    with suppress(OSError):
        descriptor = _open(artifact)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
