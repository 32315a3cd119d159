"""What stands in for a file: a link into a hub's cache, or a pointer that git-lfs left.

huggingface_hub keeps each file once, `models--owner--name/blobs/HASH`, and links to it from
`models--owner--name/snapshots/REVISION/`.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from propulsion_export.errors import PropulsionExportError

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_LARGEST_POINTER = 1024


def leads_inside(directory: Path, name: str) -> bool:
    """Whether a path, with links resolved, stays in the directory; an unusable path does not.

    In a hub's cache, the files of the same repository count as inside.
    """
    try:
        inside, path = directory.resolve(), (directory / name).resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        return False
    if path.is_relative_to(inside):
        return True
    repository = cached_repository(directory)
    return repository is not None and path.parent == repository / "blobs"


def cached_repository(path: Path) -> Path | None:
    """The repository in a hub's cache that a path lies in, with links resolved; None elsewhere."""
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if _REPOSITORY.fullmatch(folder.name) and (folder / "snapshots").is_dir():
            return folder
    return None


def is_pointer(file: Path) -> bool:
    """Whether a file is what git-lfs leaves in the place of one that was not downloaded."""
    try:
        if not os.path.isfile(file) or file.stat().st_size > _LARGEST_POINTER:  # noqa: PTH113
            return False
        with file.open("rb") as content:
            return content.read(len(_POINTER)) == _POINTER
    except (OSError, ValueError):  # whoever reads the file says why
        return False


def refuse_pointers(files: Iterable[Path], error: type[PropulsionExportError]) -> None:
    """Refuse files of which only git-lfs's pointers are there; missing files are skipped.

    Raises:
        PropulsionExportError: the `error` given, naming all of them.
    """
    if found := [file for file in files if is_pointer(file)]:
        raise error(
            *(f"{file}: is a git-lfs pointer, expected the file itself" for file in found),
            remedy="Run `git lfs pull` in its repository.",
        )
