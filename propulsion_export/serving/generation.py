"""The part of `run` that generates text: prompts in, tokens and text out, as they come."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.positions import longest_input
from propulsion_export.base_model.special_tokens import SpecialTokens
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer import read_tokenizer
from propulsion_export.errors import UsageError
from propulsion_export.runners.decoding import (
    Choose,
    Generator,
    go_on,
    greedy,
)
from propulsion_export.serving.text_stream import TextStream
from propulsion_export.serving.token_sampling import Sampling, sampler

DEFAULT_NEW_TOKENS = 128
# Told the number of a text, from 0, and the next piece of what is generated for it.
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        new_tokens: for each text, at most.
        sampling: what tokens are drawn from; None: each is the likeliest one.
        seed: of the drawing; None: another text every time.
        on_text: told of every piece of text.

    Raises:
        UsageError: a number is out of its range, or there is a seed and nothing to draw.
    """

    new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Sampling | None = None
    seed: int | None = None
    on_text: OnText | None = None

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise UsageError(f"--max-new-tokens: {self.new_tokens}, expected at least 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed: {self.seed}, expected at least 0")
        if self.seed is not None and self.sampling is None:
            raise UsageError(
                "--seed: nothing is drawn, every token is the likeliest one",
                remedy="Give --temperature, --top-k or --top-p besides.",
            )

    def choose(self, numbers: Sequence[int]) -> Choose:
        """How to choose tokens for the texts of these numbers.

        What is drawn for a text depends on the seed and its number, not on the others beside it.
        """
        if self.sampling is None:
            return greedy
        seeds = [None if self.seed is None else (self.seed, number) for number in numbers]
        return sampler(self.sampling, [np.random.default_rng(seed) for seed in seeds])

    def tell(self, number: int, piece: str) -> None:
        """Tell who listens of a piece of the text of this number."""
        if piece and self.on_text is not None:
            self.on_text(number, piece)


@dataclass(frozen=True)
class Writer:
    """An artifact that generates, ready for any batch.

    Attributes:
        generator: the model.
        tokenizer: of the artifact.
        special: its special tokens.
        positions: how many tokens of prompt and answer the model has room for; None: any number.
        longest: a prompt of an encoder is cut at so many tokens; None: the decoder reads it.
        one_at_a_time: as of `answering.Reader`.
    """

    generator: Generator
    tokenizer: Any
    special: SpecialTokens
    positions: int | None
    longest: int | None
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, text: str, number: int) -> list[int]:
        """The tokens of the text of this number, as a prompt.

        Raises:
            UsageError: it has none, or leaves no position for an answer.
        """
        cut = {} if self.longest is None else {"truncation": True, "max_length": self.longest}
        with self.one_at_a_time:
            # Of a text that is too long we tell ourselves: not verbose.
            tokens: list[int] = self.tokenizer(text, verbose=False, **cut)["input_ids"]
        if not tokens and self.special.begin is not None:
            tokens = [self.special.begin]
        if not tokens:
            raise UsageError(f"text {number + 1}: has no tokens, expected some")
        if self.longest is None and self.positions is not None and len(tokens) >= self.positions:
            raise UsageError(
                f"text {number + 1}: has {len(tokens)} tokens, expected less than the model's "
                f"{self.positions} positions",
                remedy="Shorten it.",
            )
        return tokens

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        feeds: Tensors,
        settings: Settings,
    ) -> list[dict[str, Any]]:
        """Generate behind the prompts of the texts of these numbers, with what adapters feed.

        Returns:
            For each text `generated`, `tokens` (without the one that ends it) and `stopped`:
            `end` or `length`.
        """
        opening = self.generator.open({**self._batch(prompts), **feeds})
        rows = [
            _TextInProgress(
                TextStream(self.tokenizer, self._read_before(prompt)), self.special.end, room
            )
            for prompt, room in zip(prompts, self._room(opening.mask.sum(1), settings), strict=True)
        ]
        choose = settings.choose(numbers)
        for tokens in go_on(opening, choose, lambda: np.array([bool(r.stopped) for r in rows])):
            for row, number, token in zip(rows, numbers, tokens, strict=True):
                settings.tell(number, row.take(int(token)))
        return [row.outcome() for row in rows]

    def _batch(self, prompts: Sequence[Sequence[int]]) -> Tensors:
        padding = self.special.pad or 0
        rows = [np.array(prompt, np.int64) for prompt in prompts]
        return self.generator.pad(rows, padding)

    def _read_before(self, prompt: Sequence[int]) -> Sequence[int]:
        return prompt if self.longest is None else ()

    def _room(self, read: Array, settings: Settings) -> list[int]:
        """New tokens that each row may have, given how many its decoder has read."""
        most = settings.new_tokens
        if self.positions is None:
            return [most] * len(read)
        return [min(most, self.positions - int(count)) for count in read]


def open_writer(artifact: Artifact, generator: Generator) -> Writer:
    """The artifact as something that writes.

    Raises:
        UsageError: it has no tokenizer.
    """
    tokenizer = read_tokenizer(artifact.directory)
    if tokenizer is None:
        raise UsageError(f"{artifact.directory}: has no tokenizer to read texts with")
    config = read_config(str(artifact.directory))
    encoded = TASKS[artifact.manifest.task].architecture == "encoder-decoder"
    return Writer(
        generator,
        tokenizer,
        SpecialTokens.read(artifact.directory),
        # Models that have none (ALiBi, T5's relative positions) have no such limit.
        positions=getattr(config, "max_position_embeddings", None),
        longest=longest_input(config, tokenizer) if encoded else None,
    )


class _TextInProgress:
    """One text of a batch: what it has become, and whether it goes on."""

    def __init__(self, stream: TextStream, ends: Sequence[int], room: int) -> None:
        self.stream, self.ends, self.room = stream, ends, room
        self.stopped: str | None = None

    def take(self, token: int) -> str:
        """The text that a token makes readable; none of a row that has stopped."""
        if self.stopped is not None:
            return ""
        if token in self.ends:
            self.stopped = "end"
            return self.stream.finish()
        piece = self.stream.push(token)
        if len(self.stream.tokens) == self.room:
            self.stopped = "length"
            piece += self.stream.finish()
        return piece

    def outcome(self) -> dict[str, Any]:
        return {
            "generated": self.stream.text,
            "tokens": self.stream.tokens,
            "stopped": self.stopped,
        }
