"""Rows of an encoder alone: without the padding behind them and without other rows' padding.

What padding does to a row must not be part of the truth: a mask that a model applies wrongly would
be wrong on both sides. So each row runs without the padding at its end, together with rows of the
same length only. Padding before or between its tokens stays, hidden by the mask: it moves the
tokens to other positions, which is part of the row.

Some models give a padded row other outputs than the row alone, without any mistake (convolutions
over masked tokens, attention that hashes all tokens). This is measured on the batch with the most
padding.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.alone import PaddingChangesRowsError, is_same
from propulsion_export.parity.differences import differences
from propulsion_export.parity.forwards import Forwards

_MASK = "attention_mask"
_TOGETHER = 16  # most rows of one pass


@dataclass(frozen=True)
class EncoderRows:
    """Rows of padded batches, and how they are grouped to be run.

    Attributes:
        batches: the padded batches, all with an attention mask.
        groups: the rows, batch and place, that run together; all of one length.
    """

    batches: Sequence[Tensors]
    groups: Sequence[Sequence[tuple[int, int]]]

    @property
    def forwards(self) -> list[Forwards]:
        """A pass for each group."""
        return [Forwards((_joined([self._row(*row) for row in each]),)) for each in self.groups]

    @property
    def most_padded(self) -> int | None:
        """The batch with the most padding; None if no row has any at its end."""
        hidden = [
            sum(mask.shape[1] - length_of(row) for row in mask)
            for mask in (batch[_MASK] for batch in self.batches)
        ]
        return int(np.argmax(hidden)) if any(hidden) else None

    def outputs(self, found: Sequence[Tensors], padded: Tensors) -> tuple[Tensors, ...]:
        """The outputs at their places in the padded batches; 0 where rows are padded.

        Args:
            found: the outputs of `forwards`.
            padded: the outputs of the batch `most_padded` as it is.

        Raises:
            PaddingChangesRowsError: the padded batch has other outputs than its rows alone.
        """
        place = self.most_padded
        assert place is not None
        names = [name for name in padded if self._has_rows(name, found)]
        positional = {name for name in names if self._has_positions(name, found, padded[name])}
        outputs = tuple(self._placed(names, positional, found))
        self._check(outputs[place], padded, positional, place)
        return outputs

    def _row(self, batch: int, row: int) -> Tensors:
        mask = self.batches[batch][_MASK]
        length = length_of(mask[row])
        return {
            name: values[row : row + 1, :length]
            if values.shape[:2] == mask.shape
            else values[row : row + 1]
            for name, values in self.batches[batch].items()
        }

    def _length(self, group: Sequence[tuple[int, int]]) -> int:
        batch, row = group[0]
        return length_of(self.batches[batch][_MASK][row])

    def _has_rows(self, name: str, found: Sequence[Tensors]) -> bool:
        pairs = zip(self.groups, found, strict=True)
        return all(len(outputs[name]) == len(group) for group, outputs in pairs)

    def _has_positions(self, name: str, found: Sequence[Tensors], padded: Array) -> bool:
        """Whether the second dimension counts tokens, in every pass and in the padded batch."""
        assert self.most_padded is not None
        pairs = zip(self.groups, found, strict=True)
        return padded.shape[:2] == self.batches[self.most_padded][_MASK].shape and all(
            outputs[name].shape[1] == self._length(group) for group, outputs in pairs
        )

    def _placed(
        self, names: Sequence[str], positional: set[str], found: Sequence[Tensors]
    ) -> Iterator[Tensors]:
        where = {
            row: (outputs, place)
            for group, outputs in zip(self.groups, found, strict=True)
            for place, row in enumerate(group)
        }
        for number, batch in enumerate(self.batches):
            rows, width = batch[_MASK].shape
            parts = [where[number, row] for row in range(rows)]
            yield {
                name: np.stack(
                    [
                        _widened(outputs[name][place], width)
                        if name in positional
                        else outputs[name][place]
                        for outputs, place in parts
                    ]
                )
                for name in names
            }

    def _check(self, alone: Tensors, padded: Tensors, positional: set[str], place: int) -> None:
        seen = self.batches[place][_MASK] == 1
        effects = [0.0]
        for name, expected in alone.items():
            found = padded[name]
            if name in positional:
                expected, found = expected[seen], found[seen]
            if not is_same(found, expected):
                effects.append(float(differences(found, expected).max()))
        if len(effects) > 1:
            raise PaddingChangesRowsError(float(np.max(effects)))


def grouped_rows(batches: Sequence[Tensors], *, together: bool) -> EncoderRows:
    """Rows in groups of one length, or every row for itself."""
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, batch in enumerate(batches):
        for row, mask in enumerate(batch[_MASK]):
            by_length[length_of(mask)].append((number, row))
    most = _TOGETHER if together else 1
    groups = [
        rows[start : start + most]
        for _, rows in sorted(by_length.items())
        for start in range(0, len(rows), most)
    ]
    return EncoderRows(batches, groups)


def length_of(mask: Array) -> int:
    """The length of a row up to its last token; that of the mask [length] if all is hidden."""
    tokens = np.flatnonzero(mask)
    return int(tokens[-1]) + 1 if len(tokens) else len(mask)


def _joined(rows: Sequence[Tensors]) -> Tensors:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _widened(values: Array, width: int) -> Array:
    """Values [length, …] with zeros behind, [width, …]."""
    behind = [(0, width - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(values, behind)
