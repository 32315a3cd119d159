"""Recognise a base model by a few of its weights.

An adapter belongs to the model it was trained on, not to another of the same shape. A fingerprint
keeps a few entries of up to 64 weight matrices. They are chosen by the hash of their names, so that
the cost does not grow with the model, and so that a model with one matrix more or less (a pooling
layer) has nearly the same ones. Entries are compared within the rounding of the coarser of the two
dtypes, because the same model may be loaded in fp32 at one time and in bf16 at another.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_MATRICES = 64
_ENTRIES = 8
# Relative rounding errors; a value may have been rounded twice (fp32 -> fp16 -> bf16).
_ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# float16's step below its normal range; bfloat16 values may have been float16 before.
_SMALLEST = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-24, "bfloat16": 2.0**-24}


@dataclass(frozen=True)
class Fingerprint:
    """A few entries of a base model's weight matrices.

    Attributes:
        dtype: the weights' floating-point dtype, such as `float32`.
        entries: 8 entries spread over each matrix, by weight name without the head model's prefix.
    """

    dtype: str
    entries: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, weights: Mapping[str, Any]) -> "Fingerprint":
        """Take the fingerprint of weights by name, torch tensors or numpy arrays of any dtype.

        Only matrices are used, and none of a `pooler`, which may be random. The caller leaves out
        heads.
        """
        matrices = {
            name: weight
            for name, weight in weights.items()
            if len(weight.shape) == 2 and 0 not in weight.shape and not name.startswith("pooler.")
        }
        by_hash = sorted(matrices, key=lambda name: hashlib.sha256(name.encode()).digest())
        chosen = sorted(by_hash[:_MATRICES])
        dtypes = {str(matrices[name].dtype).removeprefix("torch.") for name in chosen}
        coarsest = max(dtypes, key=lambda dtype: _ROUNDING.get(dtype, 0.0), default="float32")
        return cls(coarsest, {name: _sample(matrices[name]) for name in chosen})

    def difference(self, other: "Fingerprint") -> str | None:
        """Where two fingerprints differ beyond rounding; None if the base model is the same."""
        common = self.entries.keys() & other.entries.keys()
        needed = max(1, 3 * min(len(self.entries), len(other.entries)) // 4)
        if len(common) < needed:
            missing = sorted(self.entries.keys() ^ other.entries.keys())
            return f"the weight matrices have other names ({missing[0] if missing else 'none'}, …)"
        coarser = max(self.dtype, other.dtype, key=lambda dtype: _ROUNDING.get(dtype, 0.0))
        relative, absolute = _ROUNDING.get(coarser, 2.0**-7), _SMALLEST.get(coarser, 0.0)
        for name in sorted(common):
            for ours, theirs in zip(self.entries[name], other.entries[name], strict=True):
                # The comparison is false for NaN and infinity, which count as a difference.
                largest = max(abs(ours), abs(theirs))
                if not abs(ours - theirs) <= relative * largest + absolute < math.inf:
                    return f"{name} holds {theirs:.6g} where {ours:.6g} was recorded"
        return None

    def without(self, names: Collection[str]) -> "Fingerprint":
        """The fingerprint without weights of these names, which may have a head model's prefix."""
        kept = {
            name: values
            for name, values in self.entries.items()
            if not any(other == name or other.endswith(f".{name}") for other in names)
        }
        return Fingerprint(self.dtype, kept)

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values."""
        return {"dtype": self.dtype, "entries": {n: list(v) for n, v in self.entries.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """Convert the result of `to_json` back.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the value is not a fingerprint.
        """
        entries = {
            str(name): tuple(_number(entry) for entry in entries)
            for name, entries in value["entries"].items()
        }
        if any(len(row) != _ENTRIES for row in entries.values()):
            raise ValueError(f"expected {_ENTRIES} entries a matrix")
        if not isinstance(value["dtype"], str):
            raise TypeError(f"dtype is {value['dtype']!r}, expected a name")
        return cls(value["dtype"], entries)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"an entry is {value!r}, expected a number")
    if isinstance(value, int) and abs(value) > 2**1023:
        raise ValueError("an entry is beyond every float")
    return float(value)


def _sample(weight: Any) -> tuple[float, ...]:
    """8 entries of a matrix, in equal steps over its elements, as Python floats."""
    rows, columns = weight.shape
    positions = [index * (rows * columns - 1) // (_ENTRIES - 1) for index in range(_ENTRIES)]
    return tuple(float(weight[position // columns, position % columns]) for position in positions)
