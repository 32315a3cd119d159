"""Run a generative model step by step, in any runtime, feeding its cache back.

A decoder is a runner that takes `input_ids` and `position_ids` [batch, new], `attention_mask`
[batch, past + new] and a cache, `past_key_values.N.key` and `.value` [batch, heads, past, width],
and returns `logits` [batch, new, vocabulary] and the longer cache, `present.N.key` and `.value`.
The decoder of an encoder-decoder also takes the output of the encoder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.tensor_names import LOGITS, PAST, PRESENT

# Chooses a token [batch] from the logits [batch, vocabulary] of the last position.
Choose = Callable[[Array], Array]


@dataclass(frozen=True)
class DecoderState:
    """What a decoder has read so far.

    Attributes:
        mask: int64 [batch, read]; 0 where a row is padded.
        cache: keys and values by input name, [batch, heads, read, width].
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
            if spec.name.startswith(f"{PAST}.")
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
            name.replace(PRESENT, PAST, 1): values
            for name, values in outputs.items()
            if name.startswith(f"{PRESENT}.")
        }
        return outputs[LOGITS], DecoderState(whole, {**state.cache, **longer})


@dataclass(frozen=True)
class Opening:
    """A decoder and the prompt it reads first: `tokens` and `mask`, int64 [batch, length]."""

    decoder: Decoder
    tokens: Array
    mask: Array


class Generator(Protocol):
    """A generative model, ready for any batch."""

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

    def open(self, feeds: Tensors) -> Opening:
        rest = _without(feeds, "input_ids", "attention_mask")
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

    def open(self, feeds: Tensors) -> Opening:
        rest = _without(feeds, "input_ids", "attention_mask", "decoder_input_ids")
        mask = feeds["attention_mask"]
        encoded = self.encode({"input_ids": feeds["input_ids"], "attention_mask": mask, **rest})
        hidden = encoded["last_hidden_state"]
        rest |= {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        first = np.full((len(mask), 1), self.start, np.int64)
        tokens = feeds.get("decoder_input_ids", first)
        return Opening(Decoder(self.decode, feeds=rest), tokens, np.ones_like(tokens))

    def pad(self, rows: Sequence[Array], padding: int) -> dict[str, Array]:
        # An encoder with a table of positions counts them from the left, padding or not.
        flipped = pad_left([row[::-1] for row in rows], padding)
        return {name: values[:, ::-1].copy() for name, values in flipped.items()}


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
    state = decoder.start(len(opening.tokens))
    logits, state = decoder.step(state, opening.tokens, opening.mask)
    while True:
        tokens = choose(logits[:, -1])
        yield tokens
        over = np.broadcast_to(stopped(), tokens.shape)
        if over.all():
            return
        going = np.where(over, 0, 1)[:, None]
        logits, state = decoder.step(state, tokens[:, None], going)


def replaying(generator: Generator) -> Runner:
    """Run a generative model on whole sequences in several steps, as in generation.

    Most of the sequence first, then two tokens at once, then three one by one. The runner takes the
    inputs of `Generator.open` and returns the logits [batch, length, vocabulary] of all steps.
    """

    def replay(feeds: Tensors) -> Tensors:
        opening = generator.open(feeds)
        state, parts = opening.decoder.start(len(opening.tokens)), []
        for start, end in pieces_of(opening.tokens.shape[1]):
            piece = opening.tokens[:, start:end], opening.mask[:, start:end]
            logits, state = opening.decoder.step(state, *piece)
            parts.append(logits)
        return {LOGITS: np.concatenate(parts, axis=1)}

    return replay


def recomputing(generator: Generator) -> Runner:
    """Run a generative model on whole sequences in one step, which reads no cache."""

    def recompute(feeds: Tensors) -> Tensors:
        opening = generator.open(feeds)
        state = opening.decoder.start(len(opening.tokens))
        logits, _ = opening.decoder.step(state, opening.tokens, opening.mask)
        return {LOGITS: logits}

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


def positions(mask: Array) -> Array:
    """Position of every token, int64 of the mask's shape: padding does not count."""
    counted: Array = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return counted


def greedy(logits: Array) -> Array:
    """The likeliest token, int64 [batch], of logits [batch, vocabulary]."""
    best: Array = logits.argmax(-1)
    return best.astype(np.int64)


def alone(batch: Tensors, row: int) -> Tensors:
    """One row of a batch, without the positions that the attention mask hides.

    The mask covers the prompt: the decoder tokens of an encoder-decoder are kept whole.
    """
    mask = batch["attention_mask"]
    return {
        name: values[row : row + 1, mask[row] == 1]
        if values.shape[:2] == mask.shape and name != "decoder_input_ids"
        else values[row : row + 1]
        for name, values in batch.items()
    }


def pad_left(rows: Sequence[Array], padding: int) -> dict[str, Array]:
    """Rows of different lengths as `input_ids` and `attention_mask`, int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), padding, np.int64)
    mask = np.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def pieces_of(length: int) -> list[tuple[int, int]]:
    """Start and end of the steps in which `replaying` reads a sequence."""
    single = min(3, length - 1)
    pair = min(2, length - 1 - single)
    ends = [length - single - pair, length - single, *range(length - single + 1, length + 1)]
    return [piece for piece in zip([0, *ends], ends, strict=False) if piece[0] < piece[1]]


def _without(feeds: Tensors, *names: str) -> dict[str, Array]:
    return {name: values for name, values in feeds.items() if name not in names}


def _empty(batch: int, spec: TensorSpec) -> tuple[int, int, int, int]:
    return batch, int(spec.shape[1]), 0, int(spec.shape[3])
