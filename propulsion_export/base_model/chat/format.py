"""The format of a chat model: a template, the tokens that it writes, and what ends a turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from propulsion_export.base_model.chat.places import (
    Marked,
    common_length,
    mark_messages,
    read_marks,
)
from propulsion_export.base_model.chat.rendering import TemplateRefusal, render
from propulsion_export.base_model.tokenizer.classes import NAMED
from propulsion_export.environment.cached import cached_property

_USER = {"role": "user", "content": "x"}
_ANSWER = {"role": "assistant", "content": "y"}
_SYSTEM = {"role": "system", "content": "z"}
# Beginnings of conversations, for templates that need a system turn, or refuse one.
_OPENINGS: tuple[tuple[Mapping[str, str], ...], ...] = ((), (_SYSTEM,))


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become text.

    Attributes:
        template: the chat template.
        special: the special tokens by name, such as `bos_token`.
        marks: every special token of the tokenizer.
        declared: the tokens that end a text by the model's own files.
        now: the date that the template may write; None: the date of each rendering.
    """

    template: str
    special: Mapping[str, str]
    marks: Sequence[str] = ()
    declared: frozenset[str] = frozenset()
    now: datetime | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, template: str, tokenizer: Any, ends: Sequence[int], *, now: datetime | None = None
    ) -> "ChatFormat":
        """The format of a template with a tokenizer, transformers' or a `FastTokenizer`.

        Args:
            template: the chat template.
            tokenizer: what tells the special tokens.
            ends: the numbers of the tokens that end a text by the model's own files.
            now: see the class.
        """
        named = getattr(tokenizer, "special", None)
        named = tokenizer.special_tokens_map if named is None else named
        special = {name: str(named[name]) for name in NAMED if name in named}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        else:
            added = backend.get_added_tokens_decoder()
        marks = {token.content for token in added.values() if token.special}
        declared = {added[number].content for number in ends if number in added}
        declared |= {special[name] for name in ("eos_token",) if name in special}
        return cls(template, special, sorted(marks | declared), frozenset(declared), now)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
        mark_generation: bool = False,
    ) -> str:
        """See `rendering.render`."""
        return render(
            self.template,
            messages,
            special=self.special,
            tools=tools,
            generation_prompt=generation_prompt,
            mark_generation=mark_generation,
            now=self.now,
        )

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str:
        """A conversation up to where the assistant's next turn begins.

        Some templates write the header of an answer, but in no generation prompt: it is added.

        Raises:
            TemplateRefusal: see `rendering.render`.
        """
        text = self.render(messages, tools=tools, generation_prompt=True)
        return text if self.header else text + self._unprompted_header

    def marks_in(self, text: str) -> list[re.Match[str]]:
        """The special tokens in a text, in order; of two at one place the longer."""
        return list(self._pattern.finditer(text))

    def added(self, prompt: str, without: str) -> str:
        """What a generation prompt adds to the text of a conversation.

        Args:
            prompt: the conversation with the generation prompt.
            without: the same without, which may close the whole text.
        """
        same = common_length(prompt, without)
        if same < len(without):  # the texts part inside two marks that begin alike
            inside = (m.start() for m in self.marks_in(prompt) if m.start() < same < m.end())
            same = next(inside, same)
        return prompt[same:]

    @cached_property
    def ending(self) -> str | None:
        """The token that ends an assistant's turn; None where none is the template's own.

        Where nothing stands behind the last turn, the mark of whatever comes next ends a turn.
        """
        return next(iter(self._first_marks(self._behind_last)), None)

    @cached_property
    def ends(self) -> frozenset[str]:
        """Every token at which an answer is over, those that the model's files declare included."""
        found = self._first_marks(self._behind_last) or self._first_marks(self._behind_turn)
        return self.declared | frozenset(found)

    @cached_property
    def structure(self) -> frozenset[str]:
        """The special tokens that divide turns, which no content may hold."""
        written = [
            match[0]
            for text in (self._behind_last, self._behind_turn)
            if text is not None
            for match in self.marks_in(text)
        ]
        prompt = [match[0] for match in self.marks_in(self._prompt.text if self._prompt else "")]
        header = [match[0] for match in self.marks_in(self.header)]
        # Behind its first mark a header may open what an answer may hold too, such as <think>.
        inside = set(header[1:]) - set(prompt[: len(prompt) - len(header)])
        named = {self.special[n] for n in ("bos_token", "eos_token") if n in self.special}
        return frozenset({*written, *prompt, *named, *self.declared}) - (inside - self.ends)

    @cached_property
    def header(self) -> str:
        """What the template writes for an answer to begin behind; empty where that is nothing."""
        for opening in _OPENINGS:
            prompt, open_end = (self._try([*opening, _USER], asked) for asked in (True, False))
            if prompt is not None and open_end is not None:
                return self.added(prompt.text, open_end.text)
        return ""

    @cached_property
    def before_answer(self) -> str:
        """What a prompt has behind a user's content: the end of the turn and the header."""
        prompt = self._prompt
        if prompt is None or not prompt.ends:
            return ""
        return prompt.text[max(place for places in prompt.ends.values() for place in places) :]

    @property
    def _prompt(self) -> Marked | None:
        openings = ([*opening, _USER] for opening in _OPENINGS)
        return next(filter(None, (self._try(one, True) for one in openings)), None)

    @cached_property
    def _unprompted_header(self) -> str:
        """What the template writes between a prompt and an answer; empty if it is white space."""
        for opening in _OPENINGS:
            messages = [*opening, _USER, _ANSWER]
            prompt, whole = self._try(messages[:-1], True), self._try(messages, False)
            if prompt is None or whole is None or not whole.text.startswith(prompt.text):
                continue
            between = whole.text[len(prompt.text) : whole.first(len(messages) - 1)]
            return between if between.strip() else ""
        return ""

    @cached_property
    def _behind_last(self) -> str | None:
        """What the template writes behind the last turn, if that is an assistant's."""
        for opening in _OPENINGS:
            messages = [*opening, _USER, _ANSWER]
            if (found := self._try(messages, False)) is not None:
                place = found.last(len(messages) - 1)
                return None if place is None else found.text[place:]
        return None

    @cached_property
    def _behind_turn(self) -> str | None:
        """What the template writes between an assistant's turn and the content of a user's."""
        for opening in _OPENINGS:
            messages = [*opening, _USER, _ANSWER, _USER]
            if (found := self._try(messages, False)) is not None:
                places = found.last(len(messages) - 2), found.first(len(messages) - 1)
                return None if None in places else found.text[slice(*places)]
        return None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(set(self.marks), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _first_marks(self, text: str | None) -> list[str]:
        return [match[0] for match in self.marks_in(text or "")[:1]]

    def _try(self, messages: Sequence[Mapping[str, str]], asked: bool) -> Marked | None:
        try:
            marked = mark_messages(messages, "both")
            return read_marks(self.render(marked, generation_prompt=asked))
        except TemplateRefusal:
            return None
