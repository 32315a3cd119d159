"""Find and copy single files of a model, in a directory, from a GGUF file or on a hub."""

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import BaseModelError


def locate(source: str, name: str) -> Path | None:
    """The path of a model's file, downloaded if necessary; None if the model does not have it.

    Raises:
        BaseModelError: only the pointer that git-lfs left is there, or the model is a GGUF file
            that is refused.
    """
    file = _found(source, name)
    if file is not None:
        refuse_pointers([file], BaseModelError)
    return file


def _found(source: str, name: str) -> Path | None:
    source = small_files(source)
    directory = Path(source)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from transformers.utils import cached_file

    try:
        with quiet():
            file = cached_file(
                source,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
    except OSError:  # neither a directory nor a possible name
        return None
    return Path(file) if file is not None else None


def leads_inside(name: str) -> bool:
    """Whether the name of a file stays inside the model that it is a file of."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.name)


def copy_files(names: Sequence[str], source: str, directory: Path) -> None:
    """Copy the named files unchanged, as far as the model has them."""
    for name in names:
        file = locate(source, name)
        if file is not None:
            shutil.copyfile(file, directory / name)
