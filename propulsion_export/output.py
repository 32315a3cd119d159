"""Outputs appear whole or not at all: written aside, then moved into place."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from propulsion_export.errors import UsageError

# A directory may be replaced with `force` only when one of these says that we wrote it.
MARKERS = ("propulsion.json", "adapter_config.json", "parity.json")


@contextmanager
def staged_directory(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `destination`; on success it becomes `destination`.

    On failure, Ctrl-C included, it is removed and what stood at `destination` stays. A killed
    process leaves only a hidden `.NAME.partial-PID` behind, which the next call sweeps.

    Raises:
        UsageError: `destination` exists and is not empty and `force` is off; it was not written by
            this tool; its parent cannot be written to; the disk is full.
    """
    destination = destination.expanduser().resolve()
    with _disk_errors_in_words(destination, _FULL | _FORBIDDEN):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep(destination)
        check_replaceable(destination, force=force)
        partial = _aside(destination, "partial")
        partial.mkdir()
    try:
        with _disk_errors_in_words(destination):
            yield partial
            _sync(partial)
            _move_into_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(destination: Path, *, force: bool) -> None:
    """Refuse a destination that holds something which must not be lost.

    Commands call it before long work, so that the refusal comes at once.

    Raises:
        UsageError: it exists, and is no empty directory, and `force` is off or would be unsafe.
    """
    destination = destination.expanduser().resolve()
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination}: is a file, expected a directory to write to")
    if not any(destination.iterdir()):
        return
    if not force:
        raise UsageError(
            f"{destination}: exists and is not empty, expected a new or empty directory",
            remedy="Choose another directory, or replace this one with --force.",
        )
    if not any((destination / marker).is_file() for marker in MARKERS):
        raise UsageError(
            f"{destination}: holds none of {', '.join(MARKERS)}, so this tool did not write it "
            "and --force does not replace it",
            remedy="Choose another directory.",
        )
    if Path.cwd().is_relative_to(destination):
        raise UsageError(f"{destination}: the current directory lies inside, it is not replaced")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any byte leaves the old or the new content."""
    with _disk_errors_in_words(path, _FULL | _FORBIDDEN):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        aside = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.chmod(0o644)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _aside(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{what}-{os.getpid()}")


def _move_into_place(partial: Path, destination: Path) -> None:
    if not destination.exists():
        partial.rename(destination)
        return
    replaced = _aside(destination, "replaced")
    destination.rename(replaced)
    partial.rename(destination)
    shutil.rmtree(replaced, ignore_errors=True)


def _sweep(destination: Path) -> None:
    """Remove what killed processes left; give back what one was about to replace."""
    pattern = re.compile(re.escape(f".{destination.name}.") + r"(partial|replaced)-(\d+)")
    for left in destination.parent.iterdir():
        match = pattern.fullmatch(left.name)
        if not match or _alive(int(match[2])):
            continue
        if match[1] == "replaced" and not destination.exists():
            left.rename(destination)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # our own earlier call in this process has ended
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(directory: Path) -> None:
    """Flush every file, so that the rename cannot survive a crash that the content does not."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
}
_FORBIDDEN = {
    errno.EACCES: "no permission to write here",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def _disk_errors_in_words(destination: Path, reasons: Mapping[int, str] = _FULL) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if reason := next((text for code, text in reasons.items() if _is(error, code)), None):
            raise UsageError(
                f"{destination}: {reason}; nothing was written",
                remedy="Choose another place for the output.",
            ) from error
        raise


def _is(error: Exception, code: int) -> bool:
    """Whether the system refused with `code`; writers in Rust and C++ say it in the text only."""
    return (isinstance(error, OSError) and error.errno == code) or (
        f"os error {code}" in str(error) or os.strerror(code) in str(error)
    )
