"""The bytes of a GGUF file's metadata with some keys added or replaced."""

import struct
from collections.abc import Mapping, Sequence

_STRING, _ARRAY = 8, 9
Text = str | Sequence[str]


def with_keys(
    content: bytes, places: Mapping[str, tuple[int, int]], values: Mapping[str, Text]
) -> tuple[bytes, int]:
    """Each key with its value, in the order of the file, then those that are new; and their number.

    Args:
        content: the start of the file.
        places: where each key with its value lies in it.
        values: texts, or lists of texts, to write under their keys. The others stay byte for byte.
    """
    kept = [
        _pair(key, values[key]) if key in values else content[first:last]
        for key, (first, last) in places.items()
    ]
    new = [_pair(key, value) for key, value in values.items() if key not in places]
    return b"".join((*kept, *new)), len(kept) + len(new)


def _pair(key: str, value: Text) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _STRING) + _text(value)
    head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
    return _text(key) + head + b"".join(_text(each) for each in value)


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "backslashreplace")  # bytes of a path that are no UTF-8
    return struct.pack("<Q", len(encoded)) + encoded
