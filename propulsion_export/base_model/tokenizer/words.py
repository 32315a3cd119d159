"""Where the words of a text begin among its tokens, the same in training and in serving."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from propulsion_export.errors import BaseModelError

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class Word:
    """A word in a text: its first character, the one after its last, and its first token."""

    start: int
    end: int
    token: int


def joined(text: str | Sequence[str]) -> str:
    """The text that a model reads: a text as it is, a list of words joined by spaces."""
    return text if isinstance(text, str) else " ".join(text)


def words_of(text: str, encoding: "Encoding") -> list[Word]:
    """The words of a text, as the tokenizer and white space cut it.

    White space alone is no word. A token that holds several words is one word.
    """
    found: list[Word] = []
    first = number_before = start = None
    end = 0  # behind the last token
    for token, number in enumerate(encoding.word_ids):
        if number is None:  # special tokens and padding belong to no word
            continue
        place, after = _visible(text, *encoding.offsets[token])
        if number != number_before or any(map(str.isspace, text[end:place])):
            found += _word(start, end, first)
            first, number_before, start = token, number, None
        if place < after and start is None:
            start = place
        end = max(end, after)
    return [*found, *_word(start, end, first)]


def _visible(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's characters without white space around them; none at its end if it has no others."""
    piece = text[start:end]
    if not piece.strip():
        return end, end
    return end - len(piece.lstrip()), start + len(piece.rstrip())


def _word(start: int | None, end: int, first: int | None) -> list[Word]:
    """The word with these characters; none if no character was seen."""
    return [] if start is None or first is None else [Word(start, end, first)]


def first_tokens(words: Sequence[str], encoding: "Encoding") -> list[int | None]:
    """The first token of each of the words that were encoded as `joined` words.

    None for a word that is cut off, or that the tokenizer drops.

    Raises:
        BaseModelError: a token holds parts of two words.
    """
    ends = list(accumulate(len(word) + 1 for word in words))
    firsts: list[int | None] = [None] * len(words)
    for word in words_of(joined(words), encoding):
        number = bisect_right(ends, word.start)
        if word.end >= ends[number]:
            raise BaseModelError(
                f"tokenizer: reads {joined(words[number : number + 2])!r} as one token, "
                "expected a token of its own for each word",
                remedy="Take a base model whose tokenizer keeps words apart.",
            )
        if firsts[number] is None:
            firsts[number] = word.token
    return firsts
