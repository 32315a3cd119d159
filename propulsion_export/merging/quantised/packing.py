"""Weights packed into words of 32 bits, as GPTQ and AWQ store them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.merging.changes import Change
from propulsion_export.merging.quantised.scales import scaled_scales

_WORD = 32  # bits


def packed_value(
    words: StoredTensor, place: Callable[[int], tuple[int, ...]], index: int, bits: int
) -> int:
    """The unsigned integer at `index` of a line of integers that are packed without gaps.

    Args:
        words: int32; the first integer is in the lowest bits of its line's first word.
        place: where in `words` the word of a number in the line is.
        index: which integer of the line.
        bits: the width of each; one may lie in two words.
    """
    number, shift = divmod(index * bits, _WORD)
    value = _word(words, place(number)) >> shift
    if shift + bits > _WORD:
        value |= _word(words, place(number + 1)) << (_WORD - shift)
    return value & ((1 << bits) - 1)


def _word(words: StoredTensor, place: tuple[int, ...]) -> int:
    return int(words[place]) & 0xFFFFFFFF


@dataclass(frozen=True)
class PackedColumns:
    """What GPTQ and AWQ have in common: packed `qweight`, and `scales` [groups, outputs].

    Attributes:
        config: the checkpoint's `quantization_config`.
        tensors: the checkpoint's tensors by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def has(self, path: str) -> bool:
        """See `Layout`."""
        return f"{path}.qweight" in self.tensors

    def scaled(self, path: str, scale: Array) -> Mapping[str, Change]:
        """See `Layout`."""
        name = f"{path}.scales"
        return scaled_scales(path, name, self.tensors[name], scale, axis=1)

    def unscaled(self, path: str) -> Mapping[str, Change]:
        """See `Layout`."""
        return {}

    def settings(self) -> Mapping[str, Any]:
        """See `Layout`."""
        return self.config
