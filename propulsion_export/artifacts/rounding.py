"""The numpy types of a manifest's dtypes, and rounding float64 to one of them once.

torch and ml_dtypes go from float64 to a 16-bit type by way of float32, which rounds twice: a value
just beside the middle of two neighbours can fall onto it and then to the wrong side. Rounding the
first step to odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008) keeps
the knowledge that something was cut off, and makes the second step the only rounding.
"""

from typing import Any

import numpy as np
import numpy.typing as npt


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type of a manifest's dtype; bfloat16 comes from ml_dtypes."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def rounded(values: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Float64 values, any shape, as `dtype`, each the nearest there is; ties to even."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.dtype(dtype).itemsize < np.dtype(np.float32).itemsize
        return (rounded_to_odd(values) if narrow else values).astype(dtype)


def rounded_to_odd(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Float64 values as float32; of an inexact one the last bit is set.

    From here, any conversion to a 16-bit type rounds as if it came from float64.
    """
    wide = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        nearest = wide.astype(np.float32)
    finite = np.isfinite(wide)
    bits = nearest.view(np.int32)
    # Towards zero first, then odd: the neighbour that the even rounding did not choose is seen.
    bits = bits - (finite & (np.abs(nearest.astype(np.float64)) > np.abs(wide)))
    bits = bits | (finite & (nearest.astype(np.float64) != wide))
    odd: npt.NDArray[np.float32] = bits.astype(np.int32).view(np.float32)
    return odd
