"""Read the conversations that a model is to go on with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from propulsion_export.data.files import read_file
from propulsion_export.data.lines import decoded
from propulsion_export.data.messages import MESSAGES, TOOLS, Conversation, parse_conversation
from propulsion_export.data.rows import DataRow, check_columns, column_names, parse_rows
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.errors import DataError


def read_conversations(file: Path) -> list[Conversation]:
    """The conversations in a file.

    A JSON file holds one, a list of messages or an object with `messages` (and `tools`), or a list
    of several. Other files hold one in each row, in the column `messages`.

    Raises:
        DataError: the file is missing, empty or damaged, or a row is no conversation.
    """
    rows = _rows(file)
    if not rows:
        raise DataError(f"{file}: is empty, expected a conversation")
    if "role" in column_names(rows) and MESSAGES not in column_names(rows):
        rows = [("the file", {MESSAGES: [dict(row) for _, row in rows]})]
    check_columns(file, rows, {f"the name {MESSAGES}": MESSAGES})
    return parse_rows(file, rows, lambda row: parse_conversation(row.get(MESSAGES), row.get(TOOLS)))


def _rows(file: Path) -> Sequence[DataRow]:
    value = _json(file) if file.suffix.lower() == ".json" and file.is_file() else None
    if isinstance(value, dict):
        return [("the file", value)]
    if isinstance(value, list) and any(isinstance(one, list) for one in value):
        return [(f"item {n}", {MESSAGES: one}) for n, one in enumerate(value, 1)]
    return list(read_file(file))


def _json(file: Path) -> Any:
    """The value of a file that is one JSON text; None where it is not, as with one on each line."""
    refuse_pointers([file], DataError)
    try:
        return json.loads(decoded(file))
    except (ValueError, RecursionError):
        return None
