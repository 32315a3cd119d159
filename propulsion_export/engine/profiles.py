"""Optimization profiles: for which shapes an engine is built, and for which it is best.

Symbolic dimensions are what counts: every input that shares one gets the same range, so that
shapes given for one input are enough for the others. A range is a triple min, opt, max.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import ADAPTERS_DIMENSION, BANK_INPUT
from propulsion_export.base_model.positions import known_positions
from propulsion_export.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]
Range = tuple[int, int, int]
Profile = dict[str, dict[str, list[int]]]

LEVELS = ("min", "opt", "max")
_OPTIONS = ("--min-shapes", "--opt-shapes", "--max-shapes")
_BATCH: Range = (1, 8, 32)
_LENGTH = 512  # the longest default sequence
_CACHED_LENGTH = 2048  # the same of a decoder with a cache
_TYPICAL = 128
_ADAPTERS: Range = (1, 64, 16384)
_LARGEST = 2**31 - 1  # elements of a tensor in TensorRT


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Read trtexec's syntax: `input_ids:1x8,attention_mask:1x8`.

    Raises:
        UsageError: an item is not `NAME:NUMBERxNUMBER…`, or a name comes twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    wrong = []
    for item in text.split(","):
        # From the right: names may hold colons, shapes may not.
        found = re.fullmatch(r"(.+):(\d+(?:x\d+)*)", item.strip())
        if not found:
            wrong.append(f"shapes: found {item!r}, expected NAME:1x8")
        elif found[1] in shapes:
            wrong.append(f"shapes: found {found[1]!r} twice, expected one shape an input")
        else:
            shapes[found[1]] = tuple(int(size) for size in found[2].split("x"))
    if wrong:
        raise UsageError(*wrong, remedy="Write NAME:1x8,OTHER:4x128 with the shapes in numbers.")
    return shapes


def longest_sequence(settings: Mapping[str, Any]) -> int | None:
    """The longest sequence the model of this config.json has positions for; None: unknown."""
    parts = (settings, settings.get("text_config") or {})
    known = (known_positions(SimpleNamespace(**part)) for part in parts)
    return next((count for count in known if count is not None), None)


def choose_profiles(
    inputs: Sequence[TensorSpec], given: Sequence[Shapes], longest: int | None
) -> tuple[Profile, ...]:
    """Choose min, opt and max for every input with a symbolic dimension.

    What is not given is filled in: a batch (a symbolic first axis) is 1 / 8 / 32, a sequence
    1 / 128 / min(512, `longest`), and the rows of a bank 1 / 64 / 16384, or fewer of wide adapters,
    since a tensor has at most 2^31 - 1 elements. A default never contradicts a given shape: it
    moves out of its way.

    A decoder with a cache has three profiles up to L = min(2048, `longest`): prefill, up to L
    tokens behind an empty past; decoding, one token behind up to L - 1; and several tokens behind a
    past, up to half of L each. One for all of them would be best at none, and as its largest
    shapes are the largest past with the largest prompt, need far more memory. With shapes given
    there is one profile: what they leave of L, at least half of it, and an empty past.

    Args:
        inputs: of the graph.
        given: by input name, the shapes for min, opt and max; each may be empty.
        longest: the longest sequence the model can take, if known.

    Returns:
        Profiles in that order; none when nothing varies.

    Raises:
        UsageError: an unknown input, a wrong rank, a fixed dimension changed, two values for one
            dimension, min > opt or opt > max, a sequence or past longer than `longest`, or a total
            that is not past and sequence together.
    """
    roles = {
        size: _role(size, axis)
        for spec in inputs
        for axis, size in reversed(list(enumerate(spec.shape)))
        if isinstance(size, str)
    }
    _check_fit(inputs, given)
    values = [_values(inputs, *level) for level in zip(given, _OPTIONS, strict=True)]
    chosen = []
    for defaults in _defaults(roles, values, longest) if roles else ():
        ranges = {
            symbol: _filled([level.get(symbol) for level in values], defaults[role])
            for symbol, role in roles.items()
            if role != "total"
        }
        _fit_bank_(inputs, ranges, given)
        _check_ranges(roles, ranges, longest)
        total = _sum(roles, ranges)
        _check_totals(roles, values, total)
        ranges |= {symbol: total for symbol, role in roles.items() if role == "total"}
        chosen.append(_profile(inputs, ranges))
    return tuple(chosen)


def _profile(inputs: Sequence[TensorSpec], ranges: Mapping[str, Range]) -> Profile:
    return {
        spec.name: {
            level: [size if isinstance(size, int) else ranges[size][index] for size in spec.shape]
            for index, level in enumerate(LEVELS)
        }
        for spec in inputs
        if any(isinstance(size, str) for size in spec.shape)
    }


def _role(symbol: str, axis: int) -> str:
    if symbol == ADAPTERS_DIMENSION:
        return "adapters"
    if axis == 0:
        return "batch"
    if "+" in symbol or "total" in symbol:
        return "total"  # past and new tokens together: the width of a decoder's attention mask
    return "past" if "past" in symbol else "sequence"


def _defaults(
    roles: Mapping[str, str], values: Sequence[Mapping[str, int]], longest: int | None
) -> list[dict[str, Range]]:
    """For each profile, the range of each role."""
    if "past" not in roles.values():
        length = min(_LENGTH, longest or _LENGTH)
        return [_ranges(length, (0, 0, 0))]
    length = min(_CACHED_LENGTH, longest or _CACHED_LENGTH)
    half = length // 2
    if not any(values):
        return [
            _ranges(length, (0, 0, 0)),
            _ranges(1, (1, half, length - 1)),
            _ranges(length - half, (1, (half + 1) // 2, half)),
        ]
    most = {roles[symbol]: value for symbol, value in values[-1].items()}
    past = most.get("past", max(half, length - most.get("sequence", length)))
    sequence = most.get("sequence", max(length - half, length - past))
    return [_ranges(sequence, (0, past // 2, past))]


def _fit_bank_(
    inputs: Sequence[TensorSpec], ranges: dict[str, Range], given: Sequence[Shapes]
) -> None:
    """Let the default bank of wide adapters hold fewer of them, as large as a tensor may be."""
    bank = next((spec for spec in inputs if spec.name == BANK_INPUT), None)
    if bank is None or any(BANK_INPUT in shapes for shapes in given):
        return
    most = max(1, _LARGEST // int(bank.shape[1]))
    low, typical, high = ranges[ADAPTERS_DIMENSION]
    ranges[ADAPTERS_DIMENSION] = (low, min(typical, most), min(high, most))


def _ranges(sequence: int, past: Range) -> dict[str, Range]:
    return {
        "batch": _BATCH,
        "sequence": (1, min(_TYPICAL, sequence), sequence),
        "past": past,
        "adapters": _ADAPTERS,
    }


def _sum(roles: Mapping[str, str], ranges: Mapping[str, Range]) -> Range:
    """The range of past and sequence together, from the first of each."""
    parts: dict[str, Range] = {}
    for symbol, values in ranges.items():
        parts.setdefault(roles[symbol], values)
    zero = (0, 0, 0)
    low, typical, high = (
        past + new
        for past, new in zip(parts.get("past", zero), parts.get("sequence", zero), strict=True)
    )
    return low, typical, high


def _filled(given: Sequence[int | None], default: Range) -> Range:
    known = [value for value in given if value is not None]
    low = given[0] if given[0] is not None else min([default[0], *known])
    high = given[2] if given[2] is not None else max([default[2], *known])
    typical = given[1] if given[1] is not None else min(max(default[1], low), high)
    return low, typical, high


def _check_fit(inputs: Sequence[TensorSpec], given: Sequence[Shapes]) -> None:
    specs = {spec.name: spec for spec in inputs}
    wrong = [
        f"{option}: {misfit}"
        for shapes, option in zip(given, _OPTIONS, strict=True)
        for name, shape in shapes.items()
        if (misfit := _misfit(name, shape, specs))
    ]
    if wrong:
        raise UsageError(*wrong, remedy="`propulsion-export inspect` shows the inputs.")


def _misfit(name: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> str:
    if name not in specs:
        return f"found the input {name!r}, expected one of {', '.join(specs)}"
    expected = specs[name].shape
    fits = len(shape) == len(expected) and all(
        isinstance(size, str) or size == value for value, size in zip(shape, expected, strict=True)
    )
    shown = "x".join(str(value) for value in shape)
    return "" if fits else f"found {name}:{shown}, expected {'x'.join(map(str, expected))}"


def _values(inputs: Sequence[TensorSpec], shapes: Shapes, option: str) -> dict[str, int]:
    """What one option says about each symbolic dimension."""
    values: dict[str, int] = {}
    wrong = []
    for spec, symbol, value in _named_sizes(inputs, shapes):
        if values.setdefault(symbol, value) != value:
            wrong.append(
                f"{option}: found {symbol} {value} in {spec.name}, expected {values[symbol]} as in "
                "the inputs before it"
            )
    if wrong:
        raise UsageError(*wrong, remedy="Inputs that share a dimension must agree on it.")
    return values


def _named_sizes(
    inputs: Sequence[TensorSpec], shapes: Shapes
) -> Iterator[tuple[TensorSpec, str, int]]:
    for spec in inputs:
        for size, value in zip(spec.shape, shapes.get(spec.name, ()), strict=False):
            if isinstance(size, str):
                yield spec, size, value


def _check_ranges(
    roles: Mapping[str, str], ranges: Mapping[str, Range], longest: int | None
) -> None:
    wrong = []
    for symbol, (low, typical, high) in ranges.items():
        smallest = 0 if roles[symbol] == "past" else 1
        if not smallest <= low <= typical <= high:
            wrong.append(
                f"shapes: found {symbol} min {low}, opt {typical}, max {high}, "
                f"expected {smallest} <= min <= opt <= max"
            )
        if longest is not None and roles[symbol] in ("sequence", "past") and high > longest:
            wrong.append(
                f"--max-shapes: found {symbol} {high}, expected at most {longest}, "
                "the positions the model has"
            )
    if wrong:
        raise UsageError(*wrong)


def _check_totals(
    roles: Mapping[str, str], values: Sequence[Mapping[str, int]], total: Range
) -> None:
    """TensorRT would only warn, of an engine that no input of the largest shape fits."""
    wrong = [
        f"{option}: found {symbol} {value}, expected {expected}, past and sequence together"
        for level, option, expected in zip(values, _OPTIONS, total, strict=True)
        for symbol, value in level.items()
        if roles[symbol] == "total" and value != expected
    ]
    if wrong:
        raise UsageError(*wrong, remedy="Leave it out, or give shapes of the past too.")
