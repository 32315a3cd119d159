"""Errors of a full, read-only or forbidden disk, in words."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from propulsion_export.errors import UsageError

# What a full or read-only disk reports, by error number.
FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file may not grow that large",
    errno.EROFS: "the file system is read-only",
}
FORBIDDEN = {
    errno.EACCES: "no permission to write here",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "nothing can be created here",
    errno.EISDIR: "is a directory, expected a file to write",
}
ELSEWHERE = "Choose another place for the output."
# Some report a full disk without a number: numpy's tofile, then torch.save.
_UNNUMBERED = {
    errno.ENOSPC: re.compile(
        r"\d+ requested and \d+ written|unexpected pos \d+ vs \d+|iostream error"
        r"|PytorchStreamWriter failed writing"
    )
}


@contextmanager
def disk_errors_in_words(
    destination: Path, reasons: Mapping[int, str] = FULL, *, remedy: str = ELSEWHERE
) -> Iterator[None]:
    """Turn errors of a full or read-only disk into one line; other errors pass unchanged.

    Args:
        destination: the path that was being written, for the message.
        reasons: the text of the message by error number.
        remedy: the remedy in the message.

    Raises:
        UsageError: an error with one of the numbers in `reasons` occurred.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if reason := next((text for code, text in reasons.items() if _is(error, code)), None):
            raise UsageError(
                f"{destination}: {reason}; nothing was written", remedy=remedy
            ) from error
        raise


def _is(error: Exception, code: int) -> bool:
    """Whether the error has this number; writers in Rust and C++ give it only in the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == code
    text, unnumbered = str(error), _UNNUMBERED.get(code)
    return (
        re.search(rf"os error {code}\b", text) is not None
        or os.strerror(code) in text
        or (unnumbered is not None and unnumbered.search(text) is not None)
    )
