"""Multiply the scales of quantised weights: the only values of theirs that a merge changes."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.changes import Change, Scaled

_REMEDY = "Merge into the checkpoint that is not quantised, then quantise it."


def scaled_scales(
    path: str, name: str, stored: StoredTensor, scale: Array, *, axis: int = 0
) -> Mapping[str, Change]:
    """The change of a tensor of quantisation scales whose module's outputs are multiplied.

    Args:
        path: of the module, for messages.
        name: of the tensor.
        stored: the quantisation scales, float32, float16 or bfloat16, of one or two axes.
        scale: float64 [outputs].
        axis: the tensor's axis of outputs.

    Returns:
        Nothing if not one value changes.

    Raises:
        AdapterError: a product leaves the range that `stored`'s dtype holds with full precision.
        BaseModelError: the tensor has no scale for each output.
    """
    if not stored.shape or stored.shape[axis] != len(scale):
        raise BaseModelError(
            f"{name}: has shape {list(stored.shape)}, expected {len(scale)} outputs in axis {axis}"
        )
    factors = _along(scale, len(stored.shape), axis)
    values = stored.read()
    if np.array_equal(rounded_products(path, values, factors, axis=axis), values):
        return {}
    return {name: Scaled(stored, factors)}


def rounded_products(path: str, values: Array, factors: Array, *, axis: int = 0) -> Array:
    """Products in float64, rounded once to the dtype of `values`.

    Args:
        path: of the module, for messages.
        values: quantisation scales.
        factors: float64, to be broadcast with `values`.
        axis: the axis of outputs, for messages.

    Raises:
        AdapterError: a product overflows, or is below the normal numbers and not held exactly.
    """
    products = values.astype(np.float64) * factors
    narrow = rounded(products, values.dtype)
    # Rounding errs by at most half of eps, relatively, as long as the result is a normal number.
    allowed = np.abs(products) * _eps(values.dtype) / 2
    lost = ~(np.abs(narrow.astype(np.float64) - products) <= allowed)
    if lost.any():
        raise AdapterError(
            _out_of_range(path, products, lost, values.dtype.name, axis), remedy=_REMEDY
        )
    return narrow


def exact_products(path: str, values: Array, factors: Array) -> Array:
    """Products of quantisation scales in a type that holds no sign and few values.

    Args:
        path: of the module, for messages.
        values: quantisation scales, float8.
        factors: float64, to be broadcast with `values`.

    Raises:
        BaseModelError: a product is negative, or is no value of the type of `values`.
    """
    products = values.astype(np.float64) * factors
    with np.errstate(all="ignore"):
        narrow = products.astype(np.float32).astype(values.dtype)
    wrong = (products < 0) | (narrow.astype(np.float64) != products)
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise BaseModelError(
            f"{path}: its quantisation scale at {list(place)} becomes {products[place]:.6g}, which "
            f"{values.dtype.name} cannot hold exactly",
            remedy=_REMEDY,
        )
    return narrow


def _eps(dtype: np.dtype[Any]) -> float:
    find: Callable[[np.dtype[Any]], Any] = ml_dtypes.finfo  # it has no annotations
    return float(find(dtype).eps)


def _along(scale: Array, axes: int, axis: int) -> Array:
    """The scale in the axis of outputs of a tensor, broadcast over the others."""
    shape = [1] * axes
    shape[axis] = len(scale)
    return scale.reshape(shape)


def _out_of_range(path: str, products: Array, lost: Array, dtype: str, axis: int) -> str:
    place = np.argwhere(lost)[0]
    group = f", group {place[1 - axis]}" if len(place) > 1 else ""
    return (
        f"{path}: the quantisation scale of channel {place[axis]}{group} becomes "
        f"{products[tuple(place)]:.6g}, out of the range of {dtype}"
    )
