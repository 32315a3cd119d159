"""Run a generative model step by step, in any runtime, feeding its cache back.

A decoder is a runner that takes `input_ids` and `position_ids` [batch, new], `attention_mask`
[batch, past + new] and a cache, `past_key_values.N.key` and `.value` [batch, heads, past, width],
and returns `logits` [batch, new, vocabulary] and the longer cache, `present.N.key` and `.value`.
It may have no positions, and other states beside the cache: `past.N.conv` and `present.N.conv`.
The decoder of an encoder-decoder also takes the output of the encoder.
`right_padding` has the decoders whose rows are padded at their end.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.tensor_names import (
    LOGITS,
    PAST,
    PAST_STATE,
    PRESENT,
    STATE_KINDS,
)
from propulsion_export.errors import ArtifactError
from propulsion_export.runners.padding import last_of_rows, pad_left, pad_right, positions

# Chooses a token [batch] from the logits [batch, vocabulary] of the last position.
Choose = Callable[[Array], Array]


@dataclass(frozen=True)
class DecoderState:
    """What a decoder has read so far.

    Attributes:
        mask: int64 [batch, read]; 0 where a row is padded.
        cache: keys, values and other states by input name, [batch, heads, read, width]; arrays
            where the runtime keeps them, which numpy can read.
    """

    mask: Array
    cache: Tensors


@dataclass(frozen=True)
class Decoder:
    """A decoder at work on one batch.

    Attributes:
        run: runs one step.
        inputs: its inputs, which give the shapes of an empty cache; empty if it makes its own.
        feeds: inputs fed at every step: an adapter's, or the encoder's output.
    """

    run: Runner
    inputs: Sequence[TensorSpec] = ()
    feeds: Tensors = field(default_factory=dict)

    def start(self, batch: int) -> DecoderState:
        """The state before the first token of `batch` rows."""
        cache = {
            spec.name: np.zeros(_empty(batch, spec), numpy_dtype(spec.dtype))
            for spec in self.inputs
            if spec.name.startswith((f"{PAST}.", f"{PAST_STATE}."))
        }
        return DecoderState(np.zeros((batch, 0), np.int64), cache)

    def step(
        self, state: DecoderState, tokens: Array, mask: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """Read more tokens.

        Args:
            state: the state before these tokens.
            tokens: the tokens to read, int64 [batch, new].
            mask: int64 [batch, new], 0 for padding; default: all are tokens.

        Returns:
            Logits [batch, new, vocabulary] and the state after the tokens.

        Raises:
            ArtifactError: the runner returns no logits, or logits of another shape.
        """
        seen = np.ones_like(tokens) if mask is None else mask
        whole = np.concatenate([state.mask, seen], axis=1)
        outputs = self.run(
            {
                "input_ids": tokens,
                "attention_mask": whole,
                "position_ids": positions(whole)[:, -tokens.shape[1] :],
                **state.cache,
                **self.feeds,
            }
        )
        longer = {
            past_name(name): values
            for name, values in outputs.items()
            if name.startswith(f"{PRESENT}.")
        }
        logits = _output(outputs, LOGITS)
        if logits.shape[:2] != tokens.shape:
            raise ArtifactError(
                f"{LOGITS} have shape {list(logits.shape)} in a step of {len(tokens)} rows, "
                f"expected [{len(tokens)}, {tokens.shape[1]}, vocabulary]",
                remedy="Export it again.",
            )
        return logits, DecoderState(whole, {**state.cache, **longer})

    def read(self, tokens: Array, mask: Array) -> tuple[Array, DecoderState]:
        """Read the first tokens of all rows; see `step`."""
        return self.step(self.start(len(tokens)), tokens, mask)

    def replay(self, tokens: Array, mask: Array) -> Array:
        """Read whole rows in several steps, as in generation; returns the logits of all steps.

        Most of the tokens first, then two at once, then three one by one.
        """
        state, parts = self.start(len(tokens)), []
        for start, end in pieces_of(tokens.shape[1]):
            logits, state = self.step(state, tokens[:, start:end], mask[:, start:end])
            parts.append(logits)
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Opening:
    """A decoder and the prompt it reads first.

    Attributes:
        decoder: at work on the rows of the prompt.
        tokens: int64 [batch, length].
        mask: int64 [batch, length], 0 for padding.
        given: the mask of the prompt as it was given, where its padding has been moved; else None.
    """

    decoder: Decoder
    tokens: Array
    mask: Array
    given: Array | None = None

    def as_given(self, logits: Array) -> Array:
        """Logits [batch, length, …] of the prompt, each where its token was given."""
        if self.given is None:
            return logits
        moved = np.zeros((*self.given.shape, *logits.shape[2:]), logits.dtype)
        moved[self.given == 1] = logits[self.mask == 1]
        return moved


class Generator(Protocol):
    """A generative model, ready for any batch.

    `reads_gaps` says whether rows may have padding between their tokens; where they may not, it is
    taken out.
    """

    @property
    def reads_gaps(self) -> bool: ...

    def open(self, feeds: Tensors) -> Opening:
        """Start from `input_ids` and `attention_mask` [batch, length] and an adapter's inputs.

        An encoder-decoder starts its decoder with `decoder_input_ids` [batch, length] if given.
        """

    def pad(self, rows: Sequence[Array], padding: int) -> dict[str, Array]:
        """Prompts of different lengths as `input_ids` and `attention_mask`, padded as needed."""


# A generator is not callable, which distinguishes the two.
Candidate = Runner | Generator


@dataclass(frozen=True)
class CausalModel:
    """A decoder that reads the prompt itself; its attributes are those of `Decoder`."""

    run: Runner
    inputs: Sequence[TensorSpec] = ()
    reads_gaps: ClassVar[bool] = True

    def open(self, feeds: Tensors) -> Opening:
        rest = without(feeds, "input_ids", "attention_mask")
        decoder = Decoder(self.run, self.inputs, rest)
        return Opening(decoder, feeds["input_ids"], feeds["attention_mask"])

    def pad(self, rows: Sequence[Array], padding: int) -> dict[str, Array]:
        return pad_left(rows, padding)


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder for the prompt, and a decoder that starts with the token `start`."""

    encode: Runner
    decode: Runner
    start: int
    reads_gaps: ClassVar[bool] = True

    def open(self, feeds: Tensors) -> Opening:
        rest = without(feeds, "input_ids", "attention_mask", "decoder_input_ids")
        mask = feeds["attention_mask"]
        encoded = self.encode({"input_ids": feeds["input_ids"], "attention_mask": mask, **rest})
        hidden = _output(encoded, "last_hidden_state")
        rest |= {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        first = np.full((len(mask), 1), self.start, np.int64)
        tokens = feeds.get("decoder_input_ids", first)
        return Opening(Decoder(self.decode, feeds=rest), tokens, np.ones_like(tokens))

    def pad(self, rows: Sequence[Array], padding: int) -> dict[str, Array]:
        # An encoder with a table of positions counts them from the left, padding or not.
        return pad_right(rows, padding)


def generate(generator: Generator, feeds: Tensors, choose: Choose) -> Iterator[Array]:
    """Generate tokens after padded prompts, int64 [batch] each, without end.

    Args:
        generator: the model.
        feeds: the prompts and an adapter's inputs, see `Generator.open`.
        choose: picks the next tokens.
    """
    return go_on(generator.open(feeds), choose, lambda: np.zeros(1, np.bool_))


def go_on(opening: Opening, choose: Choose, stopped: Callable[[], Array]) -> Iterator[Array]:
    """Generate tokens, int64 [batch] each, until every row has stopped.

    A stopped row gets padding from then on, so that it never runs out of the model's positions.

    Args:
        opening: the decoder and its prompt.
        choose: picks the next tokens.
        stopped: called after each token; which rows have stopped, bool [batch], or [1] for all.
    """
    decoder = opening.decoder
    logits, state = decoder.read(opening.tokens, opening.mask)
    last = last_of_rows(logits, opening.mask)
    while True:
        tokens = choose(last)
        yield tokens
        over = np.broadcast_to(stopped(), tokens.shape)
        if over.all():
            return
        going = np.where(over, 0, 1)[:, None]
        logits, state = decoder.step(state, tokens[:, None], going)
        last = logits[:, -1]


def replaying(generator: Generator) -> Runner:
    """Run a generative model on whole sequences in several steps, see `Decoder.replay`.

    The runner takes the inputs of `Generator.open` and returns the logits
    [batch, length, vocabulary] of all steps.
    """

    def replay(feeds: Tensors) -> Tensors:
        opening = generator.open(feeds)
        return {LOGITS: opening.as_given(opening.decoder.replay(opening.tokens, opening.mask))}

    return replay


def recomputing(generator: Generator) -> Runner:
    """Run a generative model on whole sequences in one step, which reads no cache."""

    def recompute(feeds: Tensors) -> Tensors:
        opening = generator.open(feeds)
        logits, _ = opening.decoder.read(opening.tokens, opening.mask)
        return {LOGITS: opening.as_given(logits)}

    return recompute


def row_by_row(run: Runner) -> Runner:
    """Run every row alone and without its padding; the logits of padding are 0."""

    def each(feeds: Tensors) -> Tensors:
        real = feeds["attention_mask"] == 1
        rows = [run(alone(feeds, row))[LOGITS] for row in range(len(real))]
        if "decoder_input_ids" in feeds:
            return {LOGITS: np.concatenate(rows)}
        logits = np.zeros((*real.shape, rows[0].shape[-1]), rows[0].dtype)
        for index, row in enumerate(rows):
            logits[index, real[index]] = row[0]
        return {LOGITS: logits}

    return each


def past_name(present: str) -> str:
    """The input that takes an output of the cache in the next step."""
    kind = present.rpartition(".")[2]
    return present.replace(PRESENT, PAST_STATE if kind in STATE_KINDS else PAST, 1)


def greedy(logits: Array) -> Array:
    """The likeliest token, int64 [batch], of logits [batch, vocabulary]."""
    best: Array = logits.argmax(-1)
    return best.astype(np.int64)


def alone(batch: Tensors, row: int) -> Tensors:
    """One row of a batch, without the positions that the attention mask hides.

    The mask covers the prompt: the decoder tokens of an encoder-decoder are kept whole. Its encoder
    may count positions, so that it keeps padding before and between tokens; a row without tokens is
    kept whole too.
    """
    mask = batch["attention_mask"]
    seen = mask[row] == 1
    if "decoder_input_ids" in batch:
        seen = np.arange(len(seen)) <= np.flatnonzero(seen).max(initial=0) if seen.any() else ~seen
    return {
        name: values[row : row + 1, seen]
        if values.shape[:2] == mask.shape and name != "decoder_input_ids"
        else values[row : row + 1]
        for name, values in batch.items()
    }


def without(feeds: Tensors, *names: str) -> dict[str, Array]:
    """The feeds but those of these names."""
    return {name: values for name, values in feeds.items() if name not in names}


def pieces_of(length: int) -> list[tuple[int, int]]:
    """Start and end of the steps in which `replaying` reads a sequence."""
    single = min(3, length - 1)
    pair = min(2, length - 1 - single)
    ends = [length - single - pair, length - single, *range(length - single + 1, length + 1)]
    return [piece for piece in zip([0, *ends], ends, strict=False) if piece[0] < piece[1]]


def _output(outputs: Tensors, name: str) -> Array:
    if name not in outputs:
        raise ArtifactError(
            f"a graph returns {', '.join(sorted(outputs))}, expected {name} among them",
            remedy="Export it again.",
        )
    return outputs[name]


def _empty(batch: int, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a state before the first token: nothing along a length that grows."""
    return batch, *(size if isinstance(size, int) else 0 for size in spec.shape[1:])
