"""Which values of a candidate are the outputs and inputs of which modules, by their numbers.

The rule is that of `parity.comparison`: pooled over all runs, a value may be off by 4 times
PyTorch's own error there, which counts as no less than one rounding of the largest value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.bisect.modules import Call, ModuleRun
from propulsion_export.parity.bisect.places import Place, Places
from propulsion_export.parity.comparison import FACTOR, UNIT_ROUNDOFF
from propulsion_export.parity.differences import differences, without_ruled_out

Part = Literal["read", "output", "unscaled"]
PARTS: tuple[Part, ...] = ("read", "output", "unscaled")
# A value is looked at whose samples are off by less than this share of typical values, which count
# as no less than a small part of the largest one.
_NEAR, _SMALL = 0.1, 1e-3
_SAMPLES = 32


@dataclass
class Errors:
    """How far one value of the candidate is from what it might be; pooled over runs.

    Attributes:
        largest: by channel of the module's output, float64 [channels].
        products: sum of the candidate's value times the oracle's, by channel.
        squares: sum of the oracle's squares, by channel.
        total: sum of the squares of all errors.
    """

    largest: Array
    products: Array
    squares: Array
    total: float

    def add_(self, other: "Errors") -> None:
        """Take in the errors of another run."""
        self.largest = np.maximum(self.largest, other.largest)  # NaN stays
        self.products = self.products + other.products
        self.squares = self.squares + other.squares
        self.total += other.total

    @property
    def error(self) -> float:
        """The largest of all; NaN if there is one."""
        return float(self.largest.max(initial=0))


@dataclass
class Target:
    """What a module reads or returns, and the values that may be it.

    Attributes:
        reference: the largest error of PyTorch at the artifact's precision.
        scale: the largest absolute value of the oracle.
        own: errors of the values where the module's output is expected, by name; for each place.
        others: errors of other values that are near.
        runs: how many runs are pooled.
        size: how many numbers the first run has.
    """

    reference: float = 0.0
    scale: float = 0.0
    own: list[dict[str, Errors]] = field(default_factory=list)
    others: dict[str, Errors] = field(default_factory=dict)
    runs: int = 0
    size: int = 0

    def allowed(self, dtype: str) -> float:
        """The largest error that is within the tolerance."""
        return FACTOR * max(self.reference, UNIT_ROUNDOFF[dtype] * self.scale)

    def is_met(self, dtype: str) -> bool:
        """Whether some value of the candidate is within the tolerance, in every place."""
        bound = self.allowed(dtype)
        if any(errors.error <= bound for errors in self.others.values()):
            return True
        return bool(self.own) and all(
            any(errors.error <= bound for errors in place.values()) for place in self.own
        )

    def nearest(self) -> list[tuple[str, Errors]]:
        """Of each place, the value that is nearest, and its errors."""
        return [min(place.items(), key=_distance) for place in self.own if place]


@dataclass
class Pooled:
    """The targets of all calls of modules, in the order in which they return.

    Attributes:
        targets: by call and part.
        kinds: the class of each module.
    """

    targets: dict[Call, dict[Part, Target]] = field(default_factory=dict)
    kinds: dict[Call, str] = field(default_factory=dict)

    def add_(
        self,
        oracle: Mapping[Call, ModuleRun],
        reference: Mapping[Call, ModuleRun],
        values: Tensors,
        places: Places,
        mask: Array | None,
    ) -> None:
        """Take in one run of a graph and of the modules it stands for.

        Args:
            oracle: the modules in float64.
            reference: the modules at the artifact's precision.
            values: everything that the graph computes.
            places: where modules' outputs are expected.
            mask: int64 [rows, length], 0 where nothing counts; None where everything does.
        """
        found = _by_size(values)
        for call, run in oracle.items():
            if call not in reference or not run.output.size:
                continue
            self.kinds[call] = run.kind
            for part in PARTS:
                expected, own = getattr(run, part), getattr(reference[call], part)
                if expected is None or own is None or expected.shape != own.shape:
                    continue
                expected_at = () if part == "read" else places.get(call, ())
                target = self.targets.setdefault(call, {}).setdefault(part, Target())
                _compare_(target, expected, own, found, values, expected_at, mask)


def _distance(item: tuple[str, Errors]) -> float:
    total = item[1].total
    return total if np.isfinite(total) else np.inf


def _by_size(values: Tensors) -> dict[int, dict[str, Array]]:
    found: dict[int, dict[str, Array]] = {}
    for name, value in values.items():
        found.setdefault(value.size, {})[name] = value
    return found


def _shown(expected: Array, mask: Array | None) -> Array | None:
    """Which rows of an array, its last axis taken as channels, count; None: all."""
    if mask is None or mask.all():
        return None
    leading = expected.shape[:-1]
    real: Array = mask.reshape(-1) == 1
    if leading == mask.shape or leading == (mask.size,):
        return real
    if len(leading) > 2 and leading[:2] == mask.shape:
        return np.repeat(real, int(np.prod(leading[2:])))
    return None


def _compare_(
    target: Target,
    expected: Array,
    reference: Array,
    found: Mapping[int, Mapping[str, Array]],
    values: Tensors,
    places: Sequence[Place],
    mask: Array | None,
) -> None:
    target.size = target.size or expected.size
    shown = _shown(expected, mask)
    rows = _rows(expected, shown)
    own = differences(_rows(reference, shown), rows)
    target.reference = max(target.reference, float(own.max(initial=0)))
    size = float(np.abs(without_ruled_out(rows)).max(initial=0))
    target.scale = max(target.scale, size)
    near = {
        name: value
        for name, value in _near(expected, found, mask)
        if target.runs == 0 or name in target.others
    }
    measured = {name: _measured(value, expected, mask) for name, value in near.items()}
    _pool_(target.others, measured, target.runs)
    target.own = target.own or [{} for _ in places]
    for pooled, place in zip(target.own, places, strict=False):
        _pool_(pooled, dict(_placed(expected, values, place, mask)), target.runs)
    target.runs += 1


def _near(
    expected: Array, found: Mapping[int, Mapping[str, Array]], mask: Array | None
) -> Iterator[tuple[str, Array]]:
    """The values that may be a module's output, or be it for each row of a batch."""
    shapes = [expected]
    if mask is not None and expected.ndim > 1 and len(expected) == 1 < len(mask):
        shapes.append(np.broadcast_to(expected, (len(mask), *expected.shape[1:])))
    for wanted in shapes:
        alike = found.get(wanted.size, {}).items()
        fitting = [(name, value) for name, value in alike if _fits(value, expected)]
        if fitting and (samples := _Samples.of(wanted, mask)) is not None:
            yield from (each for each in fitting if samples.are_near(each[1]))


def _fits(found: Array, expected: Array) -> bool:
    if found.size == expected.size:
        return found.shape[-1:] == expected.shape[-1:]
    return len(expected) == 1 and found.ndim > 1 and found.shape[1:] == expected.shape[1:]


def _placed(
    expected: Array, values: Tensors, place: Place, mask: Array | None
) -> Iterator[tuple[str, Errors]]:
    """The errors of the values of a place that have the shape of its part of the output."""
    wanted = _source(expected, place)
    for name in place.values:
        found = _part(values[name], place) if name in values else None
        if found is not None and _fits(found, wanted):
            yield name, _measured(found, wanted, mask)


def _measured(found: Array, expected: Array, mask: Array | None) -> Errors:
    """The errors of a value; positions that the mask hides do not count."""
    wanted = _spread(expected, found)
    shown = _shown(wanted, mask)
    return _errors(_rows(found, shown), _rows(wanted, shown))


def _spread(expected: Array, found: Array) -> Array:
    """What is expected, once for each row of the batch where the candidate has it so."""
    if found.size == expected.size:
        return expected
    return np.broadcast_to(expected, found.shape)


def _pool_(pooled: dict[str, Errors], measured: Mapping[str, Errors], runs: int) -> None:
    """Add the errors of one more run; what has not been near in every run is no candidate."""
    for name in list(pooled):
        if name not in measured:
            del pooled[name]
    for name, errors in measured.items():
        if name in pooled:
            pooled[name].add_(errors)
        elif runs == 0:
            pooled[name] = errors


def _rows(values: Array, shown: Array | None) -> Array:
    """Values as [rows, channels], without the rows that do not count."""
    flat = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return flat if shown is None else flat[shown]


def _part(values: Array, place: Place) -> Array:
    return values if place.width is None else values[..., place.begin : place.begin + place.width]


def _source(expected: Array, place: Place) -> Array:
    if place.width is None:
        return expected
    return expected[..., place.source : place.source + place.width]


@dataclass(frozen=True)
class _Samples:
    """Some of the numbers of an array that count.

    Attributes:
        at: where they are in its rows, [rows, channels].
        values: what they are.
        size: the largest absolute value of the array.
    """

    at: tuple[Array, Array]
    values: Array
    size: float

    @classmethod
    def of(cls, wanted: Array, mask: Array | None) -> "_Samples | None":
        """Samples from everywhere; None where nothing counts."""
        rows, shown = _rows(wanted, None), _shown(wanted, mask)
        counted = np.arange(len(rows)) if shown is None else np.flatnonzero(shown)
        total = counted.size * rows.shape[1]
        if not total:
            return None
        places = np.linspace(0, total - 1, min(total, _SAMPLES)).astype(int)
        at = (counted[places // rows.shape[1]], places % rows.shape[1])
        return cls(at, rows[at], float(np.abs(without_ruled_out(rows[counted])).max()))

    def are_near(self, found: Array) -> bool:
        """Whether the numbers of another array are so near that the others are worth a look."""
        difference = differences(_rows(found, None)[self.at].astype(np.float64), self.values)
        values = np.abs(without_ruled_out(self.values))
        typical = max(float(np.median(values)), self.size * _SMALL)
        return bool(np.median(difference) <= _NEAR * typical)


def _errors(found: Array, expected: Array) -> Errors:
    with np.errstate(invalid="ignore", over="ignore"):
        wide = found.astype(np.float64)
        difference = differences(wide, expected)
        difference[~np.isfinite(difference)] = np.nan
        sized = without_ruled_out(expected)
        return Errors(
            difference.max(0, initial=0),
            np.nansum(wide * sized, axis=0),
            np.square(sized).sum(0),
            float(np.square(difference).sum()),
        )
