"""Encode conversations as token ids, with labels on what the assistant says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from propulsion_export.base_model.chat.format import ChatFormat
from propulsion_export.base_model.chat.rendering import check_template
from propulsion_export.base_model.chat.templates import choose_template
from propulsion_export.data.messages import Conversation
from propulsion_export.errors import BaseModelError, DataError
from propulsion_export.training.encode import IGNORED, EncodedRow
from propulsion_export.training.sequences import Sequences
from propulsion_export.training.turns import Rendered, Span, UndecidedError, render_turns


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes conversations with a tokenizer and a chat template.

    Attributes:
        chat: the format without tools.
        with_tools: the format of conversations with tools, the same where the model has one.
        backend: a copy of the tokenizer that adds no tokens and says where each token stands.
        added: the text of the tokens that the tokenizer takes whole, by number.
    """

    chat: ChatFormat
    with_tools: ChatFormat
    backend: Any
    added: dict[int, str]

    @classmethod
    def open(cls, name: str, tokenizer: Any, generation: Any | None = None) -> "ChatEncoder":
        """Prepare to encode with the chat template of a base model.

        Args:
            name: the base model, for messages.
            tokenizer: its tokenizer, as transformers loads it.
            generation: its generation settings, as transformers loads them.

        Raises:
            BaseModelError: it has no chat template, one with a mistake, or no fast tokenizer.
        """
        if not tokenizer.is_fast:
            raise BaseModelError(
                f"{name}: has a tokenizer that does not map tokens to characters, expected a fast "
                "tokenizer (tokenizer.json) to learn conversations with"
            )
        template = chosen_template(name, tokenizer)
        tools = choose_template(tokenizer.chat_template, with_tools=True) or template
        backend = _copy(tokenizer.backend_tokenizer)
        ends = getattr(generation, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        now = datetime.now()  # one date in all rows
        return cls(
            ChatFormat.of(template, tokenizer, ends, now=now),
            ChatFormat.of(tools, tokenizer, ends, now=now),
            backend,
            {number: t.content for number, t in backend.get_added_tokens_decoder().items()},
        )

    def encode(self, conversations: Sequence[Conversation], longest: int) -> Sequences:
        """Encode each conversation as one row, cut to `longest` tokens.

        A row of which nothing is learnt within that length is left out.

        Raises:
            DataError: the template refuses conversations, or it cannot be decided what is learnt of
                them; all are named.
        """
        rendered = self._render(conversations)
        encodings = self.backend.encode_batch(
            [one.text for one in rendered], add_special_tokens=False
        )
        rows: list[EncodedRow] = []
        cut = 0
        for one, encoding in zip(rendered, encodings, strict=True):
            ids = encoding.ids[:longest]
            labels = self._labels(one, encoding)[:longest]
            if all(label == IGNORED for label in labels):
                continue
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
            cut += len(encoding.ids) > longest
        return Sequences(len(rendered), rows, cut, len(rendered) - len(rows))

    def _render(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        rendered, findings = [], []
        for one in conversations:
            try:
                rendered.append(render_turns(one, self.with_tools if one.tools else self.chat))
            except UndecidedError as error:
                findings.append(f"{one.where}: {error}")
        if findings:
            raise DataError(*findings, remedy="Correct or remove these rows.")
        return rendered

    def _labels(self, rendered: Rendered, encoding: Any) -> list[int]:
        """The ids of tokens inside a span; of the first token, which nothing predicts, none."""
        labels = [IGNORED] * len(encoding.ids)
        spans = list(rendered.spans)
        for place, (number, offsets) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            start, end = self._text_of(number, offsets, rendered.text)
            while spans and spans[0][1] <= start:
                spans.pop(0)
            if place and spans and _is_inside(start, end, spans[0], whole=number in self.added):
                labels[place] = number
        return labels

    def _text_of(self, number: int, offsets: Span, text: str) -> Span:
        """Where a token stands; one that takes the white space around it, where its own text is."""
        mark = self.added.get(number)
        if mark is None:
            return offsets
        start = text.find(mark, *offsets)
        return offsets if start < 0 else (start, start + len(mark))


def chosen_template(name: str, tokenizer: Any) -> str:
    """The template of conversations without tools.

    Raises:
        BaseModelError: there is none, or one with a mistake.
    """
    template = choose_template(tokenizer.chat_template, with_tools=False)
    if template is None:
        raise BaseModelError(
            f"{name}: its tokenizer has no chat template, expected one to learn conversations with",
            remedy="Give one with --chat-template, or a model that was tuned for chats.",
        )
    if wrong := check_template(template):
        raise BaseModelError(f"{name}: its chat template is no jinja template ({wrong})")
    return template


def _is_inside(start: int, end: int, span: Span, *, whole: bool) -> bool:
    """Whether a token belongs to a span: with all of its text if it is a mark, else with some."""
    if whole:
        return span[0] <= start and end <= span[1]
    if start == end:
        return span[0] <= start < span[1]
    return start < span[1] and span[0] < end


def _copy(backend: Any) -> Any:
    """A tokenizer without what works on its result: added tokens, and offsets without spaces."""
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return Tokenizer.from_str(json.dumps(content))
