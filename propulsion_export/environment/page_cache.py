"""What the system keeps of files in memory."""

import os
from pathlib import Path


def forget_cached(path: Path) -> None:
    """Let the next reader of a file read what is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
