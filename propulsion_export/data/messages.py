"""Conversations in data: messages with role and content, checked and in the form templates take."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from propulsion_export.base_model.chat.format import ChatFormat
from propulsion_export.base_model.chat.places import FIRST_MARK
from propulsion_export.data.rows import half_character, shown

MESSAGES = "messages"  # the column of conversations
TOOLS = "tools"  # the column of what the assistant may call
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function")


@dataclass(frozen=True)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: what a chat template takes: no nulls, contents as strings, arguments of calls as
            objects.
        tools: JSON schemas of what the assistant may call; None without any.
        unlearnt: indices of the assistant's messages with `weight: 0`.
        where: the file and row, for messages of errors.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    unlearnt: frozenset[int] = frozenset()
    where: str = field(default="", compare=False, repr=False)

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [n for n, one in enumerate(self.messages) if one["role"] == ASSISTANT]


def parse_conversation(value: Any, tools: Any = None, where: str = "") -> Conversation | str:
    """The conversation in a value, or the finding if there is none.

    Args:
        value: the messages, perhaps as JSON text.
        tools: a list of JSON schemas, such a list as JSON text, or None.
        where: the file and row.
    """
    value = _loaded(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        return f"{MESSAGES} is {shown(value)}, expected a list of messages"
    if not value:
        return f"{MESSAGES} is empty, expected a message or more"
    parsed = [_parse_message(f"message {n}", one) for n, one in enumerate(value, 1)]
    for one in parsed:
        if isinstance(one, str):
            return one
    offered = _parse_tools(tools)
    if isinstance(offered, str):
        return offered
    messages = [one for one in parsed if isinstance(one, dict)]
    weights = [message.pop("weight", 1) for message in messages]
    unlearnt = frozenset(n for n, weight in enumerate(weights) if weight == 0)
    return Conversation(messages, offered, unlearnt, where)


def held_mark(conversation: Conversation, chat: ChatFormat) -> str | None:
    """The finding if a message holds a mark that divides turns in a format, else None.

    A tokenizer reads such a mark as the token that it is: a message could forge a turn.
    """
    for number, message in enumerate(conversation.messages, 1):
        marks = [mark[0] for text in _texts_of(message) for mark in chat.marks_in(text)]
        if found := [mark for mark in marks if mark in chat.structure]:
            return f"message {number} holds {found[0]!r}, which divides turns in the chat template"
    return None


def _texts_of(value: Any) -> Iterator[str]:
    """Every text inside plain JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_of(one)


def _parse_message(place: str, message: Any) -> dict[str, Any] | str:
    if not isinstance(message, Mapping):
        return f"{place} is {shown(message)}, expected an object with role and content"
    plain = _plain(message)
    if isinstance(plain, str):
        return f"{place}: {plain}"
    role = plain.get("role")
    if role not in ROLES:
        return f"{place} has the role {shown(role)}, expected one of {', '.join(ROLES)}"
    for parse in (_parse_content, _parse_calls):
        if wrong := parse(place, plain):
            return wrong
    if plain.get("weight", 1) not in (0, 1):
        return f"{place} has the weight {shown(plain['weight'])}, expected 0 or 1"
    for text in _texts_of(plain):
        if wrong := half_character(place, text) or _mark(place, text):
            return wrong
    return plain


def _plain(message: Mapping[str, Any]) -> dict[str, Any] | str:
    """A copy in plain JSON values without nulls, which Arrow adds for what a row does not have."""
    try:
        plain = _without_nulls(json.loads(json.dumps(dict(message))))
    except (TypeError, ValueError) as error:
        return f"holds what is no JSON ({error})"
    assert isinstance(plain, dict)
    return plain


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _parse_content(place: str, message: dict[str, Any]) -> str | None:
    """Make the content a string, in place; returns the finding if it cannot be one."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if not (isinstance(part, dict) and _is_text(part))]
        if parts:
            return f"{place} has the content {shown(parts[0])}, expected parts of type text"
        content = message["content"] = "".join(part["text"] for part in content)
    if content is None and message["role"] == ASSISTANT and message.get("tool_calls"):
        return None
    if not isinstance(content, str):
        return f"{place} has the content {shown(content)}, expected a string"
    return None


def _is_text(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _parse_calls(place: str, message: dict[str, Any]) -> str | None:
    """Make the arguments of calls objects, in place; returns the finding if they are none."""
    calls = message.get("tool_calls")
    if not calls:
        message.pop("tool_calls", None)
        return None
    if message["role"] != ASSISTANT or not isinstance(calls, list):
        return f"{place} has tool_calls {shown(calls)}, expected a list, of an assistant"
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"{place} has the call {shown(call)}, expected one with a function's name"
        given = function.get("arguments", {})
        arguments = _loaded(given) if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            return f"{place} has the arguments {shown(given)}, expected a JSON object"
        function["arguments"] = arguments
    return None


def _parse_tools(tools: Any) -> list[Any] | str | None:
    found = _loaded(tools) if isinstance(tools, str) else tools
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return f"{TOOLS} is {shown(tools)}, expected a list of JSON schemas"
    return [_without_nulls(one) for one in found]


def _loaded(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none."""
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError:
        return text


def _mark(place: str, text: str) -> str | None:
    found = next((one for one in text if ord(one) >= FIRST_MARK), None)
    if found is None:
        return None
    return f"{place} holds the private-use character U+{ord(found):X}, expected characters of texts"
