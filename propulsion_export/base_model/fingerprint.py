"""Recognise a base model by a few of its weights.

An adapter belongs to the model it was trained on, not to another of the same shape. A fingerprint
keeps a few entries of up to 64 weight matrices and of up to 64 vectors, norms before biases. They
are chosen by the hash of their names, so that the cost does not grow with the model, and so that a
model with one matrix more or less (a pooling layer) has nearly the same ones. Entries are compared
within the rounding of the coarser of the two dtypes, because the same model may be loaded in fp32
at one time and in bf16 at another.
"""

import hashlib
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_CHOSEN = 64  # matrices, and as many vectors
_ENTRIES = 8
# Relative rounding errors; a value may have been rounded twice (fp32 -> fp16 -> bf16).
_ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# float16's step below its normal range; bfloat16 values may have been float16 before.
_SMALLEST = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-24, "bfloat16": 2.0**-24}
# The share of quantised entries that may be more than a step away. llama.cpp's quantisers leave up
# to 0.05 of random weights with outliers there (Q2_K with an importance matrix), mostly below 0.01;
# of another model's weights 0.8 are for four bits, 0.5 for two.
_BEYOND_GRID = 1 / 16


@dataclass(frozen=True)
class Fingerprint:
    """A few entries of a base model's weights.

    Attributes:
        dtype: the weights' floating-point dtype, such as `float32`.
        entries: 8 entries spread over each matrix, by weight name without the head model's prefix.
        vectors: the same of norms and biases; empty in fingerprints of earlier versions.
        steps: by the name of a quantised weight, how far apart the values are that its grid has at
            each of its entries.
    """

    dtype: str
    entries: Mapping[str, tuple[float, ...]]
    vectors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    steps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Mapping[str, Any]) -> "Fingerprint":
        """Take the fingerprint of weights by name, torch tensors or numpy arrays of any dtype.

        Only matrices and vectors are used, and none of a `pooler`, which may be random. The caller
        leaves out heads. A quantised weight has `step(place)`, the step of its grid at an entry.
        """
        usable = {
            name: weight
            for name, weight in weights.items()
            if 0 not in weight.shape and not name.startswith("pooler.")
        }
        matrices, vectors = (
            {name: weight for name, weight in usable.items() if len(weight.shape) == axes}
            for axes in (2, 1)
        )
        # A norm is only in its vectors; a bias belongs to a matrix, which shows a change as well.
        names = sorted(_by_hash(matrices)[:_CHOSEN])
        others = _by_hash(vectors)
        others.sort(key=lambda name: not name.endswith("weight"))
        others = sorted(others[:_CHOSEN])
        dtypes = {str(usable[name].dtype).removeprefix("torch.") for name in (*names, *others)}
        coarsest = max(dtypes, key=lambda dtype: _ROUNDING.get(dtype, 0.0), default="float32")
        entries, more = ({name: _sample(usable[name]) for name in each} for each in (names, others))
        steps = {name: _steps(usable[name]) for name in names if hasattr(usable[name], "step")}
        steps = {name: row for name, row in steps.items() if any(row)}  # the others are floats
        return cls(coarsest, entries, more, steps)

    def difference(self, other: "Fingerprint") -> str | None:
        """Where two fingerprints differ beyond rounding; None if the base model is the same."""
        common = self.entries.keys() & other.entries.keys()
        needed = max(1, 3 * min(len(self.entries), len(other.entries)) // 4)
        if len(common) < needed:
            missing = sorted(self.entries.keys() ^ other.entries.keys())
            return f"the weight matrices have other names ({missing[0] if missing else 'none'}, …)"
        rounding = self._rounding_between(other)
        steps = [one.steps for one in (self, other) if one.steps]
        return _differing(self.entries, other.entries, *rounding, steps) or _differing(
            self.vectors, other.vectors, *rounding
        )

    def _rounding_between(self, other: "Fingerprint") -> tuple[float, float]:
        """The relative and the absolute rounding by which the same base model may differ.

        Two models in float32 of which one was rounded before differ by that rounding; if both
        were, to the same dtype, not even by that.
        """
        each = [_rounded_to(one.entries, one.dtype) for one in (self, other)]
        coarser = max(each, key=_relative)
        loaded = max(self.dtype, other.dtype, key=_relative)
        relative = _relative(loaded if each[0] == each[1] else coarser)
        return relative, _SMALLEST.get(coarser, 0.0)

    def without(self, names: Collection[str]) -> "Fingerprint":
        """The fingerprint without weights of these names, which may have a head model's prefix."""
        entries, vectors = (
            {
                name: values
                for name, values in kept.items()
                if not any(other == name or other.endswith(f".{name}") for other in names)
            }
            for kept in (self.entries, self.vectors)
        )
        return replace(self, entries=entries, vectors=vectors)  # steps of others do no harm

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values."""
        kept = {"entries": self.entries, "vectors": self.vectors, "steps": self.steps}
        return {"dtype": self.dtype} | {
            kind: {name: list(values) for name, values in each.items()}
            for kind, each in kept.items()
            if each or kind == "entries"
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """Convert the result of `to_json` back.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the value is not a fingerprint.
        """
        entries = _rows(value["entries"])
        vectors, steps = (_rows(value.get(kind, {})) for kind in ("vectors", "steps"))
        if not isinstance(value["dtype"], str):
            raise TypeError(f"dtype is {value['dtype']!r}, expected a name")
        return cls(value["dtype"], entries, vectors, steps)


def _relative(dtype: str) -> float:
    return _ROUNDING.get(dtype, 2.0**-7)


def _rounded_to(entries: Mapping[str, tuple[float, ...]], dtype: str) -> str:
    """The dtype that matrices were rounded to before they got this one: float32 holds any of them.

    A GGUF file of bfloat16 matrices has vectors in float32, and is loaded in float32.
    """
    values = [value for row in entries.values() for value in row]
    if dtype != "float32" or not any(values):
        return dtype
    for coarser, is_one in (("bfloat16", _is_bfloat16), ("float16", _is_float16)):
        if all(map(is_one, values)):
            return coarser
    return dtype


def _is_bfloat16(value: float) -> bool:
    return math.isfinite(value) and struct.pack("<f", value)[:2] == b"\0\0"


def _is_float16(value: float) -> bool:
    try:
        return bool(struct.unpack("<e", struct.pack("<e", value))[0] == value)
    except OverflowError:
        return False


def _by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _differing(
    recorded: Mapping[str, tuple[float, ...]],
    found: Mapping[str, tuple[float, ...]],
    relative: float,
    absolute: float,
    steps: Sequence[Mapping[str, tuple[float, ...]]] = (),
) -> str | None:
    """The first entry, of the weights in both, that differs beyond rounding.

    A quantised weight is about a step of its grid away from what it was. Of quantised entries a
    few may be further: quantisers cut off outliers, and more where they weigh some columns higher.
    """
    exact = (0.0,) * _ENTRIES
    further, quantised = list[str](), 0
    for name in sorted(recorded.keys() & found.keys()):
        grid = [sum(each) for each in zip(*(s.get(name, exact) for s in steps), strict=True)]
        quantised += sum(step > 0 for step in grid)
        for place, (ours, theirs) in enumerate(zip(recorded[name], found[name], strict=True)):
            # The comparison is false for NaN and infinity, which count as a difference.
            if not math.isfinite(theirs):
                return f"{name} holds {theirs}, expected finite weights"
            largest, step = max(abs(ours), abs(theirs)), grid[place] if grid else 0.0
            if abs(ours - theirs) <= relative * largest + absolute + step < math.inf:
                continue
            said = f"{name} holds {theirs:.6g} where {ours:.6g} was recorded"
            if not any(grid) or not math.isfinite(ours):
                return said
            further.append(said)
    return further[0] if len(further) > quantised * _BEYOND_GRID else None


def _rows(value: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    rows = {str(name): tuple(map(_number, entries)) for name, entries in value.items()}
    if any(len(row) != _ENTRIES for row in rows.values()):
        raise ValueError(f"expected {_ENTRIES} entries a weight")
    return rows


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"an entry is {value!r}, expected a number")
    if isinstance(value, int) and abs(value) > 2**1023:
        raise ValueError("an entry is beyond every float")
    return float(value)


def _places(weight: Any) -> list[tuple[int, ...]]:
    """8 places in a matrix or vector, in equal steps over its elements."""
    last = math.prod(weight.shape) - 1
    positions = [index * last // (_ENTRIES - 1) for index in range(_ENTRIES)]
    columns = weight.shape[-1]
    return [(p,) if len(weight.shape) == 1 else divmod(p, columns) for p in positions]


def _sample(weight: Any) -> tuple[float, ...]:
    """The entries of a matrix or vector at its places, as Python floats."""
    return tuple(float(weight[place]) for place in _places(weight))


def _steps(weight: Any) -> tuple[float, ...]:
    """How far apart the values of a quantised weight's grid are at its places."""
    return tuple(float(weight.step(place)) for place in _places(weight))
