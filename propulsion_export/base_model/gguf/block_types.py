"""How the quantised types of GGUF store a block of numbers.

Each block has one float16 scale, some a float16 minimum; smaller integer scales of parts of it
(K-quants, IQ4_XS); and quants, a few bits a number. Reference: ggml-common.h of ggml-org/ggml.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """One type.

    Attributes:
        floats: the bytes in a block where its float16 numbers begin; every number of the block is
            proportional to them. Empty if its scales have another form.
        scales: ranges of the bytes that hold scales of any form; all others are quants. None for a
            code book, whose quants are numbers of entries.
        span: how many steps lie between the numbers whose quants are all zeros and all ones; for
            levels that are not evenly spaced, in units of their widest gap.
        largest: the magnitude of the block's largest number, in the same steps.
    """

    floats: tuple[int, ...]
    scales: tuple[tuple[int, int], ...] | None
    span: float = 1.0
    largest: float = 1.0


_CODE_BOOK = BlockType((0,), None, largest=8.0)
# By the names of the package gguf.
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType((0,), ((0, 2),), 15, 8),
    "Q4_1": BlockType((0, 2), ((0, 4),), 15, 15),
    "Q5_0": BlockType((0,), ((0, 2),), 31, 16),
    "Q5_1": BlockType((0, 2), ((0, 4),), 31, 31),
    "Q8_0": BlockType((0,), ((0, 2),), 1, 127),  # all ones are -1
    "Q2_K": BlockType((80, 82), ((0, 16), (80, 84)), 3, 3),
    "Q3_K": BlockType((108,), ((96, 110),), 7, 4),
    "Q4_K": BlockType((0, 2), ((0, 16),), 15, 15),
    "Q5_K": BlockType((0, 2), ((0, 16),), 31, 31),
    "Q6_K": BlockType((208,), ((192, 210),), 63, 32),
    # Levels from -127 to 113, at most 24 apart.
    "IQ4_NL": BlockType((0,), ((0, 2),), 10, 5.3),
    "IQ4_XS": BlockType((0,), ((0, 8),), 10, 5.3),
    "IQ1_S": _CODE_BOOK,
    "IQ2_XXS": _CODE_BOOK,
    "IQ2_XS": _CODE_BOOK,
    "IQ2_S": _CODE_BOOK,
    "IQ3_XXS": _CODE_BOOK,
    "IQ3_S": _CODE_BOOK,
    "TQ1_0": BlockType((52,), ((52, 54),), 2, 1),
    "TQ2_0": BlockType((64,), ((64, 66),), 3, 1),
    # 4-bit floats: all ones are -12, and the widest gap is 4. Scales of eight bits.
    "MXFP4": BlockType((), ((0, 1),), 3, 3),
    "NVFP4": BlockType((), ((0, 4),), 3, 3),
}
