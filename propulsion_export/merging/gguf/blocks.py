"""Rows of a GGUF tensor times their factors, on the bytes of the file.

Of a quantised block only the float16 numbers change, that every number of the block is proportional
to: each is multiplied in float64 and rounded once. The quants stay byte for byte.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.gguf.block_types import BLOCK_TYPES
from propulsion_export.base_model.tensor_files import Array
from propulsion_export.merging.gguf.small_floats import EXACT, exact_scales

# The numpy types of the plain types.
FLOATS: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
# A rounded scale may move the largest number of its block by this share of a step of the grid.
_TOLERATED = 1 / 8
_HALF = np.dtype("<f2")
_LARGEST = {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}
_LARGEST |= {"F64": np.finfo(np.float64).max}
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Lost:
    """A number that its type cannot hold.

    Attributes:
        row: which row it is in, or is, of those given.
        block: which block of the row; the column of plain numbers.
        product: what it would be.
        problem: what is wrong with that, for a message.
    """

    row: int
    block: int
    product: float
    problem: str


def can_scale_rows(kind: str) -> bool:
    """Whether rows of a quantised type can be multiplied, at least by some factors."""
    return kind in EXACT or bool(kind in BLOCK_TYPES and BLOCK_TYPES[kind].floats)


def scaled_rows(content: Bytes, factors: Array, kind: str) -> tuple[Bytes, Lost | None]:
    """Rows times their factors.

    Args:
        content: the bytes of the rows, [rows, bytes] of plain numbers, [rows, blocks, bytes] of a
            quantised type.
        factors: float64 [rows, 1]; for plain numbers also [1, columns].
        kind: the type's name.

    Returns:
        The bytes to write, and the first number that the type cannot hold; in its place stands the
        nearest that it can.
    """
    if kind in FLOATS:
        return _scaled_floats(content, factors, kind)
    if kind in EXACT:
        scales, lost = exact_scales(content, factors, kind)
        return scales, None if lost is None else Lost(*lost)
    return _scaled_blocks(content, factors, kind)


def plain_rows(values: Array, kind: str) -> tuple[Bytes, Lost | None]:
    """New numbers [rows, columns], float64, in a plain type; returns as `scaled_rows`."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = kind == "BF16"  # numpy rounds to the others once
        numbers = rounded(values, FLOATS[kind]) if narrow else values.astype(FLOATS[kind])
    finite = np.isfinite(numbers)
    lost = None
    if not finite.all():
        row, column = (int(index) for index in np.argwhere(~finite)[0])
        lost = Lost(row, column, float(values[row, column]), f"is beyond {kind}")
        limit = np.clip(np.nan_to_num(values), -_LARGEST[kind], _LARGEST[kind])
        numbers = np.where(finite, numbers, limit.astype(FLOATS[kind]))
    return np.ascontiguousarray(numbers).view(np.uint8), lost


def _scaled_floats(content: Bytes, factors: Array, kind: str) -> tuple[Bytes, Lost | None]:
    return plain_rows(content.view(FLOATS[kind]).astype(np.float64) * factors, kind)


def _scaled_blocks(content: Bytes, factors: Array, kind: str) -> tuple[Bytes, Lost | None]:
    changed, first = content.copy(), None
    for offset in BLOCK_TYPES[kind].floats:
        place = np.s_[:, :, offset : offset + _HALF.itemsize]
        halves = np.ascontiguousarray(content[place]).view(_HALF)[..., 0]
        products = halves.astype(np.float64) * factors
        numbers, lost = _halves(products, BLOCK_TYPES[kind].largest)
        changed[place] = numbers[..., None].view(np.uint8)
        first = first or lost
    return changed, first


def _halves(products: Array, largest: float) -> tuple[Array, Lost | None]:
    """Products as float16, rounded once; `largest` as in `BlockType`."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        numbers = products.astype(_HALF)
        off = np.abs(numbers.astype(np.float64) - products) * largest
        # False for NaN and infinity too.
        held = off <= np.maximum(_TOLERATED, largest * 2.0**-11) * np.abs(products)
    if held.all():
        return numbers, None
    row, block = (int(index) for index in np.argwhere(~held)[0])
    product = float(products[row, block])
    inside = np.isfinite(products)
    limit = np.where(inside, np.clip(products, -_LARGEST["F16"], _LARGEST["F16"]), products)
    few = "loses precision below the range of float16"
    problem = few if abs(product) < 1 else "is beyond float16"
    return limit.astype(_HALF), Lost(row, block, product, problem)
