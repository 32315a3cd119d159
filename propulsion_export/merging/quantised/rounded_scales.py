"""The scales of quantised blocks times the factors of their rows, each rounded once."""

import ml_dtypes
import numpy as np

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import Array
from propulsion_export.errors import AdapterError, BaseModelError

UNQUANTISED = "Fold the adapter into the unquantised base model, and quantise what comes out."


def rounded_scales(path: str, scales: Array, factors: Array) -> Array:
    """The scales [outputs, blocks] times the factors [outputs], float64, in the scales' dtype.

    Raises:
        AdapterError: there is another number of factors, or their dtype cannot hold a product to
            half a unit in its last place: it overflows, underflows or is subnormal.
        BaseModelError: a scale is not finite.
    """
    check_width(path, factors, scales.shape[0])
    wide = scales.astype(np.float64)
    _check_finite(path, wide)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        products = wide * factors[:, None]
        found = rounded(products, scales.dtype)
        unit = float(ml_dtypes.finfo(scales.dtype).eps)  # type: ignore[no-untyped-call]
        held = np.abs(found.astype(np.float64) - products) <= unit / 2 * np.abs(products)
    if not held.all():
        raise _lost(path, products, held, scales.dtype.name)
    return found


def check_width(path: str, factors: Array, outputs: int) -> None:
    """Refuse an adapter that has another number of scales than a module has outputs.

    Raises:
        AdapterError: it has.
    """
    if factors.shape != (outputs,):
        raise AdapterError(
            f"{path}: the adapter has {factors.size} scales, the base model {outputs} outputs",
            remedy="Was the adapter trained on this base model?",
        )


def _check_finite(path: str, scales: Array) -> None:
    if not np.isfinite(scales).all():
        channel, block = np.argwhere(~np.isfinite(scales))[0]
        raise BaseModelError(
            f"{path}: the scale of channel {channel}, block {block} is {scales[channel, block]}, "
            "expected a finite number",
            remedy="Copy the base model again.",
        )


def _lost(path: str, products: Array, held: Array, dtype: str) -> AdapterError:
    places = np.argwhere(~held)
    return AdapterError(
        *(
            f"{path}: channel {channel}, block {block}: the scaled scale is "
            f"{products[channel, block]:.4g}, which {dtype} cannot hold"
            for channel, block in places
        ),
        remedy=UNQUANTISED,
    )
