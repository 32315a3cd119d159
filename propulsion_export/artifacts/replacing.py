"""Put a finished directory in the place of an older one, and clean up after killed processes.

Beside a destination NAME there may be, with the number of the process that made them:

    .NAME.partial-PID    a directory or file that is being written
    .NAME.copy-PID       a copy of the older output that is being written
    .NAME.replaced-PID   the older output, moved away; it is missing at NAME for a moment
    .NAME.restore-PID    a whole copy of the older output, while the one at NAME is removed

Whatever line a kill interrupts, the old or the new output is whole at NAME after the next `sweep`.
"""

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

# Renaming a directory of a lower layer on an overlay file system, such as a container's image.
_CANNOT_RENAME = {errno.EXDEV, errno.EBUSY}
_SUFFIX = r"(partial|copy|replaced|restore)-([1-9]\d{0,8})(-[0-9a-f]{8})?"


def aside(destination: Path, what: str) -> Path:
    """The hidden name beside `destination` that this process uses."""
    return destination.with_name(f".{destination.name}.{what}-{os.getpid()}")


def replace_directory(partial: Path, destination: Path) -> None:
    """Move a whole directory to `destination`, in the place of what is there.

    An error leaves the old content there.
    """
    if not destination.exists() or not any(destination.iterdir()):
        partial.rename(destination)  # over an empty directory this is one step
        return
    replaced = aside(destination, "replaced")
    try:
        _move_away(destination, replaced)
        partial.rename(destination)
    except BaseException:
        if replaced.exists() and not destination.exists():
            replaced.rename(destination)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(destination: Path) -> None:
    """Remove what killed processes left behind; restore an output that one was replacing."""
    if not destination.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{destination.name}.") + _SUFFIX)
    for left in destination.parent.iterdir():
        match = pattern.fullmatch(left.name)
        if not match or _alive(int(match[2]), may_be_ours=match[3] is not None):
            continue
        if match[1] == "restore":
            _restore(left, destination)
        elif match[1] == "replaced" and not destination.exists():
            left.rename(destination)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sweep_inside(directory: Path, locked: str = "") -> None:
    """Remove the files that killed processes left half written in a directory, whatever their name.

    Args:
        directory: what does not exist holds none.
        locked: pattern of the names that only this process writes now, so that the number of a
            process that lives is not that of the writer: it was used again, or is another
            machine's.
    """
    pattern = re.compile(r"\.(.+)\." + _SUFFIX)
    for left in directory.iterdir() if directory.is_dir() else ():
        match = pattern.fullmatch(left.name)
        if not match or match[2] != "partial" or left.is_dir():
            continue
        ours = re.fullmatch(locked, match[1]) is not None
        if ours or not _alive(int(match[3]), may_be_ours=match[4] is not None):
            with suppress(OSError):  # a directory that cannot be written to: the change says so
                left.unlink(missing_ok=True)


def _move_away(destination: Path, replaced: Path) -> None:
    try:
        destination.rename(replaced)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME:
            raise
        _copy_away(destination, replaced)


def _copy_away(destination: Path, replaced: Path) -> None:
    """Do as `destination.rename(replaced)` where directories cannot be renamed."""
    copy, restore = aside(destination, "copy"), aside(destination, "restore")
    try:
        shutil.copytree(destination, copy, symlinks=True)
        sync(copy)
        copy.rename(restore)  # from here on it is what a sweep restores
        shutil.rmtree(destination)
        restore.rename(replaced)
    except BaseException:
        if restore.exists():
            _restore(restore, destination)
        raise
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _restore(copy: Path, destination: Path) -> None:
    if destination.exists():
        shutil.rmtree(destination)
    copy.rename(destination)


def sync(directory: Path) -> None:
    """Flush all files to the disk, so that a crash after a rename cannot lose their content."""
    for path in (*directory.rglob("*"), directory):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _alive(process: int, *, may_be_ours: bool) -> bool:
    if process == os.getpid():
        return may_be_ours  # if not, an earlier call in this process left it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Whether a process has ended, and only its parent has not asked how; False without /proc."""
    try:
        state = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False
    return state.rpartition(b")")[2].split()[:1] == [b"Z"]
