"""Where the contents of messages stand in a rendered conversation.

Characters that no text holds are put around each content before a template renders it, and taken
out of what it has rendered.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FIRST_MARK = 0x100000  # two characters for each message, from here on
MOST_MESSAGES = 0x7F00
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Around a content, or only before or behind it, for templates that look at how contents begin or
# end; `contents` marks no calls of tools.
MarkStyle = Literal["both", "contents", "before", "behind"]
STYLES: tuple[MarkStyle, ...] = ("both", "contents", "behind", "before")


@dataclass(frozen=True)
class Marked:
    """A rendered conversation without its marks.

    Attributes:
        text: what the template renders, if the marks changed nothing else.
        starts: by message, where its contents start, in characters.
        ends: by message, where its contents end.
    """

    text: str
    starts: Mapping[int, Sequence[int]]
    ends: Mapping[int, Sequence[int]]

    def last(self, message: int) -> int | None:
        """The last known place inside a message; None where it is not in the text."""
        return max([*self.starts.get(message, ()), *self.ends.get(message, ())], default=None)

    def first(self, message: int) -> int | None:
        """The first known place inside a message."""
        return min([*self.starts.get(message, ()), *self.ends.get(message, ())], default=None)


def mark_messages(messages: Sequence[Mapping[str, Any]], style: MarkStyle) -> list[dict[str, Any]]:
    """Copies of messages with marks in their contents, reasoning and calls of tools."""
    return [_marked_message(message, n, style) for n, message in enumerate(messages)]


def read_marks(rendered: str) -> Marked:
    """Take the marks out of a rendered conversation."""
    pieces: list[str] = []
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    length = begin = 0
    for place, character in enumerate(rendered):
        number = ord(character) - FIRST_MARK
        if 0 <= number < 2 * MOST_MESSAGES:
            pieces.append(rendered[begin:place])
            length += place - begin
            begin = place + 1
            (ends if number % 2 else starts).setdefault(number // 2, []).append(length)
    return Marked("".join([*pieces, rendered[begin:]]), starts, ends)


def common_length(left: str, right: str) -> int:
    """How many characters two texts have in common at their start."""
    sizes = range(1, min(len(left), len(right)) + 1)
    return bisect_left(sizes, True, key=lambda size: left[:size] != right[:size])


def _marked_message(message: Mapping[str, Any], index: int, style: MarkStyle) -> dict[str, Any]:
    def mark(text: str) -> str:
        return _marked_text(text, index, style)

    copy = dict(message)
    for name in ("content", *_REASONING):
        if isinstance(copy.get(name), str):
            copy[name] = mark(copy[name])
    if "tool_calls" in copy and style != "contents":
        copy["tool_calls"] = [_marked_call(call, mark) for call in copy["tool_calls"]]
    return copy


def _marked_call(call: Mapping[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
    function = call.get("function", call)
    marked = {**function, "name": mark(function["name"])}
    marked["arguments"] = _marked_values(function.get("arguments", {}), mark)
    return {**call, "function": marked} if "function" in call else marked


def _marked_values(value: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, dict):
        return {name: _marked_values(one, mark) for name, one in value.items()}
    if isinstance(value, list):
        return [_marked_values(one, mark) for one in value]
    return value


def _marked_text(text: str, index: int, style: MarkStyle) -> str:
    """A text with marks inside the white space around it, which a template may remove."""
    core = text.strip()
    if not core:
        return text
    at = text.index(core)
    start, end = chr(FIRST_MARK + 2 * index), chr(FIRST_MARK + 2 * index + 1)
    start, end = start * (style != "behind"), end * (style != "before")
    return f"{text[:at]}{start}{core}{end}{text[at + len(core) :]}"
