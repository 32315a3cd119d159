"""Generate with a decoder whose rotary frequencies change at a length, see `rope_switch`.

Rows on two sides of a switch are computed apart, because the longest row of a batch decides for
all. A row that comes to the switch is computed again from its first token: the keys in its cache
were rotated with the other frequencies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.tensor_names import IDS_INPUT
from propulsion_export.base_model.rope_switch import side_of
from propulsion_export.runners.decoding import (
    Choose,
    Decoder,
    DecoderState,
    Generator,
)
from propulsion_export.runners.padding import last_of_rows


@dataclass(frozen=True)
class _Part:
    """Rows on one side: their numbers, and a decoder that has read them."""

    rows: Sequence[int]
    side: int
    decoder: Decoder
    state: DecoderState


class SwitchingGenerator:
    """Generates as `decoding.go_on`, with every row on its own side.

    Args:
        generator: a causal model.
        prompts: the tokens of each row.
        padding: the token that fills up shorter rows.
        feeds: the adapters' inputs.
        switches: lengths above which the frequencies are others.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        padding: int,
        feeds: Mapping[str, Any],
        switches: Sequence[int],
    ) -> None:
        self._generator, self._padding = generator, padding
        self._feeds, self._switches = feeds, switches
        self._texts = [list(prompt) for prompt in prompts]
        self._logits: dict[int, Array] = {}

    def go_on(self, choose: Choose, stopped: Callable[[], Array]) -> Iterator[Array]:
        """See `decoding.go_on`."""
        count = len(self._texts)
        parts = self._start(range(count))
        while True:
            tokens = choose(np.stack([self._logits[row] for row in range(count)]))
            yield tokens
            over = np.broadcast_to(stopped(), tokens.shape)
            if over.all():
                return
            for row in np.flatnonzero(~over):
                self._texts[row].append(int(tokens[row]))
            parts = self._step(parts, tokens, over)

    def _step(self, parts: Sequence[_Part], tokens: Array, over: Array) -> list[_Part]:
        """Read the next tokens; rows that come to a switch get parts of their own."""
        moved, kept = [], []
        for part in parts:
            crossing = [row for row in part.rows if not over[row] and self._side(row) != part.side]
            moved += crossing
            staying = [row for row in part.rows if row not in crossing]
            if not over[staying].all():
                kept.append(self._read(self._only(part, staying), tokens, over))
        return [*kept, *self._start(moved)]

    def _side(self, row: int) -> int:
        return side_of(len(self._texts[row]), self._switches)

    def _start(self, rows: Sequence[int]) -> list[_Part]:
        """Read whole rows, those of each side together."""
        sides: dict[int, list[int]] = {}
        for row in rows:
            sides.setdefault(self._side(row), []).append(row)
        return [self._prefill(side, own) for side, own in sides.items()]

    def _prefill(self, side: int, rows: Sequence[int]) -> _Part:
        texts = [np.array(self._texts[row], np.int64) for row in rows]
        batch = self._generator.pad(texts, self._padding)
        opening = self._generator.open({**batch, **self._feeds_of(rows)})
        decoder = opening.decoder
        logits, state = decoder.read(opening.tokens, opening.mask)
        self._keep(rows, last_of_rows(logits, opening.mask))
        return _Part(rows, side, decoder, state)

    def _read(self, part: _Part, tokens: Array, over: Array) -> _Part:
        rows = list(part.rows)
        going = np.where(over[rows], 0, 1)[:, None]
        logits, state = part.decoder.step(part.state, tokens[rows][:, None], going)
        self._keep(rows, logits[:, -1])
        return _Part(rows, part.side, part.decoder, state)

    def _only(self, part: _Part, rows: Sequence[int]) -> _Part:
        """Some rows of a part."""
        if len(rows) == len(part.rows):
            return part
        chosen = [part.rows.index(row) for row in rows]
        cache = {name: np.asarray(values)[chosen] for name, values in part.state.cache.items()}
        batch = {
            name: np.ones((len(rows), 1), np.int64) for name in ("input_ids", "attention_mask")
        }
        decoder = self._generator.open({**batch, **self._feeds_of(rows)}).decoder
        return _Part(rows, part.side, decoder, DecoderState(part.state.mask[chosen], cache))

    def _feeds_of(self, rows: Sequence[int]) -> dict[str, Any]:
        return feeds_of_rows(self._feeds, rows)

    def _keep(self, rows: Sequence[int], last: Array) -> None:
        self._logits |= dict(zip(rows, last, strict=True))


def feeds_of_rows(feeds: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The adapters' inputs for some rows of a batch: each row of a bank's has its own number.

    A single number is that of all rows.
    """
    return {
        name: values[list(rows)] if name == IDS_INPUT and len(values) > 1 else values
        for name, values in feeds.items()
    }
