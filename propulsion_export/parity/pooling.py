"""Pool the errors of large outputs, in parts that a processor's cache holds.

The logits of a language model are hundreds of megabytes for a few rows. Arithmetic on whole arrays
waits for memory at every step, and keeps copies of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile, zip_longest

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.differences import counted_errors, differences, without_ruled_out

_CACHED = 2**16  # elements of a part


@dataclass(frozen=True)
class Part:
    """Elements of one output in one batch, one behind the other.

    Attributes:
        batch: the number of the batch.
        start: the place of the first element among those of the batch.
        hidden: where the attention mask hides the elements; bool [positions, 1].
        sides: what each side has there; [positions, width].
    """

    batch: int
    start: int
    hidden: Array
    sides: tuple[Array, ...]


def parts_of(name: str, hidden: Sequence[Array], *sides: Sequence[Tensors]) -> Iterator[Part]:
    """All elements of an output, batch by batch.

    Args:
        name: of the output.
        hidden: see `comparison.hidden_positions`.
        sides: one entry per batch each, with outputs of the same shapes.
    """
    for batch, here in enumerate(hidden):
        if not here.size:
            continue
        flags = here.reshape(*here.shape[:2], -1)[..., 0].reshape(-1, 1)
        width = here.size // len(flags)
        arrays = [side[batch][name].reshape(len(flags), width) for side in sides]
        step = max(1, _CACHED // width)
        for first in range(0, len(flags), step):
            rows = slice(first, first + step)
            values = tuple(array[rows] for array in arrays)
            yield Part(batch, first * width, flags[rows], values)


@dataclass
class PooledErrors:
    """Absolute errors in float64 of one side against another, see `counted_errors`.

    Attributes:
        edges: where one bin of the histogram ends and the next begins, ascending.
        largest: the largest of all; NaN if one is not finite, also at a hidden position.
        elements: how many there are.
        non_finite: how many are not finite.
        batch: the batch of the largest; one that is not finite is larger than any other.
        place: the place of the largest in its batch.
    """

    edges: Sequence[float]
    largest: float = 0.0
    elements: int = 0
    non_finite: int = 0
    batch: int = 0
    place: int = 0
    _squares: float = 0.0
    _greatest: float = -1.0
    _reaching: list[int] = field(default_factory=list)

    @property
    def root_mean_square(self) -> float:
        """NaN if an error is not finite."""
        return math.sqrt(self._squares / max(1, self.elements))

    @property
    def histogram(self) -> tuple[int, ...]:
        """Elements above 0 in each bin; the first and the last have no other end."""
        reaching = [*self._reaching, *[0] * (len(self.edges) + 2 - len(self._reaching))]
        return tuple(one - beyond for one, beyond in pairwise(reaching))

    def add(self, part: Part, found: Array, expected: Array, *, masked: bool = False) -> None:
        """Add a part, of which one side has `found` and the other `expected`.

        `masked`: whether the whole output rules out tokens, see `counted_errors`.
        """
        errors = counted_errors(found, expected, part.hidden, masked=masked)
        largest = float(errors.max())
        self.elements += errors.size
        self._remember_place(part, errors, math.inf if math.isnan(largest) else largest)
        self.largest = float(np.maximum(self.largest, largest))
        self._squares += float(np.vdot(errors, errors))
        if math.isnan(largest):
            self.non_finite += int(np.isnan(errors).sum())
        inner = takewhile(bool, (int(np.count_nonzero(errors >= edge)) for edge in self.edges))
        counts = (int(np.count_nonzero(errors > 0)), *inner)
        self._reaching = list(map(sum, zip_longest(self._reaching, counts, fillvalue=0)))

    def _remember_place(self, part: Part, errors: Array, largest: float) -> None:
        if largest > self._greatest:
            self._greatest = largest
            where = np.isnan(errors) if largest == math.inf else errors
            self.batch, self.place = part.batch, part.start + int(where.argmax())


def largest_error(name: str, hidden: Array, found: Tensors, expected: Tensors) -> float:
    """The largest absolute error of an output where it is not hidden, see `differences`.

    Args:
        name: of the output.
        hidden: bool, as broadcast as by `comparison.hidden_positions`.
        found: outputs of one side for a batch.
        expected: of the other.
    """
    largest = 0.0
    for part in parts_of(name, [hidden], [found], [expected]):
        largest = float(np.maximum(largest, _largest_seen(part, differences(*part.sides))))
    return largest


def scale_seen(part: Part, values: Array) -> float:
    """The largest absolute value of an output at positions that are not hidden.

    Minus infinity, by which tokens are ruled out, has no size. NaN if there is one.
    """
    size = _largest_seen(part, values)
    return _largest_seen(part, without_ruled_out(values)) if size == math.inf else size


def _largest_seen(part: Part, values: Array) -> float:
    seen = values[~part.hidden[:, 0]] if part.hidden.any() else values
    return float(np.maximum(seen.max(initial=0), -seen.min(initial=0)))
