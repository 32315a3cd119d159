"""Read single integers out of packed words, without reading a whole tensor."""

from collections.abc import Callable

from propulsion_export.base_model.tensor_files import StoredTensor

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
