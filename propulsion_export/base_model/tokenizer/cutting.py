"""Cut long texts before they are tokenised, where only so many of their tokens are read.

A tokenizer takes seconds for a megabyte, and nobody else's text is tokenised meanwhile.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from propulsion_export.base_model.tokenizer.boundaries import Boundaries
from propulsion_export.environment.cached import cached_property

_CHARACTERS = 8  # for a token, at first; a text of twice as many is not cut
_LEAST = 16  # tokens
_PIECE = 2**15  # characters that are counted at a time, or twice as many


class TextCutter:
    """Cuts texts for a tokenizer so that no token that is kept changes.

    A text is cut at a boundary, see `boundaries`, and what is kept is tokenised to see that it has
    enough tokens. A text without boundaries, and one for a tokenizer that is not a fast one, is not
    cut. Whoever calls it holds the tokenizer's lock.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None

    def cut(
        self,
        texts: Sequence[str],
        contexts: Sequence[str] | None,
        limit: int,
        *,
        with_places: bool = False,
    ) -> tuple[list[str], list[str] | None]:
        """Texts and contexts of which the tokenizer keeps the same tokens, at most `limit` a row.

        Args:
            texts: one for each row.
            contexts: a second text for each row.
            limit: the most tokens of a row; the longer of text and context is cut, as
                `encode_texts` does.
            with_places: whether it matters where in the text a token stands; then a text whose end
                is kept is not cut.
        """
        if with_places and self._tokenizer.truncation_side == "left":
            return list(texts), None if contexts is None else list(contexts)
        if contexts is None:
            return [self._kept(text, limit) for text in texts], None
        pairs = [
            self._kept_pair(text, context, limit)
            for text, context in zip(texts, contexts, strict=True)
        ]
        return [text for text, _ in pairs], [context for _, context in pairs]

    def beginning(self, text: str, tokens: int) -> str:
        """The text, or a beginning of it with at least so many tokens, special ones left out."""
        size = _CHARACTERS * max(tokens, _LEAST)
        while 2 * size < len(text) and self._boundaries is not None:
            place = self._boundaries.first(text, size)
            if place is None:
                break
            if self._count(text[:place]) >= tokens:
                return text[:place]
            size = 2 * place
        return text

    def _end(self, text: str, tokens: int) -> str:
        """The text, or an end of it with at least so many tokens."""
        size = _CHARACTERS * max(tokens, _LEAST)
        while 2 * size < len(text) and self._boundaries is not None:
            place = self._boundaries.last(text, len(text) - size)
            if place is None:
                break
            if self._count(text[place:]) >= tokens:
                return text[place:]
            size = 2 * (len(text) - place)
        return text

    def _kept(self, text: str, tokens: int) -> str:
        if self._tokenizer.truncation_side == "left":
            return self._end(text, tokens)
        return self.beginning(text, tokens)

    def _kept_pair(self, text: str, context: str, limit: int) -> tuple[str, str]:
        """Both with more tokens than a row may have, where they are cut.

        What a row keeps of each depends on that alone, but for a single token if both are longer
        and an odd number is kept: it goes to the longer one, which is still the longer one then.
        """
        kept = self._kept(text, limit + 1), self._kept(context, limit + 1)
        if self._backend is None or kept == (text, context):
            return kept
        counts = self._count(kept[0]), self._count(kept[1])
        odd = (limit - int(self._backend.num_special_tokens_to_add(True))) % 2
        if not odd or min(counts) <= limit:
            return kept
        if self._has_more(text, context):
            return self._kept(text, counts[1] + 1), kept[1]
        return kept[0], self._kept(context, counts[0] + 1)

    def _has_more(self, text: str, other: str) -> bool:
        """Whether a text has more tokens than another; reads little more than the shorter one."""
        counts, behind = [0, 0], 0
        pieces = self._pieces(text), self._pieces(other)
        while (piece := next(pieces[behind], None)) is not None:
            counts[behind] += self._count(piece)
            behind = 0 if counts[0] <= counts[1] else 1
        return behind == 1

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts of a text whose tokens are those of the text."""
        start = 0
        while self._boundaries is not None and start + 2 * _PIECE < len(text):
            place = self._boundaries.last(text, start + 2 * _PIECE)
            if place is None or place <= start:
                break
            yield text[start:place]
            start = place
        yield text[start:]

    def _count(self, text: str) -> int:
        """How many tokens a text has, however the tokenizer is set to cut and pad."""
        [encoding] = self._backend.encode_batch([text], add_special_tokens=False)
        return sum(sum(part.attention_mask) for part in (encoding, *encoding.overflowing))

    @cached_property
    def _boundaries(self) -> Boundaries | None:
        return None if self._backend is None else Boundaries.of(self._backend)
