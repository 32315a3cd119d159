"""Conversations of a request: told from texts, and checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from propulsion_export.base_model.tasks import TASKS
from propulsion_export.data.messages import Conversation, parse_conversation
from propulsion_export.errors import UsageError

_ANSWERED = ("user", "tool", "function")  # roles of a last message that is to be answered


def conversations_in(inputs: Any, task: str) -> list[Conversation] | None:
    """The conversations of a request; None where it has texts or tensors.

    Args:
        inputs: the messages of one conversation, or several conversations.
        task: what the artifact is for.

    Raises:
        UsageError: naming each conversation that is none, or has nothing to answer; or the artifact
            is for another task.
    """
    if isinstance(inputs, str | Mapping):
        return None
    rows = list(inputs)
    answers = TASKS[task].architecture == "decoder"
    if any(map(_is_message, rows)):
        rows = [rows]
    elif not any(_is_conversation(row) or (answers and row == []) for row in rows):
        return None
    if not answers:
        raise UsageError(f"messages: are for text-generation, the artifact is for {task}")
    parsed = [row if isinstance(row, Conversation) else _parsed(row) for row in rows]
    findings = [
        f"conversation {number}: {wrong}"
        for number, one in enumerate(parsed, 1)
        if (wrong := one if isinstance(one, str) else _unanswerable(one))
    ]
    if findings:
        raise UsageError(*findings)
    return [one for one in parsed if isinstance(one, Conversation)]


def _is_conversation(row: Any) -> bool:
    if isinstance(row, Conversation):
        return True
    return isinstance(row, list | tuple) and any(map(_is_message, row))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "content" in value)


def _parsed(row: Any) -> Conversation | str:
    if isinstance(row, str) or not isinstance(row, Sequence):
        return f"is {type(row).__name__}, expected a list of messages"
    return parse_conversation(row)


def _unanswerable(conversation: Conversation) -> str | None:
    role = conversation.messages[-1]["role"]
    if role in _ANSWERED:
        return None
    return f"ends with a message of the role {role}, expected one of {', '.join(_ANSWERED)}"
