"""The numpy types of a manifest's dtypes, and a single rounding from float64 to them.

torch and ml_dtypes convert float64 to a 16-bit type through float32, which rounds twice: a value
close to the midpoint of two neighbours can be rounded to the midpoint and then to the wrong side.
Rounding to odd in the first step (Boldo and Melquiond, "Emulation of FMA and correctly rounded
sums", 2008) records that the value was inexact, so that the second step rounds correctly.
"""

from typing import Any

import numpy as np
import numpy.typing as npt


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type of a manifest's dtype; bfloat16 comes from ml_dtypes."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def rounded(values: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Float64 values of any shape, rounded to the nearest values of `dtype`, ties to even."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.dtype(dtype).itemsize < np.dtype(np.float32).itemsize
        return (rounded_to_odd(values) if narrow else values).astype(dtype)


def rounded_to_odd(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Float64 values as float32 with the last bit set where the conversion is inexact.

    A conversion from here to a 16-bit type rounds as one from float64 would.
    """
    wide = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        nearest = wide.astype(np.float32)
    finite = np.isfinite(wide)
    bits = nearest.view(np.int32)
    # Truncate towards zero, then set the last bit.
    bits = bits - (finite & (np.abs(nearest.astype(np.float64)) > np.abs(wide)))
    bits = bits | (finite & (nearest.astype(np.float64) != wide))
    odd: npt.NDArray[np.float32] = bits.astype(np.int32).view(np.float32)
    return odd
