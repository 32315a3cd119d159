"""Read what to generate from a data file: texts, prompts with responses, or conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.base_model.tasks import TASKS
from propulsion_export.data.lines import TEXT
from propulsion_export.data.messages import MESSAGES, TOOLS, Conversation, parse_conversation
from propulsion_export.data.rows import (
    DataRow,
    check_columns,
    column_names,
    parse_rows,
    wrong_text,
)
from propulsion_export.data.sources import read_rows
from propulsion_export.errors import DataError
from propulsion_export.training.data import Columns


@dataclass(frozen=True)
class Passage:
    """A text to generate, or a response with its prompt; `prompt` is None for a text."""

    prompt: str | None
    response: str


Learnt = Passage | Conversation


def read_passages(source: Path, columns: Columns) -> list[Passage] | list[Conversation]:
    """Read every row of the files and data sets that `read_examples` reads.

    The rows are conversations if there is a column `messages`, or if the text column alone is named
    and holds lists; texts if only the text column is named, or if there is a column `text`; else
    prompts with responses. Encoder-decoders take prompts with responses only.

    Raises:
        DataError: as for `read_examples`; or the columns of several forms are there.
    """
    rows = read_rows(source)
    if chats := _conversation_column(source, rows, columns):
        return _conversations(source, rows, chats)
    prompt, response = _forms(source, column_names(rows), columns)
    wanted = {"--text-column": response}
    if prompt:
        wanted = {"--text-column": prompt, "--label-column": response}
    check_columns(source, rows, wanted)
    return parse_rows(source, rows, lambda row: _passage(row, prompt, response))


def check_same_form(source: Path, learnt: Sequence[Learnt], training: Sequence[Learnt]) -> None:
    """Refuse validation texts for a training on responses, and so on.

    Raises:
        DataError: the forms differ.
    """
    form, expected = (_form(items[0]) for items in (learnt, training))
    if form != expected:
        raise DataError(f"{source}: holds {form}, expected {expected}, as the training data")


def _conversation_column(source: Path, rows: Sequence[DataRow], columns: Columns) -> str | None:
    """The column of conversations; None where the rows are something else."""
    if columns.label or TASKS[columns.task].architecture == "encoder-decoder":
        return None
    if columns.text:
        first = next((row[columns.text] for _, row in rows if columns.text in row), None)
        return columns.text if columns.text == MESSAGES or isinstance(first, list) else None
    found, usual = column_names(rows), columns.training
    if MESSAGES not in found:
        return None
    if TEXT in found or {usual.text, usual.label} <= set(found):
        others = TEXT if TEXT in found else f"{usual.text}' and '{usual.label}"
        raise DataError(
            f"{source}: has the columns {MESSAGES!r} and '{others}', expected either conversations "
            "or others",
            remedy=f"Choose with --text-column {MESSAGES}, or name the others.",
        )
    return MESSAGES


def _conversations(source: Path, rows: Sequence[DataRow], column: str) -> list[Conversation]:
    check_columns(source, rows, {"--text-column": column})
    named = [(where, {**row, "": f"{source}: {where}"}) for where, row in rows]
    return parse_rows(
        source,
        named,
        lambda row: parse_conversation(row.get(column), row.get(TOOLS), row[""]),
    )


def _forms(source: Path, found: Sequence[str], columns: Columns) -> tuple[str | None, str]:
    """The column of the prompts, None for texts alone, and the column that is learnt."""
    usual = columns.training
    pair = columns.text or usual.text, columns.label or usual.label
    if columns.label or TASKS[columns.task].architecture == "encoder-decoder":
        return pair
    if columns.text:
        return None, columns.text
    has_pair, has_text = set(pair) <= set(found), TEXT in found
    if has_pair and has_text:
        raise DataError(
            f"{source}: has the columns {pair[0]!r}, {pair[1]!r} and {TEXT!r}, expected either "
            "prompts with responses or texts",
            remedy=f"Choose with --label-column {pair[1]} or with --text-column {TEXT}.",
        )
    if not has_pair and not has_text:
        raise DataError(
            f"{source}: has neither {TEXT!r} nor both {pair[0]!r} and {pair[1]!r}, found "
            f"{', '.join(map(repr, found))}",
            remedy="Name the column of texts or conversations with --text-column, or those of "
            "prompts and responses with --text-column and --label-column.",
        )
    return pair if has_pair else (None, TEXT)


def _passage(row: Mapping[str, Any], prompt: str | None, response: str) -> Passage | str:
    """The passage in a row, or the finding if the row is bad."""
    if wrong := (prompt and wrong_text(row, prompt)) or wrong_text(row, response):
        return wrong
    return Passage(row[prompt] if prompt else None, row[response])


def _form(learnt: Learnt) -> str:
    if isinstance(learnt, Conversation):
        return "conversations"
    return "texts" if learnt.prompt is None else "prompts with responses"
