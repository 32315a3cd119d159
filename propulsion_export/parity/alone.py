"""Rows of a causal language model alone, as many at once as padding leaves as they are.

A causal model sees nothing behind a token, so that padding at a row's end leaves the row's logits
as they are: rows of about one length run together, padded on the right. That is checked, because a
model may be other than it should.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.parity.forwards import Forwards, decoder_pass
from propulsion_export.runners.decoding import row_by_row

# Tokens that run together, and those that padding may add: one pass more, which reads every weight,
# takes as long as these do (SmolLM2-135M in float64).
_TOGETHER, _PADDING = 256, 32
# The share of the largest logit by which padding may change one: float64 rounds at 1e-14, what
# leaks is larger by far.
_ROUNDING = 1e-10


class PaddingChangesRowsError(Exception):
    """Rows that ran together are not as they are alone.

    Attributes:
        effect: the largest change of an output; None where that is not measured, because all rows
            can run alone.
    """

    def __init__(self, effect: float | None = None) -> None:
        super().__init__()
        self.effect = effect


@dataclass(frozen=True)
class Rows:
    """Rows of tokens without padding, int64 [length] each, and how they are grouped to be run.

    Attributes:
        rows: the rows.
        groups: numbers of the rows that run together; those without tokens do not run.
    """

    rows: Sequence[Array]
    groups: Sequence[Sequence[int]]

    @property
    def forwards(self) -> list[Forwards]:
        """A pass for each group."""
        return [self._forward([self.rows[row] for row in group]) for group in self.groups]

    @property
    def probe(self) -> Forwards | None:
        """The row with the most padding, alone; None if no row is padded."""
        place = self._most_padded()
        return None if place is None else self._forward([self.rows[self.groups[place][0]]])

    def checked_logits(self, outputs: Sequence[Tensors]) -> list[Array]:
        """The logits of every row, from the outputs of `forwards` and of the probe.

        Raises:
            PaddingChangesRowsError: the probe shows that padding changes a row.
        """
        place = self._most_padded()
        assert place is not None
        alone = outputs[-1][LOGITS]
        padded = outputs[place][LOGITS][:1, : alone.shape[1]]
        if not is_same(padded, alone):
            raise PaddingChangesRowsError
        return self.logits(outputs[:-1])

    def logits(self, outputs: Sequence[Tensors]) -> list[Array]:
        """The logits of every row, [length, vocabulary]; [0, vocabulary] of one without tokens."""
        by_row = {
            row: output[LOGITS][place, : len(self.rows[row])]
            for group, output in zip(self.groups, outputs, strict=True)
            for place, row in enumerate(group)
        }
        nothing = outputs[0][LOGITS][0, :0]
        return [by_row.get(row, nothing) for row in range(len(self.rows))]

    def _most_padded(self) -> int | None:
        spreads = [len(self.rows[group[-1]]) - len(self.rows[group[0]]) for group in self.groups]
        return int(np.argmax(spreads)) if any(spreads) else None

    @staticmethod
    def _forward(rows: Sequence[Array]) -> Forwards:
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(tokens)
        for row, (values, seen) in zip(rows, zip(tokens, mask, strict=True), strict=True):
            values[: len(row)], seen[: len(row)] = row, 1
        return decoder_pass(tokens, mask)


def grouped(rows: Sequence[Array]) -> Rows:
    """Rows in groups of about one length, the shortest of a group first."""
    groups: list[list[int]] = []
    for row in sorted(_with_tokens(rows), key=lambda row: len(rows[row])):
        if groups and _fits([len(rows[each]) for each in groups[-1]], len(rows[row])):
            groups[-1].append(row)
        else:
            groups.append([row])
    return Rows(rows, groups)


def _fits(group: Sequence[int], length: int) -> bool:
    """Whether a longer row may join rows of these lengths."""
    added = len(group) * (length - group[-1])
    return added <= _PADDING and (len(group) + 1) * length <= _TOGETHER


def ungrouped(rows: Sequence[Array]) -> Rows:
    """Every row for itself."""
    return Rows(rows, [[row] for row in _with_tokens(rows)])


def _with_tokens(rows: Sequence[Array]) -> list[int]:
    return [number for number, row in enumerate(rows) if len(row)]


def run_alone(run: Runner, batch: Tensors) -> Tensors:
    """The logits of every row alone, from all at once if padding leaves the shortest as it is."""
    together = run(batch)
    tokens = batch["attention_mask"].sum(1)
    row = int(np.argmin(np.where(tokens, tokens, tokens.max() + 1)))  # one without tokens is no row
    by_itself = row_by_row(run)({name: values[row : row + 1] for name, values in batch.items()})
    same = is_same(together[LOGITS][row : row + 1], by_itself[LOGITS])
    return together if same else row_by_row(run)(batch)


def is_same(found: Array, expected: Array) -> bool:
    """Whether two float64 arrays of logits are equal but for rounding."""
    limit = _ROUNDING * np.abs(expected[np.isfinite(expected)]).max(initial=0)
    return np.allclose(found, expected, rtol=0, atol=limit, equal_nan=True)


def rows_of(batches: Sequence[Tensors]) -> list[Array]:
    """The rows of padded batches without their padding."""
    return [
        tokens[real]
        for batch in batches
        for tokens, real in zip(batch["input_ids"], batch["attention_mask"] == 1, strict=True)
    ]


def in_batches(logits: Sequence[Array], batches: Sequence[Tensors]) -> Iterator[Tensors]:
    """Logits of rows at their places in padded batches; 0 where a batch is padded."""
    remaining = iter(logits)
    for batch in batches:
        real = batch["attention_mask"] == 1
        values = np.zeros((*real.shape, logits[0].shape[-1]), logits[0].dtype)
        for row, seen in zip(values, real, strict=True):
            row[seen] = next(remaining)
        yield {LOGITS: values}
