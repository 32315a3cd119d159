"""Scales of eight bits times factors, where the product is one of them: MXFP4 and NVFP4."""

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.tensor_files import Array

Bytes = npt.NDArray[np.uint8]
# How many bytes of scales begin a block.
EXACT = {"MXFP4": 1, "NVFP4": 4}


def exact_scales(
    content: Bytes, factors: Array, kind: str
) -> tuple[Bytes, tuple[int, int, float, str] | None]:
    """Blocks [rows, blocks, bytes] whose scales are multiplied by factors [rows, 1].

    Returns:
        The blocks, and what `Lost` says of the first scale whose product is none that the type has;
        that one stays as it is.
    """
    count, values = EXACT[kind], _values(kind)
    order = np.argsort(values, kind="stable")
    stored = values[content[..., :count]]
    products = stored * factors[..., None]
    found = np.minimum(np.searchsorted(values[order], products), values.size - 1)
    numbers = order[found].astype(np.uint8)
    same = np.broadcast_to(factors[..., None] == 1, products.shape)
    held = (values[numbers] == products) | same
    changed = content.copy()
    changed[..., :count] = np.where(held & ~same, numbers, content[..., :count])
    if held.all():
        return changed, None
    row, block, part = (int(index) for index in np.argwhere(~held)[0])
    return changed, (row, block, float(products[row, block, part]), f"is no scale that {kind} has")


def _values(kind: str) -> Array:
    """The value of each byte, float64 [256]; NaN for one that means none."""
    number = np.arange(256)
    if kind == "MXFP4":  # a power of two; 255 is NaN
        return np.where(number == 255, np.nan, 2.0 ** (number - 128.0))
    exponent, fraction = (number >> 3) & 15, (number & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    return np.where(number < 0x7F, values, np.nan)
