"""Find what an assistant says in a rendered conversation: from behind the header to the end mark.

The conversation is rendered once, and the places of its turns are found in that text. A prompt of
the model, which is the conversation up to a turn with the generation prompt, is the text's own
beginning with most templates; with those that write earlier turns otherwise later on, the turn is
found from marks around the contents. Where two ways disagree, or none finds a turn, the
conversation is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from propulsion_export.base_model.chat.format import ChatFormat
from propulsion_export.base_model.chat.places import (
    MOST_MESSAGES,
    STYLES,
    Marked,
    MarkStyle,
    common_length,
    mark_messages,
    read_marks,
)
from propulsion_export.base_model.chat.rendering import (
    GENERATION_END,
    GENERATION_START,
    TemplateRefusal,
    marks_generation,
)
from propulsion_export.data.messages import ASSISTANT, Conversation, held_mark

Span = tuple[int, int]  # characters of the rendered conversation


class UndecidedError(Exception):
    """It cannot be decided what is learnt of a conversation; the text says why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans that are learnt."""

    text: str
    spans: Sequence[Span]


def render_turns(conversation: Conversation, chat: ChatFormat) -> Rendered:
    """Render a conversation and find the assistant's turns.

    Raises:
        UndecidedError: the template refuses it, it has no turn to learn, or a turn cannot be found.
    """
    _check(conversation, chat)
    turns = _Turns(conversation, chat)
    if marks_generation(chat.template):
        spans = _generated(turns)
    else:
        spans = [turns.span(n) for n in conversation.answers if n not in conversation.unlearnt]
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise UndecidedError("two turns of the assistant overlap in the rendered text")
    return Rendered(turns.text, spans)


def _check(conversation: Conversation, chat: ChatFormat) -> None:
    if not conversation.answers:
        raise UndecidedError("has no message of the assistant, expected one to learn")
    if set(conversation.answers) <= conversation.unlearnt:
        raise UndecidedError("every message of the assistant has weight 0, expected one to learn")
    if len(conversation.messages) > MOST_MESSAGES:
        raise UndecidedError(f"has more than {MOST_MESSAGES} messages")
    if wrong := held_mark(conversation, chat):
        raise UndecidedError(wrong)


class _Turns:
    """The turns of one conversation."""

    def __init__(self, conversation: Conversation, chat: ChatFormat) -> None:
        self.conversation, self.chat = conversation, chat
        self.messages = conversation.messages
        self.text = self.render(self.messages)
        self.style: MarkStyle | None = None
        self.marked = Marked(self.text, {}, {})
        for style in STYLES:
            found = self._marked(len(self.messages), style)
            if found is not None and found.text == self.text:
                self.style, self.marked = style, found
                break

    def render(
        self, messages: Sequence[object], *, prompt: bool = False, generation: bool = False
    ) -> str:
        try:
            return self.chat.render(
                messages,  # type: ignore[arg-type]
                tools=self.conversation.tools,
                generation_prompt=prompt,
                mark_generation=generation,
            )
        except TemplateRefusal as error:
            raise UndecidedError(f"the chat template refuses it ({error})") from error

    def span(self, index: int) -> Span:
        """Where an answer stands, its end mark included."""
        self._check_shown(index)
        start = self._start(index)
        first = self._content_start(index)
        # The content itself may begin as the header ends, with <think>.
        if first is not None and not self.chat.header.endswith(self.text[first:start]):
            raise _undecided(index, "its content stands before the end of its header")
        between = self.text[start : start if first is None else first]
        opening = [mark[0] for mark in self.chat.marks_in(self.chat.header)[:1]]
        if any(mark[0] in opening for mark in self.chat.marks_in(between)):
            raise _undecided(index, "its header is not that of the generation prompt")
        end = self._end(index, start)
        for call in self.messages[index].get("tool_calls", ()):
            name = call.get("function", call)["name"]
            if name not in self.text[start:end]:
                raise _undecided(index, f"the chat template leaves out its call of {name!r}")
        return start, end

    def _content(self, index: int) -> str:
        content: str = self.messages[index].get("content", "")
        return content.strip()

    def _content_start(self, index: int) -> int | None:
        return min(self.marked.starts.get(index, ()), default=None)

    def _check_shown(self, index: int) -> None:
        """Refuse an answer that the template leaves out."""
        hidden = self.style is not None and self.marked.last(index) is None
        if hidden and self._content(index):
            raise _undecided(index, "the chat template leaves it out")

    # Where an answer starts

    def _start(self, index: int) -> int:
        prompt = self._prompt(index)
        by_prompt = by_marks = None
        if prompt is not None:
            if self.text.startswith(prompt.text):
                by_prompt = len(prompt.text)
            by_marks = self._start_by_marks(index, prompt)
            if None not in (by_prompt, by_marks) and by_prompt != by_marks:
                raise _undecided(index, "two ways to find where it starts disagree")
        found = by_marks if by_prompt is None else by_prompt
        if found is None:
            found = self._start_by_header(index)
        elif prompt is not None and not self._header_before(index, prompt):
            found = self._behind_unprompted_header(index, found)
        return found

    def _start_by_marks(self, index: int, prompt: Marked) -> int | None:
        """Where the prompt's text behind the last content before the answer ends in the text."""
        shared = [
            (place, own)
            for n in range(index - 1, -1, -1)
            if (own := prompt.last(n)) is not None and (place := self.marked.last(n)) is not None
        ]
        if index == 0:
            shared = [(0, 0)]
        if not shared:
            return None
        anchor, own = shared[0]
        tail = prompt.text[own:]
        length = common_length(tail, self.text[anchor:])
        if length == len(tail):
            return anchor + length
        added = len(self._header_before(index, prompt))
        length = self._whole(tail, length, len(tail) - added)
        found = anchor + length
        return found if length and self._begins_at(index, found) else None

    def _begins_at(self, index: int, place: int) -> bool:
        """Whether the answer's content begins at a place, perhaps without its own beginning."""
        first, last = self._content_start(index), self.marked.last(index)
        if first is not None:
            return not self.text[place:first].strip()
        if last is not None:
            shown = self.text[place:last].strip()
            return bool(shown) and self._content(index).endswith(shown)
        # An empty answer is followed by its end.
        rest = self.text[place:]
        mark = next(iter(self.chat.marks_in(rest)), None)
        ended = mark is not None and mark[0] in self.chat.ends and not rest[: mark.start()].strip()
        return ended and not self._content(index)

    def _whole(self, tail: str, length: int, least: int) -> int:
        """The longest part of a prompt, of at most a length, that ends with a mark or a line.

        It ends behind `least`, so inside the header; 0 where there is no such part.
        """
        places = [mark.end() for mark in self.chat.marks_in(tail)]
        places += [place + 1 for place, character in enumerate(tail) if character == "\n"]
        return max((place for place in places if least < place <= length), default=0)

    def _start_by_header(self, index: int) -> int:
        """Behind the one header between the message before the answer and its content."""
        header, tail = self.chat.header, self.chat.before_answer
        place = self.marked.last(index - 1) if index else None
        if place is not None and tail:
            content = self.messages[index - 1].get("content", "")
            place += len(content) - len(content.rstrip())
            if self.text.startswith(tail, place):
                return place + len(tail)
        before = [p for n in range(index) if (p := self.marked.last(n)) is not None]
        low, high = max(before, default=0), self.marked.first(index)
        between = self.text[low:high]
        if high is None or not header or between.count(header) != 1:
            raise _undecided(index, "it is not found in the rendered text")
        return low + between.index(header) + len(header)

    def _behind_unprompted_header(self, index: int, start: int) -> int:
        """Behind a header that the template writes before answers but in no generation prompt."""
        first = self._content_start(index)
        if first is not None and self.text[start:first].strip():
            content = self.messages[index].get("content", "")
            blank = content[: len(content) - len(content.lstrip())]
            return first - len(blank) * self.text[:first].endswith(blank)
        if not self._begins_at(index, start):
            raise _undecided(index, "its header is in no generation prompt")
        return start

    def _prompt(self, index: int) -> Marked | None:
        """The prompt that the answer follows, with the places of contents; None if refused."""
        if (found := self._marked(index, self.style or "both", prompt=True)) is None:
            return None
        try:
            plain = self.render(self.messages[:index], prompt=True)
        except UndecidedError:
            return None
        return found if found.text == plain else Marked(plain, {}, {})

    def _header_before(self, index: int, prompt: Marked) -> str:
        """What the generation prompt adds to the conversation before an answer."""
        try:
            return self.chat.added(prompt.text, self.render(self.messages[:index]))
        except UndecidedError:
            return self.chat.header

    # Where it ends

    def _end(self, index: int, start: int) -> int:
        """Behind the mark that ends the answer, or behind its content where there is none."""
        last = self.marked.last(index)
        low = start if last is None else max(last, start)
        high = self._next_content(index)
        if high is None:
            high = self._end_alone(index, start)
        marks = self.chat.marks_in(self.text[low:high])
        dividing = [mark for mark in marks if mark[0] in self.chat.structure]
        # Of others, such as the tags of calls, only one that ends a last answer too.
        others = marks[:1] if index in self.marked.ends else []
        known = self.chat.declared | {self.chat.ending}
        for mark in (*dividing[:1], *others):
            if mark[0] in known or self._ends_with(index, start, mark[0]):
                return int(low + mark.end())
        return self._end_of_content(index)

    def _next_content(self, index: int) -> int | None:
        """Where the next message's content starts; None where that cannot be seen."""
        if index == len(self.messages) - 1:
            return len(self.text)
        later = [
            place
            for n in range(index + 1, len(self.messages))
            if (place := self.marked.first(n)) is not None
        ]
        return later[0] if later and self.style in ("both", "contents", "before") else None

    def _end_alone(self, index: int, start: int) -> int:
        """Where the conversation that ends with this answer ends, if the text begins with it."""
        if self.style is not None:
            return len(self.text)
        try:
            alone = self.render(self.messages[: index + 1])
        except UndecidedError:
            alone = ""
        if len(alone) < start or not self.text.startswith(alone):
            raise _undecided(index, "where it ends is not found in the rendered text")
        return len(alone)

    def _ends_with(self, index: int, start: int, mark: str) -> bool:
        """Whether the first mark behind an answer ends it, also where nothing follows.

        It does too if nothing at all stands behind a last answer: then the mark of whatever comes
        next is what ends one.
        """
        if index == len(self.messages) - 1:
            return True
        if self.messages[index + 1]["role"] == ASSISTANT and mark not in self.chat.ends:
            return False  # the header of an answer
        alone = self._marked(index + 1, self.style or "both")
        if alone is None:
            if self.chat.ending is None:
                raise _undecided(index, "the chat template does not say what ends it")
            return False
        place = alone.last(index)
        if place is None:  # as in an empty answer
            place = start if alone.text.startswith(self.text[:start]) else len(alone.text)
        behind = self.chat.marks_in(alone.text[place:])
        dividing = [one for one in behind if one[0] in self.chat.structure]
        return mark in [one[0] for one in (*behind[:1], *dividing[:1])] or not behind

    def _end_of_content(self, index: int) -> int:
        content = self.messages[index].get("content", "")
        if places := self.marked.ends.get(index, ()):
            blank = content[len(content.rstrip()) :]
            end = max(places)
            return end + len(blank) * self.text.startswith(blank, end)
        if content.strip():
            raise _undecided(index, "where its content ends is not found in the rendered text")
        raise _undecided(index, "it is empty, and no mark ends it")

    def _marked(self, count: int, style: MarkStyle, *, prompt: bool = False) -> Marked | None:
        """The first messages rendered with marks; None where the template refuses them."""
        try:
            marked = mark_messages(self.messages[:count], style)
            return read_marks(self.render(marked, prompt=prompt))
        except UndecidedError:
            return None


def _generated(turns: _Turns) -> list[Span]:
    """The spans that the template's own `{% generation %}` marks."""
    marked = turns.render(turns.messages, generation=True)
    spans: list[Span] = []
    starts: list[int] = []
    length = 0
    for character in marked:
        if character == GENERATION_START:
            starts.append(length)
        elif character == GENERATION_END:
            spans.append((starts.pop(), length))
        else:
            length += 1
    plain = marked.replace(GENERATION_START, "").replace(GENERATION_END, "")
    if plain != turns.text or starts:
        raise UndecidedError("the chat template changes what it marks as generated")
    spans = sorted(span for span in spans if span[0] < span[1])
    answers, unlearnt = turns.conversation.answers, turns.conversation.unlearnt
    if not spans:
        raise UndecidedError("the chat template marks nothing of it as generated")
    if not unlearnt & set(answers):
        return spans
    if len(spans) != len(answers):
        raise UndecidedError(
            f"the chat template marks {len(spans)} places as generated for {len(answers)} messages "
            "of the assistant, so which one has weight 0 is not known"
        )
    return [span for n, span in zip(answers, spans, strict=True) if n not in unlearnt]


def _undecided(index: int, reason: str) -> UndecidedError:
    return UndecidedError(f"message {index + 1} cannot be learnt: {reason}")
