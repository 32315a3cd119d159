"""Read texts from a file."""

import json
from pathlib import Path

from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.errors import (
    DataError,
)


def read_texts(file: Path) -> list[str]:
    """The texts of a file: one per line, or the `text` of each line of a `.jsonl`.

    Raises:
        DataError: the file is missing or empty, or a line has no text.
    """
    refuse_pointers([file], DataError)
    try:
        # Not splitlines(): it also cuts at U+2028, which JSON allows inside a text.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError(f"{file}: is empty, expected a text on each line")
    if file.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: line {number} is no JSON object with a `text` ({error})"
            ) from error
        if not isinstance(texts[-1], str):
            raise DataError(f"{file}: line {number} has a `text` that is not a string")
    return texts
