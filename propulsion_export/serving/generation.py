"""Generate text with a loaded artifact: prompts in, tokens and text out as they are generated."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.base_model.chat.format import ChatFormat
from propulsion_export.base_model.chat.rendering import TemplateRefusal
from propulsion_export.base_model.chat.templates import choose_template, no_template, read_template
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.generation_settings import GenerationSettings
from propulsion_export.base_model.positions import as_config, longest_input
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.special_tokens import SpecialTokens
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.cutting import TextCutter
from propulsion_export.base_model.tokenizer.reading import read_serving_tokenizer
from propulsion_export.base_model.tokenizer.token_ids import (
    check_encoded,
    check_token_ids,
    embedding_rows,
    numbers_of,
)
from propulsion_export.data.messages import Conversation, held_mark
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.runners.decoding import (
    Choose,
    Generator,
    Opening,
    go_on,
    greedy,
)
from propulsion_export.runners.switching import SwitchingGenerator
from propulsion_export.serving.text_stream import TextStream
from propulsion_export.serving.token_choice import TokenChooser
from propulsion_export.serving.token_rules import Row, rules_of
from propulsion_export.serving.token_sampling import Sampling, sampler

DEFAULT_NEW_TOKENS = 128
# Yields tokens, from what chooses them and what says which rows have stopped, see `go_on`.
GoOn = Callable[[Choose, Callable[[], Array]], Iterator[Array]]
# Called with the number of a text, from 0, and the next piece of text generated for it.
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        new_tokens: most tokens to generate for each text.
        sampling: how to sample tokens; None always takes the likeliest one.
        seed: seed for sampling; None gives a different text every time.
        on_text: called with every piece of text.

    Raises:
        UsageError: a number is out of its range, or a seed is given without sampling.
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
                "--seed: does nothing without --temperature, --top-k or --top-p",
                remedy="Add one of them, or leave it out.",
            )

    def choose(self, numbers: Sequence[int]) -> Choose:
        """The function that chooses tokens for the texts with these numbers.

        The tokens sampled for a text depend on the seed and its number, not on the rest of the
        batch.
        """
        if self.sampling is None:
            return greedy
        seeds = [None if self.seed is None else (self.seed, number) for number in numbers]
        return sampler(self.sampling, [np.random.default_rng(seed) for seed in seeds])

    def report(self, number: int, piece: str) -> None:
        """Call `on_text` with a piece of the text with this number."""
        if piece and self.on_text is not None:
            self.on_text(number, piece)


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and those at which its answer ends."""

    tokens: Sequence[int]
    ends: Sequence[int]


@dataclass(frozen=True)
class Writer:
    """A generative artifact, ready for any batch.

    Attributes:
        generator: the model.
        tokenizer: the artifact's tokenizer.
        special: its special tokens.
        defaults: its generation settings.
        positions: most tokens of prompt and answer together; None for no limit.
        longest: most tokens of a prompt that an encoder reads; None where the decoder reads it.
        switches: lengths above which the decoder's rotary frequencies are others.
        rows: how many tokens the model has embeddings for; None where it does not say.
        template: the chat template of the base model; None without one.
        one_at_a_time: see `texts.Reader`.
        formats: the formats of chats that were used, by template.
    """

    generator: Generator
    tokenizer: Any
    special: SpecialTokens
    defaults: GenerationSettings
    positions: int | None
    longest: int | None
    switches: tuple[int, ...] = ()
    rows: int | None = None
    template: str | None = None
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    formats: dict[str, tuple[ChatFormat, list[int]]] = field(default_factory=dict)

    def encode_chat(self, conversation: Conversation, number: int, own: str | None) -> Prompt:
        """A conversation as a prompt for the assistant's next turn.

        Args:
            conversation: what was said.
            number: names the conversation in messages.
            own: the chat template of the row's adapter; None for the base model's.

        Raises:
            UsageError: there is no chat template, it refuses the conversation, a message holds a
                mark of it, or the conversation leaves no position for an answer.
            UnavailableError: jinja2 is not installed.
        """
        place = f"conversation {number + 1}"
        chat, ends = self._format(own or self.template)
        if wrong := held_mark(conversation, chat):
            raise UsageError(f"{place}: {wrong}")
        try:
            text = chat.prompt(conversation.messages, conversation.tools)
        except TemplateRefusal as error:
            raise UsageError(f"{place}: the chat template refuses it ({error})") from error
        with self.one_at_a_time:
            read = self._readable(text)
            encoded = self.tokenizer(read, verbose=False, add_special_tokens=False)
        tokens = self._checked(encoded["input_ids"], place, whole=len(read) == len(text))
        return Prompt(tokens, ends)

    def _format(self, template: str | None) -> tuple[ChatFormat, list[int]]:
        """The format of chats by a template, and the tokens that end an answer in it."""
        if template is None:
            raise no_template()
        if template not in self.formats:
            chat = ChatFormat.of(template, self.tokenizer, self.special.end)
            numbers = numbers_of(self.tokenizer)
            ends = [numbers[token] for token in sorted(chat.ends) if token in numbers]
            self.formats[template] = chat, list(dict.fromkeys([*self.special.end, *ends]))
        return self.formats[template]

    def encode(self, text: str, number: int) -> Prompt:
        """The tokens of a text as a prompt; `number` names the text in messages.

        Raises:
            UsageError: it has no tokens, or leaves no position for an answer.
        """
        cut = {} if self.longest is None else {"truncation": True, "max_length": self.longest}
        with self.one_at_a_time:
            read = self._readable(text)
            # Not verbose: a text that is too long is reported below.
            encoded: list[int] = self.tokenizer(read, verbose=False, **cut)["input_ids"]
        tokens = self._checked(encoded, f"text {number + 1}", whole=len(read) == len(text))
        return Prompt(tokens, self.special.end)

    def _readable(self, text: str) -> str:
        """What is tokenised of a text: all, or enough to cut or to refuse it."""
        if self.longest is not None:
            [kept], _ = self._cutter.cut([text], None, self.longest)
            return kept
        return text if self.positions is None else self._cutter.beginning(text, self.positions)

    @cached_property
    def _cutter(self) -> TextCutter:
        return TextCutter(self.tokenizer)

    def _checked(self, tokens: list[int], place: str, *, whole: bool) -> list[int]:
        check_encoded(np.array([tokens], np.int64), self.rows)
        if not tokens and self.special.begin is not None:
            tokens = [self.special.begin]
        if not tokens:
            raise UsageError(f"{place}: has no tokens, expected some")
        if self.longest is None and self.positions is not None and len(tokens) >= self.positions:
            raise UsageError(
                f"{place}: has {'' if whole else 'at least '}{len(tokens)} tokens, expected less "
                f"than the model's {self.positions} positions",
                remedy="Shorten it.",
            )
        return tokens

    def write(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        feeds: Tensors,
        settings: Settings,
    ) -> list[dict[str, Any]]:
        """Generate after the prompts.

        Args:
            prompts: one for each text.
            numbers: the numbers of the texts.
            feeds: the adapters' inputs.
            settings: how to generate.

        Returns:
            For each text `generated`, `tokens` (without the end token) and `stopped`: `end`,
            `length`, or `nan` where the next logits are NaN or infinite.

        Raises:
            ArtifactError: a generation setting of the model has a value that cannot be used.
        """
        read = [prompt.tokens for prompt in prompts]
        opening = self.generator.open({**self._batch(read), **feeds})
        rooms = self._room(opening.mask.sum(1), settings)
        rows = [
            _TextInProgress(
                TextStream(self.tokenizer, self._read_before(prompt.tokens)), prompt.ends, room
            )
            for prompt, room in zip(prompts, rooms, strict=True)
        ]
        choose = self._chooser(opening, prompts, rooms, settings.choose(numbers))
        going = self._going(opening, read, feeds)
        for tokens in going(choose, lambda: np.array([bool(r.stopped) for r in rows])):
            for row, number, token, lost in zip(rows, numbers, tokens, choose.lost, strict=True):
                settings.report(number, row.lose() if lost else row.take(int(token)))
        return [row.outcome() for row in rows]

    def _going(self, opening: Opening, prompts: Sequence[Sequence[int]], feeds: Tensors) -> GoOn:
        """What generates after the prompts; rows on two sides of a switch are computed apart."""
        if not self.switches or self.longest is not None:
            return partial(go_on, opening)
        padding = self.special.pad or 0
        return SwitchingGenerator(self.generator, prompts, padding, feeds, self.switches).go_on

    def _chooser(
        self,
        opening: Opening,
        prompts: Sequence[Prompt],
        rooms: Sequence[int],
        pick: Choose,
    ) -> TokenChooser:
        """What chooses the tokens of a batch, by the generation settings of the model."""
        pairs = zip(opening.tokens, opening.mask, strict=True)
        starts = [tokens[real == 1] for tokens, real in pairs]
        rules = [
            rules_of(
                self.defaults,
                Row(np.array(prompt.tokens, np.int64), len(start), room, prompt.ends),
            )
            for prompt, start, room in zip(prompts, starts, rooms, strict=True)
        ]
        return TokenChooser(starts, rules, pick)

    def _batch(self, prompts: Sequence[Sequence[int]]) -> Tensors:
        padding = self.special.pad or 0
        rows = [np.array(prompt, np.int64) for prompt in prompts]
        return self.generator.pad(rows, padding)

    def _read_before(self, prompt: Sequence[int]) -> Sequence[int]:
        return prompt if self.longest is None else ()

    def _room(self, read: Array, settings: Settings) -> list[int]:
        """Most new tokens of each row, given how many its decoder has read."""
        most = settings.new_tokens
        if self.positions is None:
            return [most] * len(read)
        return [min(most, self.positions - int(count)) for count in read]


def open_writer(artifact: Artifact, generator: Generator) -> Writer:
    """Prepare an artifact to generate text.

    Raises:
        ArtifactError: its tokenizer cannot be read, or has tokens beyond the model's embedding.
        UsageError: it has no tokenizer.
        UnavailableError: its tokenizer needs transformers, which is not installed.
    """
    tokenizer = read_serving_tokenizer(artifact.directory)
    if tokenizer is None:
        raise UsageError(f"{artifact.directory}: has no tokenizer to read texts with")
    settings = read_settings(artifact.directory)
    check_token_ids(str(artifact.directory), tokenizer, settings, ArtifactError)
    config = as_config(settings)
    encoded = TASKS[artifact.manifest.task].architecture == "encoder-decoder"
    return Writer(
        generator,
        tokenizer,
        SpecialTokens.read(artifact.directory),
        GenerationSettings.read(artifact.directory),
        # Models without a table of positions (ALiBi, T5's relative positions) have no limit.
        positions=getattr(config, "max_position_embeddings", None),
        longest=longest_input(config, tokenizer) if encoded else None,
        switches=rope_switches(settings),
        rows=embedding_rows(settings),
        template=read_template(artifact.directory)
        or choose_template(getattr(tokenizer, "chat_template", None), with_tools=False),
    )


class _TextInProgress:
    """One text of a batch while it is generated."""

    def __init__(self, stream: TextStream, ends: Sequence[int], room: int) -> None:
        self.stream, self.ends, self.room = stream, ends, room
        self.stopped: str | None = None

    def take(self, token: int) -> str:
        """Add a token; returns the text that it completes, empty once the row has stopped."""
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

    def lose(self) -> str:
        """Stop because the logits are no numbers; returns the rest of the text before them."""
        if self.stopped is not None:
            return ""
        self.stopped = "nan"
        return self.stream.finish()

    def outcome(self) -> dict[str, Any]:
        return {
            "generated": self.stream.text,
            "tokens": self.stream.tokens,
            "stopped": self.stopped,
        }
