"""The directory of an artifact that a path led to at one moment, whatever it leads to later.

Releases are switched by repointing a link, `current -> release-1`. What follows the link anew with
every file would read one release's graph with the other's adapters.
"""

import os
from contextlib import suppress
from pathlib import Path

from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.environment.paths import check_is_utf8, real_directory, user_path
from propulsion_export.errors import ArtifactError, UsageError


class BoundDirectory:
    """A directory found once, and held open, so that another one in its place is noticed.

    Attributes:
        given: the path that it was found by.
        path: where it is, through no link.

    Args:
        given: a path to an artifact's directory; it may lead through links.
        path: the directory, where the path has been followed already.
    """

    def __init__(self, given: Path | str, path: Path | None = None) -> None:
        self._descriptor: int | None = None
        self.given = user_path(given)
        self.path = find_directory(given) if path is None else real_directory(path)
        with suppress(OSError):  # who reads it says what is wrong
            # Held open, so that the system gives its number to no other directory.
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def is_there(self) -> bool:
        """Whether the directory is still where it was found."""
        return self._is_at(self.path)

    def check_there(self) -> None:
        """Check that what was read by `path` was read from this directory.

        Raises:
            ArtifactError: another directory was put in its place, or it was deleted.
        """
        if not self.is_there():
            raise ArtifactError(
                f"{self.path}: was replaced or deleted while it was read, expected one directory",
                remedy="Try again.",
            )

    def check_followed(self) -> None:
        """Check that the path that was given still leads to this directory.

        Raises:
            ArtifactError: the path leads nowhere any more.
            UsageError: it leads to another directory.
        """
        now = find_directory(self.given)
        if self._is_at(now):
            return
        if not now.is_dir():
            raise deleted(self.given)
        raise UsageError(
            f"{self.given}: is another directory now ({now}) than the one that was read "
            f"({'replaced since' if now == self.path else self.path}); nothing was changed",
            remedy="Refresh the session, which follows the path, or try again.",
        )

    def _is_at(self, path: Path) -> bool:
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))  # noqa: PTH116
        except OSError:
            return False


def find_directory(path: Path | str) -> Path:
    """The directory of an artifact that a path leads to now.

    In a volume of Kubernetes the files of a directory are links through another one inside it,
    `..data`, which is repointed: then it is where that leads.

    Raises:
        UsageError: see `real_directory`; its name is no UTF-8, which the runtimes cannot open.
    """
    directory = real_directory(path)
    check_is_utf8(directory)
    manifest = directory / MANIFEST_FILE
    if not manifest.is_symlink():
        return directory
    target = directory / manifest.readlink()
    data = target.parent
    through = data.is_symlink() and data.parent == directory and target.name == MANIFEST_FILE
    return real_directory(data) if through else directory


def deleted(path: Path) -> ArtifactError:
    """The error for an artifact that was there and is gone."""
    return ArtifactError(
        f"{path}: is no directory any more, expected the artifact that was read; an open "
        "session goes on with what it has read",
        remedy="Put an artifact there, or open a session of another directory.",
    )
