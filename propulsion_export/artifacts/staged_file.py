"""Write one large file to a temporary place and move it, so that it appears whole or not at all."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from propulsion_export.artifacts.disk_errors import FORBIDDEN, FULL, disk_errors_in_words
from propulsion_export.artifacts.replacing import aside, sweep
from propulsion_export.artifacts.staging import refuse_cache, refuse_inputs, refuse_unwritable
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import UsageError

_OTHER = "Choose another file."


@contextmanager
def staged_file(
    destination: Path,
    *,
    is_ours: Callable[[Path], bool],
    force: bool = False,
    inputs: Collection[Path | str] = (),
) -> Iterator[BinaryIO]:
    """Yield an empty file to write; on success it becomes `destination`.

    On failure, Ctrl-C included, it is removed and `destination` stays as it was. A killed process
    leaves only a hidden `.NAME.partial-PID` behind, which the next call removes.

    Args, raises: as for `check_replaceable_output`; UsageError too if the disk is full.
    """
    target = user_path(destination).resolve()
    check = partial(check_replaceable_output, target, is_ours=is_ours, force=force, inputs=inputs)
    with disk_errors_in_words(target, FULL | FORBIDDEN):
        check()
        target.parent.mkdir(parents=True, exist_ok=True)
        written = aside(target, "partial")
        file = written.open("xb", buffering=0)
    try:
        with disk_errors_in_words(target):
            with file:
                yield file
                os.fsync(file.fileno())
            # Checked again: another process may have written there meanwhile.
            check(clean=False)
            written.replace(target)
    finally:
        written.unlink(missing_ok=True)


def check_replaceable_output(
    destination: Path,
    *,
    is_ours: Callable[[Path], bool],
    force: bool,
    inputs: Collection[Path | str],
    clean: bool = True,
) -> None:
    """Refuse a destination that holds something which must not be lost.

    Args:
        destination: the file to write.
        is_ours: whether a file is an earlier output of the same command.
        force: replace an earlier output.
        inputs: files and directories that the output is made from, which are never replaced.
        clean: remove what killed processes left behind.

    Raises:
        UsageError: the destination is a directory, an input, or a file and `force` is off or it is
            no earlier output; nothing can be written there.
    """
    path = user_path(destination).resolve()
    with disk_errors_in_words(path, FORBIDDEN):
        refuse_cache(path)
        if clean:
            sweep(path)
        refuse_inputs(path, inputs, "file")
        refuse_unwritable(path)
        if path.is_dir():
            raise UsageError(f"{path}: is a directory, expected a file to write", remedy=_OTHER)
        if path.exists():
            _refuse_to_lose(path, is_ours, inputs, force=force)


def _refuse_to_lose(
    path: Path, is_ours: Callable[[Path], bool], inputs: Collection[Path | str], *, force: bool
) -> None:
    for each in map(user_path, inputs):
        if each.exists() and each.samefile(path):
            raise UsageError(f"{path}: is {each}, an input of this command", remedy=_OTHER)
    if not force:
        raise UsageError(
            f"{path}: exists, expected a new file",
            remedy="Choose another file, or replace this one with --force.",
        )
    if not is_ours(path):
        raise UsageError(
            f"{path}: is no output of this command, so --force does not replace it", remedy=_OTHER
        )
