"""Text that arrived as bytes which the locale's encoding cannot read."""

import re
import sys

_UNREAD = re.compile("[\udc80-\udcff]")  # a byte each, see PEP 383
LOCALE_REMEDY = "Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."


def unread_bytes(text: str) -> str | None:
    """What is wrong with a text that the locale's encoding could not read; None for any other.

    Where that encoding is UTF-8, the locale is not to blame.
    """
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8" or not _UNREAD.search(text):
        return None
    return f"holds bytes that the locale's encoding, {encoding}, cannot read, expected UTF-8"


def is_utf8(text: str) -> bool:
    """Whether all bytes that a text arrived as are UTF-8, so that it can leave as such."""
    return not _UNREAD.search(text)
