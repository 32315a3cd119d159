"""Decode tokens one by one: no half characters, no lost spaces."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text after a prompt, while its tokens are generated.

    A piece is returned as soon as its tokens are complete: a character of several tokens with its
    last one. A tokenizer that is not a fast one returns the whole text at the end.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """Start after the tokens `prompt`, which decide whether a word needs a space before it."""
        self.text = ""
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._fast = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if self._fast is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(ids=self._prompt, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, often none."""
        self.tokens.append(token)
        if self._fast is None:
            return ""
        piece: str = self._stream.step(self._fast, token) or ""
        self.text += piece
        return piece

    def finish(self) -> str:
        """The rest of the text; a character that was cut in two becomes U+FFFD."""
        known = self._decode(self._prompt) + self.text
        whole = self._decode([*self._prompt, *self.tokens])
        rest = whole[len(known) :] if whole.startswith(known) else ""
        self.text += rest
        return rest

    def _decode(self, tokens: list[int]) -> str:
        decoder = self._tokenizer if self._fast is None else self._fast
        text: str = decoder.decode(tokens, skip_special_tokens=True)
        return text
