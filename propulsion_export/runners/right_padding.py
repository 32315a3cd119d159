"""Run a decoder of onnxruntime-genai's builder, whose rows are padded at their end.

Its attention (ONNX Runtime's GroupQueryAttention) counts each row's tokens by the sum of its mask:
the tokens must come first, and a new one is appended to its own row. Several tokens at once can be
appended to a single row only. A convolution keeps a state of fixed size of the last positions,
padding or not: there rows of different lengths are read apart, and decoded together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import PAST_STATE
from propulsion_export.errors import UsageError
from propulsion_export.runners.decoding import Decoder, DecoderState, Opening, without
from propulsion_export.runners.padding import pad_right
from propulsion_export.runners.switching import feeds_of_rows

_SINGLE = 3  # tokens that `replay` reads one by one


@dataclass(frozen=True)
class RightPaddedModel:
    """A decoder that reads the prompt itself; its attributes are those of `Decoder`.

    Prompts may be padded anywhere: the padding is moved to the end of the rows.
    """

    run: Runner
    inputs: Sequence[TensorSpec] = ()
    reads_gaps: ClassVar[bool] = False

    def open(self, feeds: Tensors) -> Opening:
        tokens, given = feeds["input_ids"], feeds["attention_mask"]
        if empty := np.flatnonzero(given.sum(1) == 0).tolist():
            raise UsageError(*(f"row {row + 1}: has no tokens, expected some" for row in empty))
        rows = [row[real == 1] for row, real in zip(tokens, given, strict=True)]
        moved = pad_right(rows, 0)
        rest = without(feeds, "input_ids", "attention_mask")
        decoder = RightPaddedDecoder(self.run, self.inputs, rest)
        return Opening(decoder, moved["input_ids"], moved["attention_mask"], given)

    def pad(self, rows: Sequence[Array], padding: int) -> dict[str, Array]:
        return pad_right(rows, padding)


class RightPaddedDecoder(Decoder):
    """A decoder at work on one batch, whose rows are padded at their end."""

    def read(self, tokens: Array, mask: Array) -> tuple[Array, DecoderState]:
        lengths = mask.sum(1)
        if not self._has_convolutions() or len(set(lengths)) == 1:
            return super().read(tokens, mask)
        groups = _rows_by_length(lengths)
        parts = [self._read_part(tokens, rows, length) for length, rows in groups.items()]
        logits = _joined(list(zip(groups.values(), (values for values, _ in parts), strict=True)))
        states = list(zip(groups.values(), (state.cache for _, state in parts), strict=True))
        names = states[0][1]
        cache = {name: _joined([(rows, own[name]) for rows, own in states]) for name in names}
        return logits, DecoderState(mask, cache)

    def replay(self, tokens: Array, mask: Array) -> Array:
        """Read whole rows in several steps, as in generation; returns the logits of all steps.

        Most of each row's tokens first, then three one by one. A single row is read as by any
        decoder, two tokens at once among its steps.
        """
        if len(tokens) == 1:
            return super().replay(tokens, mask)
        lengths = mask.sum(1)
        starts = lengths - np.minimum(_SINGLE, lengths - 1)
        first = slice(0, int(starts.max()))
        prompt = np.where(np.arange(mask.shape[1]) < starts[:, None], mask, 0)[:, first]
        logits, state = self.read(tokens[:, first], prompt)
        whole = np.zeros((*mask.shape, logits.shape[-1]), logits.dtype)
        whole[:, first][prompt == 1] = logits[prompt == 1]
        for place in (starts + step for step in range(_SINGLE)):
            going = place < lengths
            if not going.any():
                break
            rows, place = np.arange(len(tokens)), np.minimum(place, lengths - 1)
            new = tokens[rows, place][:, None]
            logits, state = self.step(state, new, going.astype(np.int64)[:, None])
            whole[rows[going], place[going]] = logits[going, 0]
        return whole

    def _has_convolutions(self) -> bool:
        """Whether a state of fixed size depends on the last positions that were read."""
        return any(spec.name.startswith(f"{PAST_STATE}.") for spec in self.inputs)

    def _read_part(
        self, tokens: Array, rows: Sequence[int], length: int
    ) -> tuple[Array, DecoderState]:
        """Read rows of one length, without their padding."""
        own = tokens[list(rows), :length]
        feeds = feeds_of_rows(self.feeds, rows)
        return Decoder(self.run, self.inputs, feeds).read(own, np.ones_like(own))


def _rows_by_length(lengths: Array) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(int(length), []).append(row)
    return groups


def _joined(parts: Sequence[tuple[Sequence[int], Any]]) -> Array:
    """One array of the rows of all parts, zeros behind those that are shorter in a dimension."""
    arrays = [(list(rows), np.asarray(values)) for rows, values in parts]
    sizes = np.max([values.shape[1:] for _, values in arrays], axis=0)
    count = sum(len(rows) for rows, _ in arrays)
    whole = np.zeros((count, *map(int, sizes)), arrays[0][1].dtype)
    for rows, values in arrays:
        whole[np.ix_(rows, *map(range, values.shape[1:]))] = values
    return whole
